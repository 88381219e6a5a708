"""The embedded model is what its training record says."""

import hashlib
import json
import logging
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from hesscope.assets import model_path, prose
from hesscope.assets.train import POSITIONS, byte_ids, mean_loss

UNIFORM_LOSS = math.log(256)

TEXTS = [
    "plain",
    "  two  spaces , don 't \r\n\tend ",
    "Zürich — 日本語 🙂",
    "\x00\x7f\xad\xff",
    "".join(map(chr, range(256))),
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model_path(), local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_path(), local_files_only=True)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads((model_path() / "training.json").read_text(encoding="utf-8"))
    return recorded


def test_the_model_is_small(model: LlamaForCausalLM, record: dict[str, Any]) -> None:
    assert model.num_parameters() == record["parameters"] <= 1_000_000
    assert (model_path() / "model.safetensors").stat().st_size <= 4_000_000
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_the_folder_holds_a_model_a_tokenizer_and_the_record() -> None:
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"}
    assert {path.name for path in model_path().iterdir()} == names


def test_loading_logs_no_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    # The library keeps its log to itself, out of the reach of pytest.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    AutoModelForCausalLM.from_pretrained(model_path(), local_files_only=True)
    AutoTokenizer.from_pretrained(model_path(), local_files_only=True)
    assert caplog.messages == []


@pytest.mark.parametrize("text", TEXTS)
def test_token_ids_are_bytes_and_come_back_as_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_there_are_no_special_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == model.config.vocab_size == 256
    assert tokenizer.all_special_tokens == []
    assert {model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id} == {None}
    assert tokenizer.model_max_length == model.config.max_position_embeddings == POSITIONS


def test_held_out_loss_is_the_recorded_one(model: LlamaForCausalLM, record: dict[str, Any]) -> None:
    text = prose("held_out")
    # Another Python carries other topics, so that part of its held-out text may have been seen in training.
    same_text = hashlib.sha256(text.encode()).hexdigest() == record["held_out_sha256"]
    band = 0.002 if same_text else 0.6
    assert mean_loss(model, byte_ids(text)) == pytest.approx(record["held_out_nats_per_byte"], abs=band)
    assert record["held_out_nats_per_byte"] < 0.35 * UNIFORM_LOSS


def test_held_out_loss_of_a_part_is_near_the_whole(model: LlamaForCausalLM, record: dict[str, Any]) -> None:
    part = byte_ids(prose("held_out"))[: 16 * POSITIONS]
    assert mean_loss(model, part) == pytest.approx(record["held_out_nats_per_byte"], abs=0.6)


def test_greedy_text_goes_on(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = tokenizer("The value of the ", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(ids[0, -8:]).strip().isascii()
