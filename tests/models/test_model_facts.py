"""What is asked of any model: its parameters' names and state, its context, its devices, its randomness."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import hesscope as hs
from architectures import ARCHITECTURES, CONTEXT, tiny
from hesscope.models import (
    aliases,
    context_length,
    fingerprint,
    first_nonfinite_module,
    named_parameters,
    place_model,
    require_one_device,
    state_key,
)
from hesscope.models.dropout import require_no_dropout

TIED = "lm_head.weight"
FIRST = "model.embed_tokens.weight"


def test_tied_parameters_have_one_name_and_several_aliases() -> None:
    model = tiny("llama")
    assert TIED not in named_parameters(model)
    assert aliases(model)[TIED] == aliases(model)[FIRST] == FIRST
    assert [name for name, first in aliases(model).items() if name == first] == list(named_parameters(model))


def written_in_place(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] += 1


def replaced(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach() + 1)


def buffer_written(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(2)


@pytest.mark.parametrize("change", [written_in_place, replaced, buffer_written])
def test_a_change_changes_the_state_and_the_fingerprint(change: Callable[[nn.Module], None]) -> None:
    model = tiny("llama")
    before = state_key(model), fingerprint(model)
    assert (state_key(model), fingerprint(model)) == before
    change(model)
    assert state_key(model) != before[0]
    assert fingerprint(model) != before[1]


def test_running_a_model_does_not_change_its_state() -> None:
    model = tiny("llama")
    before = state_key(model)
    model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    assert state_key(model) == before


def test_equal_numbers_under_another_name_dtype_or_shape_are_another_model() -> None:
    zeros = {
        "plain": nn.Linear(2, 2),
        "nested": nn.Sequential(nn.Linear(2, 2)),
        "narrow": nn.Linear(2, 2).bfloat16(),
        "wide": nn.Linear(4, 1),
        "class": nn.Bilinear(1, 1, 1),
    }
    for model in zeros.values():
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    assert len({fingerprint(model) for model in zeros.values()}) == len(zeros)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"bloom"}))
def test_the_context_is_found_under_every_name(name: str) -> None:
    assert context_length(tiny(name)) == CONTEXT


def test_a_model_may_state_no_context() -> None:
    assert context_length(nn.Linear(1, 1)) is None
    assert context_length(tiny("bloom")) is None  # its positions are slopes


def test_the_context_of_a_nested_text_configuration() -> None:
    model = nn.Linear(1, 1)
    text = SimpleNamespace(max_position_embeddings=12)
    model.config = SimpleNamespace(get_text_config=lambda: text)
    assert context_length(model) == 12


def test_one_device() -> None:
    assert require_one_device(nn.Linear(1, 1)) == torch.device("cpu")
    with pytest.raises(hs.HesscopeError, match="found meta"):
        require_one_device(nn.Linear(1, 1, device="meta"))
    with pytest.raises(hs.HesscopeError, match="found cpu, meta"):
        require_one_device(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta")))


def test_a_model_is_copied_only_if_it_has_to_be() -> None:
    model = tiny("llama", torch.float32)
    assert place_model(model, None, None) is model
    assert place_model(model, torch.float32, "cpu") is model
    copied = place_model(model, torch.float64, None)
    assert {p.dtype for p in copied.parameters()} == {torch.float64}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert aliases(copied) == aliases(model)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {}),
        ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
        ("opt", {}),
        ("opt", {"dropout": 0.0, "layerdrop": 0.1}),
        ("llama", {"attention_dropout": 0.1}),
        ("gpt-neox", {"hidden_dropout": 0.1}),
    ],
)
def test_any_rate_in_training_mode_is_refused(name: str, options: dict[str, Any]) -> None:
    model = tiny(name, **options)
    require_no_dropout(model)
    with pytest.raises(hs.HesscopeError, match="is in training mode and would drop"):
        require_no_dropout(model.train())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("mixtral", {}),
        ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
        ("gpt-neox", {}),
    ],
)
def test_training_mode_without_a_rate_is_fine(name: str, options: dict[str, Any]) -> None:
    require_no_dropout(tiny(name, **options).train())


@pytest.mark.parametrize("module", [nn.Dropout(0.1), nn.AlphaDropout(0.1), nn.Dropout2d(0.1), nn.BatchNorm1d(2)])
def test_modules_that_are_random_or_see_the_batch(module: nn.Module) -> None:
    with pytest.raises(hs.HesscopeError, match="'1' is in training mode"):
        require_no_dropout(nn.Sequential(nn.Linear(2, 2), module))
    require_no_dropout(nn.Sequential(nn.Linear(2, 2), module).eval())
    require_no_dropout(nn.Dropout(0.0))


def test_the_first_module_with_an_output_that_is_not_finite() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Identity(), nn.Tanh())
    with torch.no_grad():
        model[0].weight.fill_(torch.inf)
    assert first_nonfinite_module(model, lambda: model(torch.ones(1, 1))) == "0"
    assert first_nonfinite_module(model, lambda: None) is None
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ZeroDivisionError):
        first_nonfinite_module(model, lambda: 1 / 0)
    assert not any(m._forward_hooks for m in model.modules())
