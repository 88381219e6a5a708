"""A language-model problem is the mean loss of exactly the tokens that the data says, whatever form it comes in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

import hesscope as hs
from architectures import CONTEXT, VOCABULARY, ragged_batches, tiny
from characters import ids, tokenizer
from hesscope.losses import CausalLMLoss
from oracles import causal_lm_products, keeping_double, mean_nll, relative

TEXTS = ["abc. def", "ghij", "klmnopqrstu vwxyz."]
JOINED = "\n\n".join(TEXTS)
LENGTH = 6
WINDOWS = [JOINED[i : i + LENGTH] for i in range(0, len(JOINED) - LENGTH + 1, LENGTH)]
CUT = [t[:LENGTH] for t in TEXTS]

#: float32 sums of a dozen numbers, taken in another order
ROUNDING = 1e-6


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "x.txt").write_text(JOINED, encoding="utf-8")
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS), encoding="utf-8")
    Dataset.from_dict({"text": TEXTS}).to_parquet(str(tmp_path / "x.parquet"))
    Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    return tmp_path


def expected_risk(model: torch.nn.Module, sequences: list[str]) -> float:
    with torch.no_grad():
        return float(mean_nll(model, [{"input_ids": ids(s)[None]} for s in sequences]))


FORMS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], list[str]]] = {
    "text file": (lambda f: f / "x.txt", {}, WINDOWS),
    "text file by name": (lambda f: str(f / "x.txt"), {"sequences": 2}, WINDOWS[:2]),
    "json lines": (lambda f: f / "x.jsonl", {}, CUT),
    "json lines, packed": (lambda f: f / "x.jsonl", {"pack": True}, WINDOWS),
    "parquet": (lambda f: f / "x.parquet", {"sequences": 2}, CUT[:2]),
    "parquet, packed": (lambda f: f / "x.parquet", {"pack": True}, WINDOWS),
    "dataset": (lambda f: Dataset.from_dict({"text": TEXTS}), {}, WINDOWS),
    "dataset, another column": (lambda f: Dataset.from_dict({"story": TEXTS}), {"text_column": "story"}, WINDOWS),
    "dataset folder": (lambda f: f / "saved", {}, WINDOWS),
    "texts": (lambda f: TEXTS, {}, CUT),
    "texts, packed": (lambda f: TEXTS, {"pack": True, "sequences": 3}, WINDOWS[:3]),
    "generator of texts": (lambda f: (t for t in TEXTS), {}, CUT),
    "token matrix": (lambda f: torch.stack([ids(w) for w in WINDOWS]), {}, WINDOWS),
    "token matrix, longer than asked": (lambda f: torch.stack([ids(t[:8]) for t in TEXTS[::2]]), {}, CUT[::2]),
    "token lists": (lambda f: [ids(c).tolist() for c in CUT], {}, CUT),
    "tokenised dataset": (lambda f: Dataset.from_dict({"input_ids": [ids(c).tolist() for c in CUT]}), {}, CUT),
    "batches": (lambda f: [{"input_ids": ids(c)[None]} for c in CUT], {}, CUT),
    "batches, the first rows": (
        lambda f: [{"input_ids": ids("abcdef").reshape(3, 2)}] * 2,
        {"sequences": 4},
        ["ab", "cd", "ef", "ab"],
    ),
    "generator of batches": (lambda f: ({"input_ids": ids(c)[None]} for c in CUT), {}, CUT),
    "data loader": (
        lambda f: DataLoader([{"input_ids": ids(w)} for w in WINDOWS], batch_size=2),
        {},
        WINDOWS,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_risk_is_the_mean_over_the_tokens_of_every_form_of_data(form: str, files: Path, model_folder: Path) -> None:
    make, options, sequences = FORMS[form]
    model = tiny("llama", torch.float32)
    problem = hs.causal_lm(model, make(files), tokenizer=tokenizer(), length=LENGTH, batch_size=2, **options)
    assert sum(len(s) - 1 for s in sequences) == problem.N
    assert problem.risk() == pytest.approx(expected_risk(model, sequences), rel=ROUNDING)


@pytest.mark.parametrize("name", [str, Path])
def test_a_local_folder_is_loaded_in_float32_with_its_own_tokenizer(name: type, model_folder: Path) -> None:
    """The folder's weights are bfloat16, which float32 holds exactly."""
    problem = hs.causal_lm(name(model_folder), TEXTS, length=LENGTH, device="cpu")
    loaded = tiny("llama", torch.bfloat16).float()
    assert {p.dtype for p in problem.model.parameters()} == {torch.float32}
    assert not problem.model.training
    assert problem.risk() == pytest.approx(expected_risk(loaded, CUT), rel=ROUNDING)
    described = problem.describe()
    assert described["model_name"] == str(model_folder)
    assert described["dtype"] == "float32"
    assert described["terms"] == problem.N


def test_a_folder_in_another_dtype(model_folder: Path) -> None:
    for dtype in ("float64", torch.float64):
        problem = hs.causal_lm(model_folder, TEXTS, length=LENGTH, dtype=dtype, device="cpu")
        assert hs.hessian(problem).dtype == torch.float64
        assert problem.describe()["dtype"] == "float64"


def test_a_tokenizer_by_name(model_folder: Path) -> None:
    model = tiny("llama", torch.float32)
    named = hs.causal_lm(model, TEXTS, tokenizer=str(model_folder), length=LENGTH)
    given = hs.causal_lm(model, TEXTS, tokenizer=tokenizer(), length=LENGTH)
    assert named.data_fingerprint == given.data_fingerprint


def test_no_length_means_the_models_context(files: Path) -> None:
    problem = hs.causal_lm(tiny("gpt2"), files / "x.txt", tokenizer=tokenizer())
    assert [tuple(b["input_ids"].shape) for b in problem.batches] == [(1, CONTEXT)] * (len(JOINED) // CONTEXT)
    problem = hs.causal_lm(tiny("gpt2"), TEXTS, tokenizer=tokenizer())
    assert [b["input_ids"].shape[1] for b in problem.batches] == [min(len(t), CONTEXT) for t in TEXTS]


# ---- labels, padding, counting


def test_the_count_is_of_valid_targets_over_all_batches() -> None:
    """7 + 6 + 4 tokens, two times 5 of which 3 + 1 labels do not count, and 3; the first of each sequence never does."""
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    assert problem.counts == (6 + 5 + 3, 2 + 3, 2)
    assert problem.N == 21


def test_the_risk_is_not_the_mean_of_the_batches_means() -> None:
    model = tiny("gpt2")
    problem = hs.causal_lm(model, ragged_batches())
    with torch.no_grad():
        means = [float(mean_nll(model, [b])) for b in ragged_batches()]
        expected = float(mean_nll(model, ragged_batches()))
    assert problem.risk() == pytest.approx(expected, rel=1e-12)
    assert abs(sum(means) / 3 - expected) > 1e-3 * expected


def test_explicit_labels_are_obeyed() -> None:
    """Also where they are not the inputs, where they count under a mask, and where the inputs would not."""
    model = tiny("gpt2")
    ids_ = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[-100, 9, -100, 11]])
    problem = hs.causal_lm(
        model, [{"input_ids": ids_, "labels": labels, "attention_mask": torch.tensor([[1, 1, 1, 0]])}]
    )
    with torch.no_grad():
        log_p = model(input_ids=ids_, attention_mask=torch.tensor([[1, 1, 1, 0]])).logits.log_softmax(-1)
    assert problem.N == 2
    assert problem.risk() == pytest.approx(float(-(log_p[0, 0, 9] + log_p[0, 2, 11]) / 2), rel=1e-12)


def left(batch: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """The same sequences behind `by` masked tokens."""
    ids_ = torch.nn.functional.pad(batch["input_ids"], (by, 0), value=3)
    return {"input_ids": ids_, "attention_mask": torch.nn.functional.pad(torch.ones_like(batch["input_ids"]), (by, 0))}


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "opt", "bloom"])
def test_left_padding_changes_nothing_where_positions_are_relative_or_follow_the_mask(name: str) -> None:
    plain = [{"input_ids": torch.tensor([[5, 9, 30, 4, 7], [8, 8, 3, 2, 6]])}, {"input_ids": torch.tensor([[3, 4, 5]])}]
    model = tiny(name)
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    with keeping_double(model):
        expected = hs.causal_lm(model, plain)
        padded = hs.causal_lm(model, [left(plain[0], 2), left(plain[1], 3)])
        assert padded.counts == expected.counts == (8, 2)
        assert padded.risk() == pytest.approx(expected.risk(), rel=1e-12)
        assert relative(hs.hessian(padded) @ v, hs.hessian(expected) @ v) < 1e-10


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma3", "opt", "gpt-neox", "bloom", "llama4"])
def test_right_padding_changes_nothing(name: str) -> None:
    """Even far more of it than the sliding windows are long."""
    sequences = [torch.tensor([5, 9, 30, 4, 7, 7, 3, 20, 21, 5, 6]), torch.tensor([8, 8]), torch.tensor([3, 4, 5])]
    model = tiny(name)
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    with keeping_double(model):
        together, apart = (hs.causal_lm(model, sequences, batch_size=size) for size in (3, 1))
        assert together.N == apart.N == 13
        assert together.risk() == pytest.approx(apart.risk(), rel=1e-12)
        assert relative(hs.hessian(together) @ v, hs.hessian(apart) @ v) < 1e-10


# ---- identity


def test_equal_problems_have_equal_fingerprints(files: Path, model_folder: Path) -> None:
    first = hs.causal_lm(tiny("llama"), ragged_batches())
    second = hs.causal_lm(tiny("llama"), iter(ragged_batches()))
    assert first.fingerprint == second.fingerprint
    assert first.data_fingerprint == second.data_fingerprint
    by_name = [hs.causal_lm(model_folder, files / "x.txt", length=LENGTH).fingerprint for _ in range(2)]
    assert by_name[0] == by_name[1]


def test_one_changed_weight_gives_another_fingerprint() -> None:
    model = tiny("llama")
    problem = hs.causal_lm(model, ragged_batches())
    before = problem.fingerprint
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-12
    assert problem.fingerprint != before
    assert problem.fingerprint == hs.causal_lm(model, ragged_batches()).fingerprint


def changed_token(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    batches[2]["input_ids"][0, 1] = 3 + (batches[2]["input_ids"][0, 1] - 2) % 30
    return batches


def changed_label(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    batches[1]["labels"][1, 2] = -100
    return batches


def changed_mask(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    batches[0]["attention_mask"][1, 5] = 0
    return batches


@pytest.mark.parametrize(
    "change",
    [changed_token, changed_label, changed_mask, lambda b: b[::-1], lambda b: b[:2], lambda b: [*b, b[2]]],
    ids=["token", "label", "mask", "order", "fewer", "more"],
)
def test_other_data_gives_another_fingerprint(change: Callable[..., Any]) -> None:
    model = tiny("llama")
    reference, other = hs.causal_lm(model, ragged_batches()), hs.causal_lm(model, change(ragged_batches()))
    assert other.data_fingerprint != reference.data_fingerprint
    assert other.fingerprint != reference.fingerprint


def test_what_decides_the_numbers_is_in_the_fingerprint() -> None:
    model = tiny("gpt2")
    variants: list[dict[str, Any]] = [
        {},
        {"objective": "perplexity"},
        {"dropout": "frozen"},
        {"dropout": "frozen", "seed": 1},
        {"dtype": "float32"},
    ]
    prints = [hs.causal_lm(model, ragged_batches(), **options).fingerprint for options in variants]
    assert len(set(prints)) == len(variants)
    assert hs.causal_lm(model, ragged_batches(), seed=1).fingerprint == prints[0]  # nothing is drawn


def test_batches_are_frozen_when_the_problem_is_made() -> None:
    batches = ragged_batches()
    problem = hs.causal_lm(tiny("gpt2"), batches)
    before = problem.risk(), problem.data_fingerprint
    for batch in batches:
        batch["input_ids"].fill_(4)
    batches.clear()
    assert (problem.risk(), problem.data_fingerprint) == before


# ---- the caller's model


def test_a_given_model_is_used_as_it_is() -> None:
    model = tiny("llama")
    assert hs.causal_lm(model, ragged_batches()).model is model
    assert hs.causal_lm(model, ragged_batches(), dtype="float64", device="cpu").model is model


def test_another_dtype_works_on_a_copy() -> None:
    model = tiny("llama", torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    problem = hs.causal_lm(model, ragged_batches(), dtype="float64")
    assert problem.model is not model
    assert {p.dtype for p in problem.model.parameters()} == {torch.float64}
    assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in model.named_parameters())
    assert hs.select(problem).size == sum(p.numel() for p in before.values())  # ties survive
    with torch.no_grad():
        expected = mean_nll(tiny("llama", torch.float32).double(), ragged_batches())
    assert problem.risk() == pytest.approx(float(expected), rel=1e-6)


def test_another_device_works_on_a_copy() -> None:
    model = tiny("llama")
    with pytest.raises(hs.HesscopeError, match="on one device, found meta"):
        hs.causal_lm(model, ragged_batches(), device="meta")
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_models_over_several_devices_are_refused() -> None:
    model = tiny("llama")
    model.lm_head.to_empty(device="meta")
    model.model.norm.to_empty(device="meta")
    with pytest.raises(
        hs.HesscopeError, match=r"all parameters on one device, found cpu, meta, and no hooks .* with device_map"
    ):
        hs.causal_lm(model, ragged_batches())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_half_precision_logits_is_taken_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5, VOCABULARY, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.tensor([[1, 2, 3, -100, 5], [6, 7, -100, -100, 9]])
    total, count = CausalLMLoss().total_of_outputs(logits, {"labels": labels})
    log_p = logits.double().log_softmax(-1)
    expected = sum(float(log_p[i, t - 1, labels[i, t]]) for i in range(2) for t in range(1, 5) if labels[i, t] >= 0)
    assert count == 5
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(-expected, rel=1e-6)


def test_half_precision_works_on_float32_vectors() -> None:
    """bfloat16 keeps eight bits of each number; the loss itself is taken in float32."""
    model = tiny("gpt2", torch.bfloat16)
    v = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    product = hs.hessian(hs.causal_lm(model, ragged_batches())) @ v
    (expected,) = causal_lm_products(model, ragged_batches(), [v])
    assert {part.dtype for part in product.values()} == {torch.float32}
    ours, theirs = (torch.cat([x[name].double().reshape(-1) for name in v]) for x in (product, expected))
    assert 1e-4 < relative(ours, theirs) < 0.05


# ---- dropout


def test_a_model_that_would_drop_is_refused() -> None:
    with pytest.raises(hs.HesscopeError, match=r"without active dropout, but .* is in training mode.*call model.eval"):
        hs.causal_lm(tiny("gpt2").train(), ragged_batches())
    partly = tiny("gpt2")
    partly.transformer.h[1].mlp.dropout.train()
    with pytest.raises(hs.HesscopeError, match=r"'transformer.h.1.mlp.dropout' is in training mode"):
        hs.causal_lm(partly, ragged_batches())
    # Attention reads its rate from the configuration, without a module.
    with pytest.raises(hs.HesscopeError, match="is in training mode"):
        hs.causal_lm(tiny("llama", attention_dropout=0.1).train(), ragged_batches())


def test_training_mode_without_dropout_is_the_same_problem() -> None:
    model = tiny("llama").train()
    assert hs.causal_lm(model, ragged_batches()).risk() == hs.causal_lm(tiny("llama"), ragged_batches()).risk()


def test_frozen_dropout_keeps_one_mask_a_batch() -> None:
    model = tiny("gpt2", resid_pdrop=0.5)
    off = hs.causal_lm(model, ragged_batches())
    frozen, again, other = (hs.causal_lm(model, ragged_batches(), dropout="frozen", seed=s) for s in (0, 0, 1))
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    product = hs.hessian(frozen) @ v
    assert torch.equal(hs.hessian(frozen, graph_memory=0) @ v, product)
    assert torch.equal(hs.hessian(again) @ v, product)
    assert frozen.risk() == again.risk() == frozen.risk()
    for problem in (off, other):
        assert relative(hs.hessian(problem) @ v, product) > 1e-2
        assert abs(problem.risk() - frozen.risk()) > 1e-3
    assert not model.training


def test_two_equal_batches_are_dropped_differently() -> None:
    model = tiny("gpt2", resid_pdrop=0.5)
    batch = ragged_batches()[2]
    problem = hs.causal_lm(model, [batch, batch], dropout="frozen")
    with torch.no_grad():
        assert problem.total(0)[0] != problem.total(1)[0]


# ---- complaints


def test_longer_than_the_context() -> None:
    message = f"at most {CONTEXT} tokens, the model's context, got {CONTEXT + 1}"
    too_long = torch.full((1, CONTEXT + 1), 5)
    with pytest.raises(hs.HesscopeError, match=f"Expected each sequence to have {message}; pass length={CONTEXT}"):
        hs.causal_lm(tiny("gpt2"), TEXTS, tokenizer=tokenizer(), length=CONTEXT + 1)
    with pytest.raises(hs.HesscopeError, match=f"Expected batch 1 to have {message}"):
        hs.causal_lm(tiny("llama"), [{"input_ids": too_long[:, :4]}, {"input_ids": too_long}])
    assert hs.causal_lm(tiny("llama"), too_long, length=CONTEXT).N == CONTEXT - 1


def test_a_short_text_file_is_refused_and_short_separate_texts_are_not(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("abc", encoding="utf-8")
    with pytest.raises(hs.HesscopeError, match=r"x.txt to hold at least one window of 6 tokens, but it has 3"):
        hs.causal_lm(tiny("gpt2"), tmp_path / "x.txt", tokenizer=tokenizer(), length=6)
    assert hs.causal_lm(tiny("gpt2"), ["abc", "de"], tokenizer=tokenizer(), length=6).N == 3


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (TEXTS, {}, "Expected tokenizer= with text and a model that was not loaded by name"),
        (TEXTS, {"length": 1}, "Expected length to be at least 2"),
        (TEXTS, {"tokenizer": tokenizer(), "batch_size": 0}, "batch_size to be at least 1"),
        (TEXTS, {"tokenizer": tokenizer(), "sequences": 4}, "Expected 4 sequences, but .* holds only 3"),
        (torch.ones(2, 3).long(), {"sequences": 3}, "Expected 3 sequences, but .* holds only 2"),
        (
            [{"input_ids": torch.ones(2, 3).long()}],
            {"sequences": 3},
            "Expected 3 sequences, but the batches holds only 2",
        ),
        (torch.full((1, 3), VOCABULARY), {}, f"between 0 and {VOCABULARY - 1}, the model's vocabulary"),
        (torch.ones(1, 3).long(), {"objective": "ppl"}, "Expected objective to be 'nll' or 'perplexity', got 'ppl'"),
        (torch.ones(1, 3).long(), {"dropout": "on"}, "Expected dropout to be 'off' or 'frozen', got 'on'"),
        (
            torch.ones(1, 3).long(),
            {"dtype": "float8"},
            "Expected dtype to be one of float64, float32, bfloat16, float16, got 'float8'",
        ),
    ],
)
def test_complaints(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        hs.causal_lm(tiny("gpt2"), data, **options)


def test_no_valid_target_at_all() -> None:
    problem = hs.causal_lm(tiny("gpt2"), torch.ones(2, 1).long())
    with pytest.raises(hs.HesscopeError, match="at least one loss term, found none"):
        problem.risk()


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(hs.HesscopeError, match=r"to be a model folder with a config.json, or a Hub id"):
        hs.causal_lm(tmp_path, TEXTS)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(
        hs.HesscopeError, match=r"Could not load a tokenizer from .*; pass tokenizer=, or data as token ids"
    ):
        hs.causal_lm(tmp_path, TEXTS)
    assert hs.causal_lm(tmp_path, torch.ones(1, 3).long()).N == 2


def test_a_broken_model_folder_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(hs.HesscopeError, match=r"Could not load .* as a causal language model: \S"):
        hs.causal_lm(tmp_path, TEXTS)
