"""The exact arrangements and the finite difference give one product, on every architecture, with ragged padded batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hesscope as hs
from architectures import ARCHITECTURES, ragged_batches, tiny
from custom_functions import OneAtATime, WrongForward, once_problem
from hesscope.engines import make_engine
from hesscope.engines.forward_context import NotInForwardMode
from hesscope.engines.forward_mode import ReverseOverForward
from hesscope.engines.forward_rules import FORWARD_OVER_REVERSE, Replacing
from hesscope.losses.cross_entropy import summed_cross_entropy
from oracles import keeping_double, relative

FORWARD = ["forward-over-reverse", "reverse-over-forward"]
EXACT, CASTS, SINGLE = 1e-10, 1e-6, 1e-5
#: Their custom autograd functions have no forward rule.
WITHOUT_FORWARD = {"bloom"}

every_architecture = pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in WITHOUT_FORWARD])
#: Without its casts an architecture is held to more; a few stand for all in a quick run.
CASTING = [
    pytest.param(name, marks=[] if name in ("llama", "gemma2", "mixtral") else [pytest.mark.slow])
    for name, architecture in ARCHITECTURES.items()
    if architecture.casts and name not in WITHOUT_FORWARD
]
each_engine = pytest.mark.parametrize("engine", FORWARD)


@contextmanager
def unused_experts_allowed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The loss does not depend on", hs.HesscopeWarning)
        yield


def products(model: nn.Module, engine: str, count: int = 3, pattern: str = "*", **options: Any) -> tuple[Tensor, Any]:
    problem = hs.causal_lm(model, ragged_batches())
    H = hs.hessian(problem, hs.select(problem, pattern), engine, **options)
    V = H.space.gaussian(1, list(range(count)))
    with unused_experts_allowed():
        return H.space.flatten(H.matmat(V)), H


@every_architecture
def test_in_float64(name: str) -> None:
    model = tiny(name)
    expected, _ = products(model, "reverse-over-reverse")
    for engine in FORWARD:
        found, H = products(model, engine)
        assert relative(found, expected) < (CASTS if ARCHITECTURES[name].casts else EXACT)
        assert H.describe()["engine_choice"].startswith(f"{engine}, as asked: agrees with reverse-over-reverse to")


@pytest.mark.parametrize("name", CASTING)
def test_in_float64_with_the_models_casts_taken_out(name: str) -> None:
    model = tiny(name)
    with keeping_double(model):
        expected, _ = products(model, "reverse-over-reverse", count=2)
        for engine in FORWARD:
            assert relative(products(model, engine, count=2)[0], expected) < EXACT


@each_engine
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_in_float32(name: str, engine: str) -> None:
    model = tiny(name, torch.float32)
    expected, _ = products(model, "reverse-over-reverse")
    assert relative(products(model, engine)[0], expected) < SINGLE


@each_engine
def test_the_finite_difference_agrees_too(engine: str) -> None:
    model = tiny("gpt2")
    assert relative(products(model, "finite-difference", 1)[0], products(model, engine, 1)[0]) < 1e-8


@each_engine
def test_one_vector_or_several_and_parts_of_parameters(engine: str) -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    space = hs.select(problem, {"transformer.h.1.attn.c_attn.weight": [3, 90, 41], "transformer.ln_f.bias": None})
    identity = torch.eye(space.size, dtype=torch.float64)
    expected, H = hs.hessian(problem, space) @ identity, hs.hessian(problem, space, engine)
    assert relative(H @ identity, expected) < EXACT
    assert relative(torch.stack([H @ e for e in identity], 1), expected) < EXACT


@each_engine
def test_with_frozen_dropout(engine: str) -> None:
    """The same masks, for one vector and for several at once."""
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches(), dropout="frozen")
    plain = hs.causal_lm(tiny("gpt2"), ragged_batches())
    space = hs.select(problem, "transformer.h.1.*")
    V = torch.randn(space.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = hs.hessian(problem, space) @ V
    assert relative(hs.hessian(plain, space) @ V, expected) > 1e-2
    H = hs.hessian(problem, space, engine)
    assert relative(H @ V, expected) < EXACT
    assert relative(H @ V[:, 0], expected[:, 0]) < EXACT
    assert H.describe()["engine_choice"].startswith(engine)


@each_engine
def test_rows_that_see_nothing(engine: str) -> None:
    """Behind padding longer than a window a position attends to nothing; torch's own forward rule makes NaN of it."""
    batch = ragged_batches()[0]
    batch["attention_mask"][2, 1:] = 0
    model = tiny("llama4")
    expected, found = [], []
    for result, name in ((expected, "reverse-over-reverse"), (found, engine)):
        H = hs.hessian(hs.causal_lm(model, [batch]), engine=name)
        v = H.space.flatten(H.space.gaussian(0, [0]))
        with unused_experts_allowed():
            result.append(H @ v)
    assert relative(found[0], expected[0]) < CASTS


@each_engine
def test_units(engine: str) -> None:
    """A gradient (3) for each batch once, then a pass and its vectors; and the look at a short sequence before that."""
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    H = hs.hessian(problem, hs.select(problem, "transformer.ln_f.*"), engine)
    v = torch.ones(H.shape[0], 1, dtype=torch.float64)
    spent = []
    for V in (v, v, v.expand(-1, 4)):
        before = H.units
        H @ V
        spent.append(H.units - before)
    a_pass, a_vector = {"forward-over-reverse": (3, 6), "reverse-over-forward": (1, 8)}[engine]
    look = 6 / problem.N * (3 + a_pass + 2 * a_vector + 3 + 2 * 6)  # the first sequence has 6 of the targets
    assert spent == pytest.approx([look + 3 + a_pass + a_vector, a_pass + a_vector, a_pass + 4 * a_vector])


@each_engine
@pytest.mark.parametrize("objective", ["nll", "perplexity"])
def test_after_a_change_of_the_weights(engine: str, objective: str) -> None:
    model = tiny("gpt2")
    problem = hs.causal_lm(model, ragged_batches(), objective=objective)
    space = hs.select(problem, "transformer.ln_f.*")
    H, identity = hs.hessian(problem, space, engine), torch.eye(space.size, dtype=torch.float64)
    before = H @ identity
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(2.0)
    assert relative(H @ identity, hs.hessian(problem, space, "reverse-over-reverse") @ identity) < EXACT
    assert relative(before, H @ identity) > 1e-3


@each_engine
def test_a_loss_without_curvature_or_without_parameters(engine: str) -> None:
    batches = [torch.ones(2, 3).double(), torch.ones(5, 3).double()]
    model = nn.Linear(3, 1, bias=False).double()
    linear = hs.Problem(model, lambda m, x: m(x).mean(), batches, count=len)
    assert not (hs.hessian(linear, engine=engine) @ torch.ones(3, 2, dtype=torch.float64)).any()
    constant = hs.Problem(model, lambda m, x: x.mean(), batches, count=len)
    with pytest.warns(hs.HesscopeWarning, match="The loss does not depend on weight"):
        assert not (hs.hessian(constant, engine=engine) @ torch.ones(3, 2, dtype=torch.float64)).any()
    single = hs.Problem(
        nn.Linear(1, 1, bias=False).double(), lambda m, x: m(x[:, :1]).pow(4).mean(), batches, count=len
    )
    H, w = hs.hessian(single, engine=engine), float(next(single.model.parameters()).detach())
    assert float(H @ torch.ones(1, dtype=torch.float64)) == pytest.approx(12 * w**2, rel=1e-12)


# ---- what forward mode cannot do, or gets wrong


@each_engine
def test_a_model_without_forward_mode_falls_back_and_says_so(engine: str) -> None:
    model = tiny("bloom")
    expected, _ = products(model, "reverse-over-reverse")
    with pytest.warns(hs.HesscopeWarning, match=f"reverse-over-reverse in place of {engine}: an operation"):
        found, H = products(model, engine)
    assert torch.equal(found, expected)
    assert H.describe()["engine"] == engine
    assert H.describe()["engine_choice"].startswith(f"reverse-over-reverse in place of {engine}")


def test_a_wrong_forward_derivative_is_noticed() -> None:
    batches = [(torch.randn(n, 3, generator=torch.Generator().manual_seed(n)).double(),) for n in (2, 5)]
    model = nn.Linear(3, 2).double()
    problem = hs.Problem(model, lambda m, batch: WrongForward.apply(m(*batch)).tanh().mean(), batches, count=lambda b: len(b[0]))  # fmt: skip
    v = torch.ones(8, dtype=torch.float64)
    expected = hs.hessian(problem) @ v
    with pytest.warns(hs.HesscopeWarning, match="differs from reverse-over-reverse by"):
        found = hs.hessian(problem, engine="reverse-over-forward") @ v
    assert torch.equal(found, expected)


def test_without_its_rules_reverse_over_forward_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at a short sequence sees the trap of layer_norm, were it not for the rule."""
    monkeypatch.setattr(ReverseOverForward, "replacements", FORWARD_OVER_REVERSE)
    model = tiny("gpt2")
    with pytest.warns(hs.HesscopeWarning, match="differs from reverse-over-reverse by"):
        found, _ = products(model, "reverse-over-forward")
    assert torch.equal(found, products(model, "reverse-over-reverse")[0])


@each_engine
def test_vectors_that_do_not_go_together_go_one_by_one(engine: str) -> None:
    batches = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)).double() for n in (2, 5)]
    problem = hs.Problem(nn.Linear(3, 2).double(), lambda m, x: OneAtATime.apply(m(x)).mean(), batches, count=len)
    H, V = hs.hessian(problem, engine=engine), torch.eye(8, dtype=torch.float64)
    assert relative(H @ V, hs.hessian(problem) @ V) < EXACT
    assert H.describe()["engine_choice"].startswith(f"{engine}, one vector at a time, for several at once do not run")


@each_engine
def test_the_first_look_is_left_out_where_there_is_nothing_to_hold_it_to(engine: str) -> None:
    """A function whose gradient cannot be differentiated again has no forward mode either."""
    problem, _ = once_problem()
    with (
        pytest.warns(hs.HesscopeWarning, match="in place of"),
        pytest.raises(hs.HesscopeError, match="cannot be differentiated again"),
    ):
        hs.hessian(problem, engine=engine) @ torch.ones(1, dtype=torch.float64)


def test_a_refusal_is_in_words() -> None:
    problem = hs.causal_lm(tiny("bloom"), ragged_batches())
    space = hs.select(problem, "*.bias")
    with pytest.raises(NotInForwardMode, match="an operation of the model does not run in forward mode"):
        make_engine("forward-over-reverse").linearize(problem, 0, space).add_product(
            space.gaussian(0, [0]), space.zeros()
        )


def test_the_cross_entropy_is_one_operation_to_function_modes() -> None:
    z, y = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 4, -100])
    with Replacing(FORWARD_OVER_REVERSE):
        replaced = summed_cross_entropy(z, y)
    assert "NllLoss" in replaced.grad_fn.name()
    assert "NllLoss" not in summed_cross_entropy(z, y).grad_fn.name()
    torch.testing.assert_close(replaced, F.cross_entropy(z, y, reduction="sum"))
