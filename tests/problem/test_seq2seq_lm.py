"""Encoder-decoders: the loss is the model's own, summed and divided once; the Hessian a dense double backward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hesscope as hs
from architectures import ENCODER_DECODERS, VOCABULARY, ragged_pairs, tiny
from oracles import causal_lm, keeping_double, relative

PAIRS = [("a b c", "d e"), ("f", "g h i j"), ("k l", "m")]


class Letters:
    """A tokenizer of letters that ends every text with 2."""

    pad_token_id = 0

    def __call__(self, text: str = "", text_target: str = "", truncation: bool = True, max_length: int = 0) -> Any:
        ids = [3 + ord(letter) - ord("a") for letter in (text or text_target).split()] + [2]
        return {"input_ids": ids[:max_length]}

    def get_vocab(self) -> dict[str, int]:
        return {"a": 3}


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_the_risk_is_the_models_own_loss(name: str) -> None:
    model = tiny(name)
    problem = hs.seq2seq_lm(model, ragged_pairs())
    with torch.no_grad():
        own = [float(model(**b).loss) * int((b["labels"] != -100).sum()) for b in ragged_pairs()]
    assert problem.N == 12 - 2 + 10 - 1 + 2
    assert problem.risk() == pytest.approx(sum(own) / problem.N, rel=1e-6)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_the_hessian(name: str) -> None:
    model = tiny(name)
    with keeping_double(model):
        problem = hs.seq2seq_lm(model, ragged_pairs())
        space = hs.select(problem, {n: [0] for n, p in model.named_parameters()})
        dense = causal_lm(model, problem.batches, space, shift=0).hessian
        v = torch.linspace(-1, 1, space.size, dtype=torch.float64)
        assert relative(hs.hessian(problem, space) @ v, dense @ v) < 1e-10


def test_pairs_rows_and_files_are_the_same_data(tmp_path: Path) -> None:
    model = tiny("t5", torch.float32)
    rows = [{"source": s, "target": t} for s, t in PAIRS]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    problems = [hs.seq2seq_lm(model, data, tokenizer=Letters(), batch_size=2) for data in (PAIRS, rows, path)]
    assert len({p.data_fingerprint for p in problems}) == 1
    batch = problems[0].batches[0]
    assert batch["input_ids"].tolist() == [[3, 4, 5, 2], [8, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7, 2, -100, -100], [9, 10, 11, 12, 2]]
    assert batch["decoder_input_ids"].tolist() == [[0, 6, 7, 2, 0], [0, 9, 10, 11, 12]]
    assert problems[0].N == 3 + 5 + 2
    single = hs.seq2seq_lm(model, PAIRS, tokenizer=Letters())
    assert single.risk() == pytest.approx(problems[0].risk(), rel=1e-5)
    assert hs.seq2seq_lm(model, PAIRS, tokenizer=Letters(), length=2, sequences=1).N == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "Expected at least one pair or batch, got none"),
        (3, "Expected data to be a .jsonl file, .* got int"),
        ([("a",)], "Expected pair 0 to be two texts"),
        ([{"source": "a"}], "Expected pair 0 to be two texts"),
        ("nowhere.jsonl", "Expected a .jsonl file of 'source' and 'target'"),
        ([{"input_ids": [1], "labels": [1]}], "Expected input_ids of batch 0 to be whole numbers"),
        (
            [{"input_ids": torch.tensor([[1]]), "labels": torch.tensor([[VOCABULARY]])}],
            "Expected labels of batch 0 between 0 and 36",
        ),
    ],
)
def test_what_is_no_data_is_refused(data: Any, message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        hs.seq2seq_lm(tiny("t5", torch.float32), data, tokenizer=Letters())


def test_a_decoder_alone_is_refused() -> None:
    with pytest.raises(hs.HesscopeError, match=r"Expected an encoder-decoder .*hs.causal_lm is for decoders"):
        hs.seq2seq_lm(tiny("gpt2"), ragged_pairs())
