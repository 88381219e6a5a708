"""Finite differences agree with right blocks within their own error, and find wrong derivatives."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.studies.differences import Differences
from oracles import causal_lm

GRADIENT, LOSS = "gradient differences", "loss differences"


def outcomes(result: Any) -> dict[str, bool]:
    return dict(zip(result.names, result.outcomes(), strict=True))


def network(act: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 2)).double()


def examples() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(b, 3, generator=g).double(), torch.randint(2, (b,), generator=g)) for b in (4, 1)]


@pytest.mark.parametrize("objective", ["nll", "perplexity"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_right_block_passes_tightly(objective: str, dtype: torch.dtype) -> None:
    batches = [(x.to(dtype), y) for x, y in examples()]
    problem = hs.supervised(network(nn.Tanh()).to(dtype), batches, objective=objective)
    result = hs.cross_check(problem)
    assert result.passed, result.summary()
    assert float(result.limits[0]) < 1e-8
    assert float(result.limits[1]) < 1e-4
    assert result.names == [GRADIENT, LOSS]
    assert result.provenance["problem"]["fingerprint"] == problem.fingerprint


@pytest.mark.parametrize(("architecture", "gradient_limit", "loss_limit"), [("gpt2", 1e-8, 1e-4), ("llama", 1e-2, 0.3)])
def test_the_limit_follows_the_models_own_rounding(architecture: str, gradient_limit: float, loss_limit: float) -> None:
    """Llama's RMSNorm casts to float32, whatever the weights are."""
    problem = hs.causal_lm(tiny(architecture), ragged_batches())
    names = [n for n, _ in problem.model.named_parameters()]
    name = next(n for n in names if "1." in n and "norm" not in n and "ln" not in n)
    result = hs.cross_check(problem, hs.select(problem, {name: list(range(4))}), columns=2, entries=3)
    assert result.passed, result.summary()
    gradients, losses = result.limits.tolist()
    assert gradients < gradient_limit
    assert losses < loss_limit
    assert (gradients > 1e-8) == (architecture == "llama")


def test_the_stated_error_covers_the_true_one() -> None:
    model = tiny("gpt2")
    problem = hs.causal_lm(model, ragged_batches())
    space = hs.select(problem, "transformer.ln_f.bias")
    exact, differences = causal_lm(model, ragged_batches(), space).hessian, Differences(problem, space, 0)
    for j in range(0, 8, 3):
        column = differences.column(j)
        assert float((column.value - exact[:, j]).norm()) <= column.error < 1e-8
    for i, j in ((0, 0), (3, 5), (7, 2)):
        entry = differences.entry(i, j)
        assert float((entry.value - exact[i, j]).abs()) <= entry.error < 1e-4


class WrongSecond(torch.autograd.Function):
    """The square with its gradient, whose own derivative is 1% off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return u * (2 * x.detach() + 2.02 * (x - x.detach()))


class WrongFirst(torch.autograd.Function):
    """The identity with a gradient that is 1% off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        return 1.01 * u


class OffLoss:
    """A loss whose gradient, and with it every derivative of the gradient, is 1% off."""

    def total(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        return WrongFirst.apply(nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")), len(batch[1])


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def test_a_wrong_second_derivative_is_found() -> None:
    problem = hs.supervised(network(Applied(WrongSecond)), examples())
    assert outcomes(hs.cross_check(problem)) == {GRADIENT: False, LOSS: False}


def test_a_wrong_gradient_is_found_by_the_loss_alone() -> None:
    problem = hs.Problem(network(nn.Tanh()), OffLoss(), examples())
    assert outcomes(hs.cross_check(problem)) == {GRADIENT: True, LOSS: False}


def test_a_given_block_is_checked_as_it_is() -> None:
    problem = hs.supervised(network(nn.Tanh()).float(), [(x.float(), y) for x, y in examples()])
    space = hs.select(problem, "0.weight")
    block = hs.block(hs.hessian(problem, space))
    result = hs.cross_check(problem, space, block=block)
    assert result.passed, result.summary()
    assert result.products == 0
    j = int(block.matrix.norm(dim=0).argmax())
    wrong = block.matrix.clone()
    wrong[j, j] *= 1.001
    off = hs.cross_check(problem, space, block=dataclasses.replace(block, matrix=wrong))
    assert outcomes(off) == {GRADIENT: False, LOSS: False}
    assert f"0.weight[{j // 3}, {j % 3}]" in off.explanations[0]


def test_a_block_of_something_else_is_refused() -> None:
    problem = hs.supervised(network(nn.Tanh()), examples())
    space = hs.select(problem, "0.weight")
    block = hs.block(hs.hessian(problem, space))
    other = hs.supervised(problem.model, examples()[:1])
    with pytest.raises(hs.HesscopeError, match="its fingerprint is another"):
        hs.cross_check(other, space, block=block)
    with pytest.raises(hs.HesscopeError, match="its coordinates are others"):
        hs.cross_check(problem, hs.select(problem, "2.weight"), block=block)
    with pytest.raises(hs.HesscopeError, match=r"Expected block= to be a block, .* got Tensor"):
        hs.cross_check(problem, space, block=block.matrix)  # type: ignore[arg-type]
    with pytest.raises(hs.HesscopeError, match="at least one column and one entry to check, got 0 and 12"):
        hs.cross_check(problem, space, columns=0)
    for objective in ("nll", "perplexity"):
        likewise = problem.related(objective=objective)
        gauss_newton = hs.block(hs.ggn(likewise, space))
        with pytest.raises(hs.HesscopeError, match=r"a block of the Hessian, .* got one of 'ggn'"):
            hs.cross_check(likewise, space, block=gauss_newton)
        assert hs.cross_check(likewise, space, block=hs.block(hs.hessian(likewise, space))).passed


def test_a_check_that_can_say_little_says_so() -> None:
    class Coarse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh() + (x.detach() * 100).round() / 100

    problem = hs.supervised(network(Coarse()), examples())
    with pytest.warns(hs.HesscopeWarning, match="passing says little"):
        hs.cross_check(problem, hs.select(problem, "0.weight"))


def test_a_zero_hessian_and_a_frozen_mask() -> None:
    flat = hs.Problem(nn.Linear(2, 1).double(), lambda m, x: m(x).mean(), [torch.ones(3, 2).double()], count=len)
    assert hs.cross_check(flat).passed
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)).double()
    assert hs.cross_check(hs.supervised(model, examples(), dropout="frozen")).passed


def test_the_same_seed_checks_the_same_columns() -> None:
    problem = hs.supervised(network(nn.Tanh()), examples())
    one, two, other = (hs.cross_check(problem, columns=4, entries=4, seed=s).provenance["options"] for s in (1, 1, 2))
    assert one == two
    assert one["columns"] != other["columns"]
    assert len(one["columns"]) == len(one["entries"]) == 4
