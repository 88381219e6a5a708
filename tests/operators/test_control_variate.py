"""The Gauss-Newton matrix as control variate: each sample is what its formula says, and the estimates are unbiased."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.algorithms.diagonals.control_variate import cost, labels_for
from oracles import Batch, relative

F64 = torch.float64
EXACT = 1e-10
LAYERS = [("llama", "*.1.self_attn.v_proj.weight"), ("gpt2", "*.h.1.mlp.c_proj.weight[:, :8]")]
layers = pytest.mark.parametrize(("name", "pattern"), LAYERS)


def hessian(name: str, pattern: str, batches: list[Batch] | None = None, **more: Any) -> Any:
    problem = hs.causal_lm(tiny(name), batches or ragged_batches())
    return hs.hessian(problem, hs.select(problem, pattern), **more)


def classifier(examples: int = 40, hidden: int = 0, inputs: int = 12) -> Any:
    """The Hessian of a linear model, for which H = G, or of one with a hidden layer; in two unequal batches."""
    torch.manual_seed(0)
    x, y = torch.randn(examples, inputs, dtype=F64), torch.randint(3, (examples,))
    kinds = [nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 3)] if hidden else [nn.Linear(inputs, 3)]
    model = nn.Sequential(*kinds).to(F64)
    cut = examples // 4
    return hs.hessian(hs.supervised(model, [(x[:cut], y[:cut]), (x[cut:], y[cut:])]))


def flat(H: hs.Operator, V: dict[str, Tensor]) -> Tensor:
    return H.space.flatten(V)


class Linear(nn.Module):
    """A language model whose logits are linear in its one trained weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(200, 60), nn.Linear(60, 3, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(input_ids))
        return logits


def linear() -> Any:
    """Its Hessian over 64 sequences of one target."""
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(200)[:64], torch.randint(3, (64,))], 1)
    problem = hs.causal_lm(Linear().double(), [{"input_ids": ids}])
    return hs.hessian(problem, hs.select(problem, "head.weight"))


# ---- the samples


@layers
@pytest.mark.parametrize("microbatch", [None, 1])
def test_products_and_draws_are_those_of_the_gauss_newton_matrix(
    name: str, pattern: str, microbatch: int | None
) -> None:
    """Ragged batches with labels of -100, whole and in microbatches."""
    H = hessian(name, pattern, microbatch=microbatch)
    G = hs.ggn(H.problem, H.space)
    v = H.space.gaussian(0, range(2))
    assert relative(flat(H, H.gauss_newton_product(v)), flat(G, G.matmat(v))) < EXACT
    assert relative(flat(H, H.draw_gauss_newton(3, 4)), flat(G, G.draw_diagonal(3, 4))) < EXACT
    assert H.products == 3


def test_of_a_perplexity() -> None:
    """exp(R) (G + g g^T): the difference from its Hessian is exp(R) (H - G), and the draws are unbiased for its diagonal."""
    of_risk: Any = hessian("llama", LAYERS[0][1])
    problem = of_risk.problem.related(objective="perplexity")
    H, G = hs.hessian(problem, of_risk.space), hs.ggn(problem, of_risk.space)
    v = H.space.gaussian(0, [0])
    assert relative(flat(H, H.gauss_newton_product(v)), flat(G, G.matmat(v))) < EXACT
    square = flat(H, of_risk.risk_and_gradient()[1]).square()
    expected = math.exp(problem.risk()) * (flat(H, of_risk.draw_gauss_newton(1, 2)) + square)
    assert relative(flat(H, H.draw_gauss_newton(1, 2)), expected) < EXACT
    assert H.products == 2
    assert hs.diagonal(H, "control-variate", budget=6).products == 6


@pytest.mark.parametrize("labels", [1, 3])
def test_a_sample_is_its_formula(labels: int) -> None:
    from hesscope.algorithms.diagonals import Limits
    from hesscope.algorithms.diagonals.control_variate import ControlVariate

    H = classifier(hidden=5)
    difference = H.to_dense() - hs.ggn(H.problem, H.space).to_dense()
    run, expected = ControlVariate(H, Limits(100), 7, labels), []
    for number in range(2):
        z = flat(H, H.space.rademacher(7, [f"control-variate/{number}"]))[:, 0]
        draws = [flat(H, H.draw_gauss_newton(7, labels * number + i))[:, 0] for i in range(labels)]
        expected.append(z * (difference @ z) + sum(draws) / labels)
        assert relative(flat(H, run.draw(number))[:, 0], expected[-1]) < EXACT
    assert not torch.allclose(*expected)


# ---- estimates


@layers
def test_estimates_are_unbiased(name: str, pattern: str) -> None:
    H = hessian(name, pattern)
    d = H.to_dense().diagonal()
    found = hs.diagonal(H, "control-variate", budget=360, seed=9)
    assert (found.products, found.degrees_of_freedom) == (360, 119)
    error = flat(H, {name: part[None] for name, part in found.standard_error.items()})[:, 0]
    z = (found.flat() - d) / error
    assert float(z.abs().max()) < 4.5
    assert float(z.square().mean()) < 2


def test_intervals_cover() -> None:
    H = classifier(hidden=4)
    d = H.to_dense().diagonal()
    runs = [hs.diagonal(H, "control-variate", budget=48, seed=s) for s in range(40)]
    ends = [[flat(H, {n: x[None] for n, x in end.items()})[:, 0] for end in run.interval()] for run in runs]
    inside = torch.stack([(low <= d) & (d <= high) for low, high in ends])
    assert 0.93 <= float(inside.double().mean()) <= 0.97
    errors = torch.stack([run.flat() - d for run in runs])
    stated = sum(run.relative_error for run in runs) / len(runs)
    assert float(errors.square().sum(1).mean().sqrt() / d.norm()) == pytest.approx(stated, rel=0.1)


def test_a_linear_model_leaves_only_the_labels() -> None:
    """H = G: the samples are the draws."""
    H = classifier()
    found = hs.diagonal(H, "control-variate", budget=60, seed=2)
    draws = hs.diagonal(hs.ggn(H.problem, H.space), "sampled", budget=20, seed=2)
    assert relative(found.flat(), draws.flat()) < EXACT


# ---- cost


def test_products_passes_and_graphs() -> None:
    """6 forward passes of the Hessian, 4 of the Gauss-Newton matrix and 2 of the labels, on graphs of 3, 3 and 1."""
    one = ragged_batches()[:1]
    H = hessian("llama", LAYERS[0][1], one)
    found = hs.diagonal(H, "control-variate", budget=20)
    assert (found.products, H.products, found.provenance["estimator"]["draws"]) == (18, 18, 6)
    assert found.units == pytest.approx(6 * 12 + 7)
    without = hessian("llama", LAYERS[0][1], one, graph_memory=0)
    assert hs.diagonal(without, "control-variate", budget=20).units == pytest.approx(6 * 19)
    assert relative(hs.diagonal(without, "control-variate", budget=20).flat(), found.flat()) < EXACT


def test_kept_graphs_share_the_room() -> None:
    """Where there is room for the Hessian's graph alone, nothing else is kept; others' graphs make room."""
    one = ragged_batches()[:1]
    first = hessian("llama", LAYERS[0][1], one)
    first.matmat(first.space.rademacher(0, [0]))
    own = first.describe()["graph_bytes"]
    H = hessian("llama", LAYERS[0][1], one, graph_memory=own + 1)
    assert hs.diagonal(H, "control-variate", budget=18).units == pytest.approx(6 * 12 + 3 + 6 * 4)
    assert H._memory.used == own
    H.release()
    assert H._memory.used == 0
    hs.diagonal(first, "control-variate", budget=3)
    assert first._memory.used > own
    first.probe_diagonal(0, 0)
    assert first._memory.used == 0
    first.draw_gauss_newton(0, 0)
    assert not first._probes()._graphs


# ---- the choice


def test_labels_for_a_sign_vector() -> None:
    assert labels_for((0.01, 2.0), (1.0, 10.0)) == 1
    assert labels_for((1.0, 2.0), (0.2, 10.0)) == 5
    assert labels_for((1.0, 2.0), (0.0, 10.0)) == 8
    costs = {labels: cost((1.0, 2.0), (0.2, 10.0), labels) for labels in range(1, 9)}
    assert min(costs, key=lambda labels: costs[labels]) == 5


@pytest.mark.parametrize("lean", [False, True])
def test_auto_chooses_it_where_the_model_is_linear(lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    H = linear()
    if lean:
        for module in ("automatic", "scheduled"):
            monkeypatch.setattr(f"hesscope.algorithms.diagonals.{module}.vectors_that_fit", lambda *_: 100)
    before = H.units
    found = hs.diagonal(H, budget=120)
    record = found.provenance["estimator"]
    assert (found.method, record["labels"], record["chosen"]["labels"]) == ("control-variate", 8, 8)
    assert record["chosen"]["control_variate_gain"] > 3
    assert record["chosen"]["pilot_products"] == (30 if lean else 32)
    assert found.products == record["chosen"]["pilot_products"] + 10 * record["draws"] <= 120
    pilot = found.units - record["draws"] * (10 + 8 * 3)
    assert pilot < 30 * 6 + 20
    assert H.units - before == pytest.approx(found.units + found.provenance["probe"]["units"])


def test_auto_leaves_it_where_it_loses() -> None:
    """In an untrained model what G leaves has as much off the diagonal, and takes more forward passes."""
    H = hessian("llama", "*.0.*_proj.weight")
    found = hs.diagonal(H, budget=100)
    assert found.method in ("nystrom", "hutchinson", "per-sequence")
    assert "control_variate_gain" not in found.provenance["estimator"]["chosen"]


# ---- refusals


def test_what_has_no_gauss_newton_matrix_is_refused() -> None:
    H = classifier()
    weighted = hs.supervised(nn.Linear(2, 2), [(torch.ones(1, 2), torch.tensor([[0.5, 1.5]]))])
    own = hs.Problem(nn.Linear(3, 2), lambda m, x: m(x).square().sum(), [torch.ones(4, 3)], count=len)
    for operator in (
        *(hs.ggn(H.problem, H.space), 2.0 * H, hs.operator(torch.eye(3))),
        *(hs.hessian(weighted), hs.hessian(own), hs.hessian(weighted.related(objective="perplexity"))),
    ):
        assert not operator.has_gauss_newton
        with pytest.raises(hs.HesscopeError, match=r"for method='control-variate', .* got .*; use method='auto'"):
            hs.diagonal(operator, method="control-variate", budget=5)
        with pytest.raises(hs.HesscopeError, match="no Gauss-Newton matrix beside it"):
            operator.draw_gauss_newton(0, 0)
        with pytest.raises(hs.HesscopeError, match="no Gauss-Newton matrix beside it"):
            operator.gauss_newton_product(operator.space.zeros())
    with pytest.raises(hs.HesscopeError, match="at least 3 products for method='control-variate', got 2"):
        hs.diagonal(H, method="control-variate", budget=2)
