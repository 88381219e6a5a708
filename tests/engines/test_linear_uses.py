"""Calls that look like linear layers and are not y = x W^T + bias: everything that reads a layer's rows equals products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hesscope as hs
from hesscope.operators.batch_plan import watch_uses
from oracles import derivatives, relative

EXACT = 1e-10
#: Width of the square weight W, so that it can also be an input, and sequences and positions of a batch.
C, VOCABULARY = 3, 5

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def _seen_by_another(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, W, b) + F.linear(W, W).sum()


class OwnLinear(torch.autograd.Function):
    """x W^T with a backward pass of its own, as fused kernels have it: nothing beside W is differentiated through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        return F.linear(x, W)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, Tensor]:
        x, W = ctx.saved_tensors
        return gy @ W, gy.flatten(0, -2).mT @ x.flatten(0, -2)


#: Of positions x [P, C], a weight W [C, C] and a bias b [C].
LOOKALIKES: dict[str, Call] = {
    "addmm, alpha": lambda x, W, b: torch.addmm(b, x, W, alpha=3),
    "addmm, alpha and beta": lambda x, W, b: torch.addmm(b, x, W, beta=2, alpha=0.5),
    "addmm, weight as the sum's start": lambda x, W, b: torch.addmm(W, x[:C], W),
    "addmm, weight twice": lambda x, W, b: torch.addmm(b, W, W),
    "addmm, weight as the input": lambda x, W, b: torch.addmm(b, W, x[:C]),
    "addmm, as a method": lambda x, W, b: b.expand(len(x), C).addmm(x, W, alpha=2),
    "linear, weight twice": lambda x, W, b: F.linear(W, W, b),
    "linear, weight's row as the bias": lambda x, W, b: F.linear(x, W, W[0]),
    "linear, weight twice by keyword": lambda x, W, b: F.linear(W, weight=W, bias=b),
    "linear, here and elsewhere": _seen_by_another,
    "baddbmm": lambda x, W, b: torch.baddbmm(b.expand(1, len(x), C), x[None], W[None], alpha=2)[0],
    "addmv": lambda x, W, b: torch.addmv(b, W, x[0], alpha=2)[None],
    "linear, in an autograd function": lambda x, W, b: OwnLinear.apply(x, W),
    "linear, in an autograd function and outside": lambda x, W, b: F.linear(x, W, b) + OwnLinear.apply(x.sin(), W),
    "einsum": lambda x, W, b: torch.einsum("pc,cr,rs->ps", x, W, W),
}
LINEAR: dict[str, Call] = {
    "linear": F.linear,
    "linear, bias by keyword": lambda x, W, b: F.linear(x, W, bias=b),
    "linear, by keyword": lambda x, W, b: F.linear(input=x, weight=W, bias=b),
    "addmm": lambda x, W, b: torch.addmm(b, x, W),
    "addmm, beta": lambda x, W, b: torch.addmm(b, x, W, beta=2),
    "addmm, alpha of one": lambda x, W, b: torch.addmm(b, x, W, alpha=1),
    "addmm, by keyword": lambda x, W, b: torch.addmm(input=b, mat1=x, mat2=W),
}


class Layer(nn.Module):
    """One call of positions, a weight and a bias, then tanh; the bias is used in any case."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.call = call
        self.weight = nn.Parameter(torch.randn(C, C, generator=g, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(C, generator=g, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.call(x, self.weight, self.bias) + self.bias.square()).tanh()


def problem_of(call: Call) -> hs.Problem:
    """A regression over ragged batches."""
    model, g = Layer(call), torch.Generator().manual_seed(1)
    batches = []
    for positions in (3, 5):
        x = torch.randn(positions, C, generator=g, dtype=torch.float64)
        y = torch.randn(model(x).shape, generator=g, dtype=torch.float64)
        batches.append((x, y))
    return hs.supervised(model, batches, loss="mse")


def dense_hessian(problem: hs.Problem, names: tuple[str, ...]) -> Tensor:
    parts = [problem.loss.total(problem.model, batch) for batch in problem.batches]
    parameters = dict(problem.model.named_parameters())
    risk = torch.stack([total for total, _ in parts]).sum() / sum(count for _, count in parts)
    return derivatives(risk, [parameters[name] for name in names]).hessian


@pytest.mark.parametrize("route", ["weights", "auto"])
@pytest.mark.parametrize("name", LOOKALIKES | LINEAR)
def test_block_and_exact_diagonal(name: str, route: str) -> None:
    problem = problem_of((LOOKALIKES | LINEAR)[name])
    H = hs.hessian(problem, hs.select(problem, "weight", "bias"))
    expected = dense_hessian(problem, ("weight", "bias"))
    assert relative(H @ torch.eye(len(expected), dtype=torch.float64), expected) < EXACT
    assert relative(hs.block(H, route=route).matrix, expected) < EXACT
    assert relative(hs.diagonal(H, method="exact").flat(), expected.diagonal()) < EXACT


class LanguageModel(nn.Module):
    """Embedding, one call of all positions, head."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.layer = Layer(call)
        self.embed, self.head = nn.Embedding(VOCABULARY, C), nn.Linear(C, VOCABULARY, bias=False)
        with torch.no_grad():
            for p in (self.embed.weight, self.head.weight):
                p.copy_(torch.randn(p.shape, generator=g))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        y = self.layer(x.flatten(0, 1))
        logits: Tensor = self.head(y.reshape(x.shape) if len(y) == input_ids.numel() else x + y.mean(0))
        return logits


def language_problem(call: Call) -> tuple[hs.Problem, hs.Space]:
    g = torch.Generator().manual_seed(3)
    batches = [{"input_ids": torch.randint(VOCABULARY, shape, generator=g)} for shape in ((2, 4), (1, 3))]
    problem = hs.causal_lm(LanguageModel(call).double(), batches)
    return problem, hs.select(problem, "layer.weight", "head.weight")


def identity_product(H: Any) -> Tensor:
    result: Tensor = H @ torch.eye(H.shape[0], dtype=torch.float64)
    return result


SOME = ("addmm, alpha", "linear, weight twice", "linear, in an autograd function and outside", "addmm, beta")


@pytest.mark.parametrize("name", SOME)
def test_draws_of_a_hessian_s_diagonal(name: str) -> None:
    """The mean over draws against the diagonal by products."""
    problem, space = language_problem((LOOKALIKES | LINEAR)[name])
    H: Any = hs.hessian(problem, space)
    draws = torch.stack([space.flatten(H.probe_diagonal(1, k))[:, 0] for k in range(200)])
    exact = identity_product(H).diagonal()
    z = (draws.mean(0) - exact) / (draws.std(0) / 200**0.5).clamp(min=1e-10)
    assert float(z.abs().max()) < 4.5


@pytest.mark.parametrize("name", SOME)
def test_block_of_a_ggn_and_of_an_empirical_fisher_matrix(name: str) -> None:
    problem, space = language_problem((LOOKALIKES | LINEAR)[name])
    for made in (hs.ggn(problem, space), hs.empirical_fisher(problem, space, per="sequence")):
        expected = identity_product(made)
        assert relative(hs.block(made).matrix, expected) < EXACT
        assert relative(hs.diagonal(made, method="exact").flat(), expected.diagonal()) < EXACT


@pytest.mark.parametrize("name", SOME)
def test_draws_of_a_ggn_s_diagonal(name: str) -> None:
    problem, space = language_problem((LOOKALIKES | LINEAR)[name])
    G: Any = hs.ggn(problem, space)
    draws = torch.stack([space.flatten(G.draw_diagonal(1, k))[:, 0] for k in range(200)])
    exact = identity_product(G).diagonal()
    z = (draws.mean(0) - exact) / (draws.std(0) / 200**0.5).clamp(min=1e-10)
    assert float(z.abs().max()) < 4.5


@pytest.mark.parametrize("name", LOOKALIKES)
def test_kronecker_factors_refuse_what_is_no_linear_layer(name: str) -> None:
    problem = problem_of(LOOKALIKES[name])
    with pytest.raises(
        hs.HesscopeError, match="Expected weights of linear layers for K-FAC, but weight is used by something"
    ):
        hs.kfac(problem, hs.select(problem, "weight"))


@pytest.mark.parametrize("name", LINEAR)
def test_kronecker_factors_of_linear_layers(name: str) -> None:
    """With corrected eigenvalues, the trace is that of the Fisher matrix for the same labels."""
    problem, space = language_problem(LINEAR[name])
    expected = identity_product(hs.fisher(problem, space, seed=0)).trace()
    found = identity_product(hs.kfac(problem, space, corrected=True, seed=0)).trace()
    assert float(found) == pytest.approx(float(expected), rel=EXACT)


def test_what_a_call_is_recorded_as() -> None:
    for name, call in (LOOKALIKES | LINEAR).items():
        problem = problem_of(call)
        uses = watch_uses(problem, 0, hs.select(problem, "weight"))["weight"]
        assert (uses is not None) == (name in LINEAR)
        assert uses is None or [use.unit_axis for use in uses] == [int(name.startswith("addmm"))]
