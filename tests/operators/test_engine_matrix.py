"""Every operator by every engine on every architecture: the matrix written down whole, or a refusal in words."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from test_through_outputs_architectures import CASTS, EXACT, MODELS, OPERATORS, problem_of, shift_of
from torch import Tensor

import hesscope as hs
from architectures import ENCODER_DECODERS, some_of_everything, tiny, unused_experts_allowed
from hesscope.engines import ENGINES
from oracles import causal_lm, linearized_lm, relative

THROUGH = ["reverse-over-reverse", "streamed"]
FORWARD = ["forward-over-reverse", "reverse-over-forward"]
#: Its custom autograd function has no forward rule.
WITHOUT_FORWARD = {"bloom"}
#: The most that the finite difference may state as its error, without and with casts to float32.
DIFFERENCE = (1e-8, 0.2)

every_architecture = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "gpt2" else [pytest.mark.slow]) for name in MODELS]
)


def case(name: str) -> tuple[hs.Problem, hs.Space, Tensor]:
    """A problem of ragged batches, two coordinates of every parameter, and two vectors."""
    model = tiny(name)
    problem = problem_of(name, model)
    space = hs.select(problem, some_of_everything(model))
    return problem, space, vectors(space)


def vectors(space: hs.Space) -> Tensor:
    return torch.randn(space.size, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def told(name: str, engine: str) -> AbstractContextManager[Any]:
    """What is said of an architecture where an engine cannot have it, or of experts that no token goes to."""
    if engine == "streamed" and name in ENCODER_DECODERS:
        return pytest.raises(
            hs.HesscopeError, match=r"hidden states to be all that ties .* depends on a selected param"
        )
    if engine in FORWARD and name in WITHOUT_FORWARD:
        return pytest.warns(hs.HesscopeWarning, match=f"reverse-over-reverse in place of {engine}: an operation")
    return unused_experts_allowed()


def check(name: str, engine: str, A: hs.Operator, V: Tensor, expected: Tensor) -> None:
    """The product is as near as rounding allows, a finite difference as it says, unless it is refused."""
    casts = bool(MODELS[name].casts)
    with told(name, engine):
        error, stated = relative(A @ V, expected), A.describe()["engine_error"]
        assert error < (stated or (CASTS if casts else EXACT)), (A.describe()["operator"], engine)
        assert 0 <= stated < DIFFERENCE[casts]
        assert (stated > 0) == (engine == "finite-difference")


@every_architecture
def test_the_hessian(name: str) -> None:
    problem, space, V = case(name)
    expected = causal_lm(problem.model, problem.batches, space, shift_of(name)).hessian @ V
    for engine in ENGINES:
        check(name, engine, hs.hessian(problem, space, engine), V, expected)


@every_architecture
def test_matrices_through_the_outputs(name: str) -> None:
    problem, space, V = case(name)
    dense = linearized_lm(problem.model, problem.batches, space, shift_of(name))
    for (make, expected), engine in itertools.product(OPERATORS.values(), THROUGH):
        check(name, engine, make(problem, space, engine=engine), V, expected(dense) @ V)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_a_decoder_whose_encoder_is_constant_is_streamed(name: str) -> None:
    """T5 hands every block of the decoder the same bias for positions, so that it is left out."""
    model = tiny(name)
    problem = problem_of(name, model)
    inside = {n: p for n, p in some_of_everything(model).items() if "decoder." in n and "relative" not in n}
    space = hs.select(problem, inside)
    expected = causal_lm(model, problem.batches, space, shift=0).hessian, linearized_lm(model, problem.batches, space, 0).ggn()  # fmt: skip
    for make, dense in zip((hs.hessian, hs.ggn), expected, strict=True):
        found = make(problem, space, engine="streamed") @ vectors(space)
        assert relative(found, dense @ vectors(space)) < (CASTS if MODELS[name].casts else EXACT)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine not in THROUGH])
def test_a_matrix_through_the_outputs_has_no_other_engine(engine: str) -> None:
    problem, space, _ = case("gpt2")
    for make, _ in OPERATORS.values():
        with pytest.raises(hs.HesscopeError, match=f"{', '.join(['auto', THROUGH[0]])} or streamed .*{engine}"):
            make(problem, space, engine=engine)
