"""Every loss with every engine that takes the model, against dense derivatives: convolutions, norms, targets that do not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hesscope as hs
from hesscope.losses import CrossEntropyLoss, SquaredErrorLoss
from oracles import derivatives, relative

F64 = torch.float64
ENGINES = ("reverse-over-reverse", "forward-over-reverse", "reverse-over-forward")
LOSSES = ("classes", "probabilities", "numbers", "callable")
EXACT = 1e-10


class Net(nn.Module):
    """Images [B, 2, 4, 4] to three numbers, through every kind of norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.GroupNorm(2, 4), nn.Flatten(),
            nn.Linear(16, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def outputs_risk(kind: str, z: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """A batch's summed loss and its count, written down."""
    if kind == "classes":
        return F.cross_entropy(z, y, reduction="sum"), int((y != -100).sum())
    if kind == "probabilities":
        return -(y * z.log_softmax(1)).sum(), len(y)
    if kind == "numbers":
        return (z - y).square().sum(), y.numel()
    return (z[:, 0] * z[:, 1]).sin().sum() + z.logsumexp(1).sum(), len(y)


def made(kind: str) -> tuple[hs.Problem, Tensor, list[nn.Parameter]]:
    """A problem of three batches, the last of which counts nothing where targets can say so; its risk; its parameters."""
    torch.manual_seed(0)
    model = Net().double()
    for _ in range(3):
        model(torch.randn(8, 2, 4, 4, dtype=F64))  # running means and variances
    model.eval()
    g = torch.Generator().manual_seed(1)
    batches: list[Any] = []
    for rows in (3, 2, 2):
        x = torch.randn(rows, 2, 4, 4, generator=g, dtype=F64)
        y = (
            torch.randint(3, (rows,), generator=g)
            if kind == "classes"
            else torch.randn(rows, 3, generator=g, dtype=F64)
        )
        batches.append((x, y.softmax(1) * 0.7 if kind == "probabilities" else y))
    if kind == "classes":
        batches[0][1][1] = -100
        batches[2][1][:] = -100
    if kind == "callable":
        problem = hs.Problem(
            model,
            lambda net, batch: outputs_risk(kind, net(batch[0]), batch[1])[0] / len(batch[1]),
            batches,
            count=lambda batch: len(batch[1]),
        )
    else:
        problem = hs.Problem(model, SquaredErrorLoss() if kind == "numbers" else CrossEntropyLoss(), batches)
    totals, counts = zip(*(outputs_risk(kind, model(x), y) for x, y in batches), strict=True)
    return problem, sum(totals) / sum(counts), list(model.parameters())


@pytest.mark.parametrize("kind", LOSSES)
def test_hessians(kind: str) -> None:
    problem, risk, parameters = made(kind)
    expected = derivatives(risk, parameters)
    assert float(problem.risk()) == pytest.approx(expected.risk, rel=1e-12)
    for engine in ENGINES:
        assert relative(hs.hessian(problem, engine=engine).to_dense(), expected.hessian) < EXACT, engine
    H = hs.hessian(problem, engine="finite-difference")
    assert relative(H.to_dense(), expected.hessian) < max(1e-8, H.describe()["engine_error"])
    for route in ("weights", "positions"):
        assert relative(hs.block(hs.hessian(problem), route).matrix, expected.hessian) < EXACT, route


@pytest.mark.parametrize("kind", LOSSES[:3])
def test_gauss_newton_matrices(kind: str) -> None:
    problem, _, parameters = made(kind)
    model, total = problem.model, sum(problem.counts)
    expected = torch.zeros(hs.ggn(problem).shape, dtype=F64)
    for x, y in problem.batches:
        z = model(x)
        rows = [torch.autograd.grad(e, parameters, retain_graph=True) for e in z.flatten()]
        J = torch.stack([torch.cat([d.flatten() for d in row]) for row in rows])
        inner = torch.autograd.functional.hessian(
            lambda flat, y=y, z=z: outputs_risk(kind, flat.view(z.shape), y)[0], z.detach().flatten()
        )
        expected += J.T @ inner @ J / total
    assert relative(hs.ggn(problem).to_dense(), expected) < EXACT
    assert relative(hs.block(hs.ggn(problem)).matrix, expected) < EXACT
    diagonal = hs.diagonal(hs.ggn(problem), "exact").flat()
    torch.testing.assert_close(diagonal, expected.diagonal(), rtol=0, atol=EXACT * float(expected.norm()))
