"""A tiny model on disk, and a way to run one command in this process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hesscope.assets.byte_tokenizer import byte_tokenizer
from hesscope.cli.main import run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-block byte-level Llama (context 32) and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(32).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text file of a few windows."""
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    return path


@pytest.fixture
def command(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Run a verb on the tiny model in a folder of its own; the command line's warning settings end with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run_verb(verb: str, *own: str, model: object = tiny, data: object = text, length: int = 16) -> int:
        common = ["--model", str(model), "--data", str(data), "--length", str(length), "--sequences", "2"]
        return run([verb, *common, *own])

    with warnings.catch_warnings():
        yield run_verb
