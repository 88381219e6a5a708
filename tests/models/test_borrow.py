"""The caller's model and process are, after any computation, what they were before it, however it ended."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.models import borrowed
from hesscope.models.configs import attention_note
from oracles import relative

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def model_state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a computation might leave changed; compared with ==."""
    state: dict[str, Any] = {}
    for name, p in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        grad = None if p.grad is None else (id(p.grad), p.grad.clone().numpy().tobytes())
        state[name] = (id(p), p.data_ptr(), p._version, p.requires_grad, grad, p.detach().numpy().tobytes())
    for name, m in model.named_modules():
        hooks = [list(v.items()) for k, v in vars(m).items() if k.endswith("_hooks") and isinstance(v, dict)]
        config = getattr(m, "config", None)
        state[f"module {name}"] = (
            m.training,
            sorted(vars(m)),
            hooks,
            m.__dict__.get("forward"),
            getattr(m, "gradient_checkpointing", None),
            None if config is None else (id(config), vars(config).copy()),
        )
    return state


def process_state() -> dict[str, Any]:
    return {
        "torch generator": torch.get_rng_state().numpy().tobytes(),
        "numpy generator": repr(np.random.get_state()),  # noqa: NPY002
        "python generator": random.getstate(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(params=["sdpa", "eager", "flex_attention"])
def lived_in(request: pytest.FixtureRequest) -> nn.Module:
    """A model as it may look in the middle of someone's work: hooks, frozen parts, gradients, mixed training flags."""
    model = tiny("gpt2", **NO_DROPOUT)
    model.config._attn_implementation = request.param
    model.transformer.h[1].train()
    model.transformer.wpe.weight.requires_grad_(False)
    model.transformer.wte.weight.grad = torch.ones_like(model.transformer.wte.weight)
    model.transformer.h[0].register_forward_hook(lambda *_: None)
    model.transformer.h[1].mlp.register_forward_pre_hook(lambda *_: None)
    model.transformer.h[1].attn.register_full_backward_hook(lambda *_: None)
    return model


def everything(model: nn.Module) -> None:
    """Every way of running a model that these layers have."""
    problem = hs.causal_lm(model, ragged_batches())
    H = hs.hessian(problem, hs.select(problem, "transformer.h.*.mlp.*", "transformer.wpe.weight"))
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    F = hs.hessian(problem, H.space, engine="finite-difference")
    F @ torch.ones(H.shape[0], dtype=torch.float64)
    hs.hessian(hs.causal_lm(model, ragged_batches(), objective="perplexity", dropout="frozen", seed=3))
    problem.risk()
    problem.describe()


def test_nothing_of_the_model_or_the_process_changes(lived_in: nn.Module) -> None:
    before = model_state(lived_in), process_state()
    everything(lived_in)
    assert model_state(lived_in) == before[0]
    assert process_state() == before[1]


class Interrupted(Exception):
    """Raised in a forward pass."""


@pytest.mark.parametrize("reason", [Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("dropout", ["off", "frozen"])
def test_nothing_changes_when_a_forward_pass_is_cut_short(
    lived_in: nn.Module, reason: type[BaseException], dropout: str
) -> None:
    inside: list[dict[str, Any]] = []

    def cut_short(*_: Any) -> None:
        inside.append(process_state() | {"attention": lived_in.config._attn_implementation})
        raise reason

    lived_in.transformer.h[1].register_forward_hook(cut_short)
    problem = hs.causal_lm(lived_in, ragged_batches(), dropout=dropout)
    H = hs.hessian(problem)
    before = model_state(lived_in), process_state()
    for run in (problem.risk, lambda: H @ torch.ones(H.shape[0], dtype=torch.float64)):
        with pytest.raises(reason):
            run()
    assert model_state(lived_in) == before[0]
    assert process_state() == before[1]
    # It was cut short in the middle of being borrowed, not before.
    assert len(inside) == 2
    assert not any(state["flash"] for state in inside)
    assert not any(state["attention"] == "flex_attention" for state in inside)
    assert all((state["torch generator"] != before[1]["torch generator"]) == (dropout == "frozen") for state in inside)


def test_a_hook_of_the_callers_runs_and_is_the_same_object() -> None:
    model, seen = tiny("llama"), []

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        seen.append(module)

    handle = model.model.layers[0].register_forward_hook(hook)
    hs.causal_lm(model, ragged_batches()).risk()
    assert seen == [model.model.layers[0]] * 3
    assert list(model.model.layers[0]._forward_hooks.values()) == [hook]
    handle.remove()


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2", "eager"])
def test_any_attention_gives_the_products_of_sdpa(attention: str) -> None:
    v = torch.ones(sum(p.numel() for p in tiny("gpt2").parameters()), dtype=torch.float64)
    results = []
    for used in (attention, "sdpa"):
        model = tiny("gpt2")
        # Set as a loader would leave it; the setter refuses kernels that are not installed.
        model.config._attn_implementation_internal = used
        results.append(hs.hessian(hs.causal_lm(model, ragged_batches())) @ v)
    # GPT-2's eager attention adds the mask in another order of operations, without a cast.
    assert relative(*results) < 1e-12


def test_flags_that_the_caller_has_set_come_back_as_set() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        before = process_state()
        problem.risk()
        assert process_state() == before
        assert not before["flash"]
        assert not before["math"]


def test_what_was_exchanged_is_said() -> None:
    model = tiny("llama")
    assert attention_note(model) == "sdpa (mathematical form)"
    model.config._attn_implementation_internal = "flex_attention"
    note = hs.causal_lm(model, ragged_batches()).describe()["attention"]
    assert note == "sdpa (mathematical form), in place of flex_attention, which has no second derivative"
    assert attention_note(tiny("gemma2")) == "eager"
    assert attention_note(nn.Linear(1, 1)) == "the model's own"


def test_only_the_borrowed_model_is_switched() -> None:
    borrowed_one, other = tiny("mixtral"), tiny("mixtral")
    for model in (borrowed_one, other):
        model.config._attn_implementation_internal = "flex_attention"
    experts = other.config._experts_implementation
    with borrowed(borrowed_one):
        assert borrowed_one.config._attn_implementation == "sdpa"
        assert borrowed_one.config._experts_implementation == "eager"
        assert other.config._attn_implementation == "flex_attention"
        assert other.config._experts_implementation == experts
    assert borrowed_one.config._attn_implementation == "flex_attention"
    assert borrowed_one.config._experts_implementation == experts


def switch_on(model: Any, **how: Any) -> None:
    enable: Callable[..., None] = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(how)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_run_plainly(reentrant: bool) -> None:
    v = torch.ones(sum(p.numel() for p in tiny("llama").parameters()), dtype=torch.float64)
    expected = hs.hessian(hs.causal_lm(tiny("llama"), ragged_batches())) @ v
    model = tiny("llama").train()
    switch_on(model, use_reentrant=reentrant)
    before = model_state(model)
    assert torch.equal(hs.hessian(hs.causal_lm(model, ragged_batches())) @ v, expected)
    assert model_state(model) == before


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("without_gradients")
def test_products_do_not_need_gradients_switched_on() -> None:
    model = tiny("gpt2")
    v = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    product = hs.hessian(hs.causal_lm(model, ragged_batches())) @ v
    with torch.enable_grad():
        assert torch.equal(product, hs.hessian(hs.causal_lm(model, ragged_batches())) @ v)
    assert product.norm() > 0


def test_inference_mode_is_refused() -> None:
    H = hs.hessian(hs.causal_lm(tiny("gpt2"), ragged_batches()))
    with torch.inference_mode(), pytest.raises(hs.HesscopeError, match="inference_mode"):
        H @ torch.ones(H.shape[0], dtype=torch.float64)
