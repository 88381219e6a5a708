"""Classification and regression, against closed forms, on batches of unequal sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hesscope as hs
from oracles import cross_entropy_hessian, derivatives, relative, squared_error_hessian

Batch = tuple[Tensor, Tensor]


def inputs(*counts: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, generator=g, dtype=torch.float64) for n in counts]


def linear(outputs: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, outputs, bias=False).double()


def matrix(problem: hs.Problem) -> Tensor:
    H = hs.hessian(problem)
    return H @ torch.eye(H.shape[0], dtype=H.dtype)


def test_squared_error_of_a_linear_layer() -> None:
    batches = [(x, torch.ones(len(x), 3, dtype=torch.float64)) for x in inputs(2, 5, 1)]
    problem = hs.supervised(linear(3), batches, loss="mse")
    assert problem.N == 8 * 3
    assert relative(matrix(problem), squared_error_hessian(torch.cat(inputs(2, 5, 1)), 3)) < 1e-12
    predicted = linear(3)(torch.cat(inputs(2, 5, 1))).detach()
    assert problem.risk() == pytest.approx(float((predicted - 1).square().mean()), rel=1e-12)


def test_cross_entropy_of_a_linear_layer() -> None:
    """Examples labelled -100 do not count."""
    targets = [torch.tensor([0, 2]), torch.tensor([1, -100, 1, 0, 2]), torch.tensor([-100])]
    model, batches = linear(3), list(zip(inputs(2, 5, 1), targets, strict=True))
    problem = hs.supervised(model, batches)
    counted = torch.cat(targets) != -100
    X = torch.cat(inputs(2, 5, 1))[counted]
    logits = model(X).detach()
    assert problem.counts == (2, 4, 0)
    assert relative(matrix(problem), cross_entropy_hessian(X, logits)) < 1e-12
    log_p = logits.log_softmax(-1).gather(1, torch.cat(targets)[counted][:, None])
    assert problem.risk() == pytest.approx(-float(log_p.mean()), rel=1e-12)


def test_cross_entropy_with_class_probabilities() -> None:
    """Its Hessian does not depend on the targets."""
    targets = [torch.randn(len(x), 3, dtype=torch.float64).softmax(-1) for x in inputs(2, 5)]
    model, batches = linear(3), list(zip(inputs(2, 5), targets, strict=True))
    X = torch.cat(inputs(2, 5))
    problem = hs.supervised(model, batches)
    assert problem.N == 7
    assert relative(matrix(problem), cross_entropy_hessian(X, model(X).detach())) < 1e-12


def test_class_probabilities_in_half_precision_are_raised_before_they_are_summed() -> None:
    """Ten of them, each rounded to bfloat16, whose sum bfloat16 would round again."""
    x, model = inputs(40)[0], linear(10)
    q = (3.0 * torch.randn(40, 10, generator=torch.Generator().manual_seed(1))).softmax(-1).bfloat16()
    problem = hs.supervised(model, [(x, q)])
    G, H = (made(problem) @ torch.eye(40, dtype=torch.float64) for made in (hs.ggn, hs.hessian))
    assert relative(G, H) < 1e-6
    E = hs.empirical_fisher(problem) @ torch.eye(40, dtype=torch.float64)
    wide = q.double()
    rows = wide.sum(-1, keepdim=True) * model(x).detach().softmax(-1) - wide
    gradients = torch.einsum("ij,ik->ijk", rows, x).flatten(1)
    assert relative(E, gradients.T @ gradients / 40) < 1e-6


HALF: dict[str, tuple[str, torch.dtype, Tensor]] = {
    "classes, sum beyond float16": ("cross_entropy", torch.float16, torch.zeros(4000).long()),
    "classes": ("cross_entropy", torch.bfloat16, torch.zeros(4000).long()),
    "probabilities": ("cross_entropy", torch.bfloat16, torch.full((4000, 3), 1 / 3)),
    "probabilities in bfloat16": ("cross_entropy", torch.bfloat16, torch.full((4000, 3), 1 / 3).bfloat16()),
    "squares beyond float16": ("mse", torch.float16, torch.full((4000, 3), 400.0).half()),
    "squares": ("mse", torch.bfloat16, torch.ones(4000, 3).bfloat16()),
}


@pytest.mark.parametrize("case", HALF)
def test_half_precision_outputs_are_raised_before_they_are_summed(case: str) -> None:
    """65504 is the largest number in float16."""
    loss, dtype, targets = HALF[case]
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    with torch.no_grad():
        model.weight.mul_(60.0)
    batch = (torch.randn(4000, 4).to(dtype), targets)
    problem = hs.supervised(model, [batch], loss=loss)
    outputs = model(batch[0]).detach().double()
    wide = targets.double() if targets.is_floating_point() else targets
    exact = F.cross_entropy(outputs, wide) if loss == "cross_entropy" else F.mse_loss(outputs, wide)
    assert problem.total(0)[0].dtype == torch.float32
    assert problem.risk() == pytest.approx(float(exact), rel=1e-5)
    if targets.dim() == 1:
        assert problem.risk() * 4000 > 65504


class Positions(nn.Module):
    """Class scores at several positions, [B, C, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv1d(2, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x).tanh()


def test_cross_entropy_over_positions_counts_each_position() -> None:
    torch.manual_seed(0)
    model = Positions().double()
    batches = [(torch.randn(n, 2, 5).double(), torch.randint(0, 3, (n, 4))) for n in (1, 3)]
    batches[1][1][2, 1:] = -100
    problem = hs.supervised(model, batches)
    assert problem.counts == (4, 9)
    total = sum(torch.nn.functional.cross_entropy(model(x), y, reduction="sum") for x, y in batches)
    assert isinstance(total, Tensor)
    assert relative(matrix(problem), derivatives(total / 13, list(model.parameters())).hessian) < 1e-10


class Wrapped(nn.Module):
    """Takes its inputs in parts and returns an object with logits, as Hugging Face classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.map = linear(3)

    def forward(self, x: Tensor, scale: Tensor) -> Any:
        return SimpleNamespace(logits=self.map(x * scale))


@pytest.mark.parametrize("form", [tuple, list, lambda parts: dict(zip(("x", "scale"), parts, strict=True))])
def test_inputs_in_parts_and_outputs_with_logits(form: Any) -> None:
    scale = torch.tensor(2.0, dtype=torch.float64)
    targets = [torch.zeros(len(x), 3, dtype=torch.float64) for x in inputs(2, 5)]
    batches = [(form((x, scale)), y) for x, y in zip(inputs(2, 5), targets, strict=True)]
    expected = squared_error_hessian(2 * torch.cat(inputs(2, 5)), 3)
    assert relative(matrix(hs.supervised(Wrapped(), batches, loss="mse")), expected) < 1e-12


def test_squared_error_does_not_broadcast() -> None:
    problem = hs.supervised(linear(1), [(inputs(3)[0], torch.zeros(3, dtype=torch.float64))], loss="mse")
    with pytest.raises(hs.HesscopeError, match=r"of one shape for a squared error, got \[3, 1\] and \[3\]"):
        problem.risk()


def test_perplexity_of_a_classifier() -> None:
    model, batches = linear(3), [(x, torch.zeros(len(x)).long()) for x in inputs(2, 5)]
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    dense = derivatives(torch.nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    assert relative(matrix(hs.supervised(model, batches, objective="perplexity")), dense.perplexity_hessian) < 1e-10


def test_a_loss_object_is_taken_as_it_is() -> None:
    class Absolute:
        def total(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
            return (model(batch[0]) - batch[1]).abs().pow(3).sum(), 10

    model, batch = linear(1), (inputs(3)[0], torch.zeros(3, 1, dtype=torch.float64))
    dense = derivatives((model(batch[0]) - batch[1]).abs().pow(3).sum() / 10, list(model.parameters()))
    assert relative(matrix(hs.supervised(model, [batch], loss=Absolute())), dense.hessian) < 1e-10


def test_complaints() -> None:
    batch = (inputs(1)[0], torch.zeros(1).long())
    with pytest.raises(
        hs.HesscopeError, match="Expected loss to be one of cross_entropy, mse, or an object, got 'hinge'"
    ):
        hs.supervised(linear(1), [batch], loss="hinge")
    with pytest.raises(hs.HesscopeError, match="wrap a batch in a list"):
        hs.supervised(linear(1), torch.ones(2, 2))
    with pytest.raises(hs.HesscopeError, match="without active dropout"):
        hs.supervised(nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.1)), [batch])
