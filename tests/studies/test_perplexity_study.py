"""Two Hessians computed apart: held to dense autograd, and a check of their difference that fails when it should."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.operators.risk import CurvatureOfRisk
from hesscope.studies.perplexity import compare
from oracles import causal_lm, relative
from spectra import generic

GLOBS = ("transformer.h.1.ln_2.bias", {"transformer.wte.weight": [0, 77, 5, 200]})


def test_both_hessians_against_dense_autograd(tmp_path: Path) -> None:
    model = tiny("gpt2")
    problem = hs.causal_lm(model, ragged_batches())
    space = hs.select(problem, *GLOBS)
    found, dense = hs.perplexity_study(problem, space), causal_lm(model, ragged_batches(), space)
    assert relative(found.hessian, dense.hessian) < 1e-9
    assert relative(found.perplexity_hessian, dense.perplexity_hessian) < 1e-9
    assert relative(found.gradient, dense.gradient) < 1e-9
    assert found.perplexity == pytest.approx(math.exp(dense.risk), rel=1e-12)
    torch.testing.assert_close(found.eigenvalues, torch.linalg.eigvalsh(dense.hessian))
    torch.testing.assert_close(found.perplexity_eigenvalues, torch.linalg.eigvalsh(dense.perplexity_hessian))
    assert found.verdict == "confirmed"
    assert found.residual < 1e-9
    assert found.rank_ratio < 1e-9
    assert found.angle < 1e-6
    assert found.plot(tmp_path / "p.png").stat().st_size > 0
    again = hs.load(found.save(tmp_path / "run"))
    assert again.summary() == found.summary()
    assert "H_P - P H = P g g^T confirmed" in again.summary()


def test_the_objective_of_the_problem_does_not_matter() -> None:
    torch.manual_seed(0)
    model, batch = nn.Linear(2, 3).double(), (torch.randn(4, 2).double(), torch.tensor([0, 1, 2, 1]))
    a, b = (hs.perplexity_study(hs.supervised(model, [batch], objective=o)) for o in ("nll", "perplexity"))
    assert torch.equal(a.perplexity_hessian, b.perplexity_hessian)
    assert torch.equal(a.hessian, b.hessian)


@pytest.mark.parametrize("wrong", ["factor", "gradient", "missing", "sign", "rank"])
def test_a_wrong_difference_is_refuted(wrong: str) -> None:
    n, P = 8, 3.0
    g = torch.Generator().manual_seed(0)
    H, v = generic(n), torch.randn(n, generator=g, dtype=torch.float64)
    update = {
        "factor": 1.001 * P * torch.outer(v, v),
        "gradient": P * torch.outer(v.flip(0), v.flip(0)),
        "missing": 1e-6 * generic(n, 1),
        "sign": -P * torch.outer(v, v),
        "rank": P * torch.outer(v, v) + 1e-3 * generic(n, 2),
    }[wrong]
    right, found = compare(H, P * H + P * torch.outer(v, v), v, P, 1e-15), compare(H, P * H + update, v, P, 1e-15)
    assert right.residual <= right.rounding < 1e-12
    assert found.residual > found.rounding
    if wrong == "rank":
        assert found.rank_ratio > 1e-6
    if wrong == "gradient":
        assert found.angle > 10


def test_no_difference_at_all() -> None:
    H, zero = generic(5), torch.zeros(5, dtype=torch.float64)
    assert compare(H, 2.0 * H, zero, 2.0, 1e-15).residual == 0.0
    assert compare(H, 2.0 * H, torch.ones_like(zero), 2.0, 1e-15).residual == math.inf


def test_a_package_that_leaves_the_gradient_out_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second route knows nothing of the formula, so that a wrong first one shows."""
    torch.manual_seed(0)
    problem = hs.supervised(nn.Linear(2, 3).double(), [(torch.randn(4, 2).double(), torch.tensor([0, 1, 2, 1]))])
    monkeypatch.setattr(CurvatureOfRisk, "risk_and_gradient", lambda self: (problem.risk(), self.space.zeros()))
    assert hs.perplexity_study(problem).verdict == "refuted"


def test_rounding_that_hides_the_difference_is_said() -> None:
    g = torch.full((4,), 1e-6, dtype=torch.float64)
    H = generic(4)
    exact = compare(H, 2 * H + 2 * torch.outer(g, g), g, 2.0, 1e-9)
    assert exact.rounding > 0.1


def test_a_loss_without_curvature_and_one_coordinate() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    flat = hs.Problem(model, lambda m, x: m(x).mean(), [torch.ones(3, 1).double()], count=len)
    found = hs.perplexity_study(flat)
    assert float(found.hessian) == 0.0
    assert float(found.perplexity_hessian) == pytest.approx(found.perplexity, rel=1e-12)
    assert found.verdict == "confirmed"


def test_a_graph_that_would_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = hs.supervised(nn.Linear(2, 3), [(torch.randn(4, 2), torch.tensor([0, 1, 2, 1]))])
    monkeypatch.setattr("hesscope.operators.free.available_bytes", lambda _: 10)
    with pytest.raises(hs.HesscopeError, match="Expected one graph over all the data to fit in memory"):
        hs.perplexity_study(problem)
