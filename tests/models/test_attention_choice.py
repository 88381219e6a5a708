"""Which attention a problem runs: asked for, taken by length, refused with a reason; and nothing stays switched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hesscope as hs
from architectures import ragged_batches, ragged_pairs, tiny
from hesscope.models.attention.choice import LONG, choose
from hesscope.models.attention.registered import NAME, attention, counting
from hesscope.models.attention.visibility import Visible
from oracles import relative


def long_batch(length: int = LONG) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(3, 30, (1, length), generator=torch.Generator().manual_seed(0))}]


def note(problem: hs.Problem) -> str:
    found: str = problem.describe()["attention"]
    return found


def test_long_sequences_take_tiles_by_themselves() -> None:
    model = tiny("gpt2", n_positions=LONG)
    problem = hs.causal_lm(model, long_batch())
    assert note(problem) == "tiled (memory linear in the length), for sequences of 1024 positions"
    assert note(hs.causal_lm(model, long_batch(LONG - 1))) == "sdpa (mathematical form)"
    # What is made of a problem runs what it runs, however short.
    assert problem.related(batches=long_batch(8)).attention is problem.attention
    with counting() as calls:
        one = problem.risk()
    assert calls == ["GPT2Attention"] * 2
    assert abs(one - hs.causal_lm(model, long_batch(), attention="sdpa").risk()) < 1e-12


@pytest.mark.parametrize("length", [5, LONG])
def test_a_model_with_an_attention_of_its_own(length: int) -> None:
    """Bloom adds biases of its own to scores of its own."""
    model = tiny("bloom")
    with pytest.raises(hs.HesscopeError, match="BloomForCausalLM never calls the attention function"):
        hs.causal_lm(model, long_batch(length), attention="tiled")
    said = note(hs.causal_lm(model, long_batch(length)))
    assert ("not tiled, for BloomForCausalLM never calls" in said) == (length == LONG)


class OwnAttention(nn.Module):
    """A causal model with a configuration that nothing in it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="eager")
        self.embed = nn.Embedding(37, 37).double()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.embed(input_ids).cumsum(1))


def test_a_model_that_runs_without_a_call_is_found_out() -> None:
    with pytest.raises(hs.HesscopeError, match="OwnAttention never calls the attention function"):
        hs.causal_lm(OwnAttention(), ragged_batches(), attention="tiled")


@pytest.mark.parametrize(("is_causal", "queries"), [(True, 3), (False, 3), (True, 1), (None, 3)])
def test_without_a_mask_what_is_seen_is_the_layers(is_causal: bool | None, queries: int) -> None:
    """As for SDPA: causal by the layer's own word unless the call says otherwise, and never for a single query."""
    layer = nn.Module()
    layer.is_causal = False  # type: ignore[assignment]
    q, k, v = (torch.randn(1, 2, n, 4, generator=torch.Generator().manual_seed(n)).double() for n in (queries, 3, 3))
    out, _ = attention(layer, q, k, v, None, is_causal=is_causal)
    expected, _ = sdpa_attention_forward(layer, q, k, v, None, is_causal=is_causal)
    assert relative(out, expected) < 1e-12


def test_a_model_without_weights_is_taken_at_its_word() -> None:
    """On the meta device nothing can be tried."""

    def trial(target: str | None) -> float:
        raise AssertionError

    found = {name: choose(tiny(name).to("meta"), "auto", LONG, False, trial) for name in ("llama", "bloom")}
    assert {name: choice.target for name, choice in found.items()} == {"llama": NAME, "bloom": None}
    assert "BloomForCausalLM does not say that it takes registered" in found["bloom"].note


def test_a_model_of_the_same_class_runs_the_same() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches(), attention="tiled")
    assert problem.related(model=tiny("gpt2", seed=1)).attention is problem.attention
    assert problem.related(model=tiny("llama")).attention is not problem.attention


def test_biases_between_positions_are_refused() -> None:
    with pytest.raises(hs.HesscopeError, match="adds a bias to every pair of positions"):
        hs.seq2seq_lm(tiny("t5"), ragged_pairs(), attention="tiled")
    pairs = [{k: v.repeat(1, LONG) for k, v in ragged_pairs()[2].items()}]
    assert "not tiled, for the model adds a bias" in note(hs.seq2seq_lm(tiny("t5"), pairs))


def test_dropout_is_refused() -> None:
    with pytest.raises(hs.HesscopeError, match="dropout='frozen' has masks of every pair"):
        hs.causal_lm(tiny("gpt2"), ragged_batches(), attention="tiled", dropout="frozen")
    model = tiny("gpt2", n_positions=LONG)
    assert "not tiled, for dropout='frozen'" in note(hs.causal_lm(model, long_batch(), dropout="frozen"))
    q = torch.zeros(1, 1, 2, 2)
    with pytest.raises(hs.HesscopeError, match="drops attention weights"):
        attention(model, q, q, q, None, dropout=0.1)


def test_a_dense_mask_is_refused() -> None:
    batch = ragged_batches()[2] | {"attention_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()}
    with pytest.raises(hs.HesscopeError, match="mask of every pair of positions"):
        hs.causal_lm(tiny("gpt2"), [batch | {"labels": batch["input_ids"]}], attention="tiled")


def test_a_model_that_means_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from hesscope.models.attention import registered

    def ignoring(*args: Any, **kwargs: Any) -> Visible:
        return registered.everything(args[1].shape[2], args[2].shape[2], args[1].device)

    monkeypatch.setattr(registered, "_visible", ignoring)
    with pytest.raises(hs.HesscopeError, match=r"its loss on a few tokens is .* with tiles and .* without"):
        hs.causal_lm(tiny("gpt2"), ragged_batches(), attention="tiled")


@pytest.mark.parametrize("asked", ["sdpa", "eager", "tiled"])
def test_only_models_of_transformers_are_switched(asked: str) -> None:
    batches = [(torch.ones(2, 3), torch.tensor([0, 1]))]
    with pytest.raises(hs.HesscopeError, match=f"attention='{asked}', got Linear"):
        hs.Problem(nn.Linear(3, 2), lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), batches, count=len,
                   attention=asked)  # fmt: skip


def test_names_are_checked() -> None:
    with pytest.raises(hs.HesscopeError, match="attention to be 'auto', 'sdpa', 'eager' or 'tiled', got 'flash'"):
        hs.causal_lm(tiny("gpt2"), ragged_batches(), attention="flash")
    model = tiny("gemma2")
    model.__class__._supports_sdpa, before = False, model.__class__._supports_sdpa
    try:
        with pytest.raises(hs.HesscopeError, match="has SDPA, but Gemma2ForCausalLM does not"):
            hs.causal_lm(model, ragged_batches(), attention="sdpa")
    finally:
        model.__class__._supports_sdpa = before


def test_a_loss_that_needs_its_whole_batch_keeps_what_it_had() -> None:
    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        assert batch["input_ids"].shape[1] == LONG
        mean: torch.Tensor = model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
        return mean

    model = tiny("gpt2", n_positions=LONG)
    problem = hs.Problem(model, loss, long_batch(), count=lambda b: b["input_ids"].numel() - 1)
    assert "not tiled, for its loss does not run on a few tokens alone (AssertionError)" in note(problem)


@pytest.mark.parametrize("asked", ["sdpa", "eager", "tiled"])
def test_the_model_comes_back_as_it_was(asked: str) -> None:
    model, inside = tiny("llama"), []
    model.config._attn_implementation_internal = "flex_attention"
    before = vars(model.config).copy()
    model.model.layers[0].register_forward_hook(lambda *_: inside.append(model.config._attn_implementation))
    problem = hs.causal_lm(model, ragged_batches(), attention=asked)
    problem.risk()
    assert set(inside[-3:]) == {NAME if asked == "tiled" else asked}
    assert vars(model.config) == before
    assert note(problem).endswith(", as asked")


def test_eager_and_sdpa_give_the_same() -> None:
    found = []
    for asked in ("sdpa", "eager"):
        H = hs.hessian(hs.causal_lm(tiny("gpt2"), ragged_batches(), attention=asked))
        found.append(H @ torch.ones(H.shape[0], dtype=torch.float64))
    assert relative(*found) < 1e-9
