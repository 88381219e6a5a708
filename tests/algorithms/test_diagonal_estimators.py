"""The family of diagonal estimators: unbiased, with errors and intervals that are right, within their limits.

Averages over 150 seeds of a matrix with a few large eigenvalues of both signs. Bounds follow from the number of seeds.
"""

from __future__ import annotations

from functools import cache
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

import hesscope as hs
from hesscope.algorithms.diagonals import estimate as estimate_module
from hesscope.algorithms.diagonals.pilot import choice
from hesscope.results import Diagonal
from spectra import SPECTRA, Counted, generic, symmetric

F64 = torch.float64
SEEDS, BUDGET = 150, 36
METHODS = ["gaussian", "deflated", "xdiag", "nystrom", "auto"]
#: The least share of entries that 95% intervals hold here. XDiag's samples share an approximation, Nystroem's folds do.
COVERS = {"gaussian": 0.94, "deflated": 0.94, "xdiag": 0.88, "nystrom": 0.91, "auto": 0.91}
every = pytest.mark.parametrize("method", METHODS)


@cache
def matrix() -> Tensor:
    large = torch.tensor([30.0, -22.0, 15.0, 9.0, -7.0, 5.0], dtype=F64)
    return symmetric(torch.cat([large, torch.linspace(-1, 2, 74, dtype=F64)]), seed=1)


@cache
def runs(method: str) -> list[Diagonal]:
    H = hs.operator(matrix())
    return [hs.diagonal(H, method=method, budget=BUDGET, seed=seed) for seed in range(SEEDS)]


def z_scores(samples: Tensor, exact: Tensor) -> Tensor:
    return (samples.mean(0) - exact) / (samples.std(0) / len(samples) ** 0.5)


# ---- over seeds


@every
def test_estimates_are_unbiased(method: str) -> None:
    z = z_scores(torch.stack([run.flat() for run in runs(method)]), matrix().diagonal())
    assert float(z.abs().max()) < 4.3
    assert float(z.square().mean()) == pytest.approx(1, abs=0.65)


@every
def test_intervals_cover(method: str) -> None:
    d = matrix().diagonal()
    ends = [run.interval() for run in runs(method)]
    covered = torch.stack([(low["x"] <= d) & (d <= high["x"]) for low, high in ends]).double()
    assert COVERS[method] <= float(covered.mean()) <= 0.97


@every
def test_the_stated_error_is_the_true_one(method: str) -> None:
    d = matrix().diagonal()
    true = torch.stack([(run.flat() - d).norm() / d.norm() for run in runs(method)])
    stated = torch.tensor([run.relative_error for run in runs(method)], dtype=F64)
    # The spread of samples that share an approximation is a little too small.
    low = {"xdiag": 0.75, "nystrom": 0.85, "auto": 0.85}.get(method, 0.93)
    assert low <= float(stated.square().mean().sqrt() / true.square().mean().sqrt()) <= 1.1


def test_what_each_saves() -> None:
    """Where a few eigenvalues are large, every estimator that removes them beats independent probes, and by far."""
    d = matrix().diagonal()
    H = hs.operator(matrix())
    plain = torch.stack([hs.diagonal(H, "hutchinson", budget=BUDGET, seed=s).flat() - d for s in range(100)])
    for method in ("deflated", "xdiag", "nystrom"):
        errors = torch.stack([run.flat() - d for run in runs(method)])
        assert float(errors.square().mean() / plain.square().mean()) < 0.2


@pytest.mark.parametrize("method", [*METHODS, "hutchinson"])
def test_all_ones(method: str) -> None:
    """The mean is one; signs that are balanced within groups would give zero."""
    H = hs.operator(torch.ones(70, 70, dtype=F64))
    found = torch.stack([hs.diagonal(H, method=method, budget=16, seed=s).flat() for s in range(60)])
    spread = float(found.mean(1).std()) / 60**0.5
    assert abs(float(found.mean()) - 1) <= 4 * spread + 1e-9


# ---- exact cases and edges


@pytest.mark.parametrize("method", ["deflated", "xdiag", "nystrom"])
@pytest.mark.parametrize("name", ["rank-deficient", "zero"])
def test_low_rank_is_found_exactly(method: str, name: str) -> None:
    A = symmetric(SPECTRA[name])
    found = hs.diagonal(hs.operator(A), method=method, budget=max(len(A) - 1, 4))
    torch.testing.assert_close(found.flat(), A.diagonal(), rtol=1e-7, atol=1e-7)
    assert found.relative_error < 1e-6


@pytest.mark.parametrize("method", ["deflated", "nystrom"])
def test_a_diagonal_matrix_has_little_error(method: str) -> None:
    """Low-rank approximations of a diagonal matrix only do harm; they are not chosen."""
    d = torch.arange(1.0, 201.0, dtype=F64)
    found = hs.diagonal(hs.operator(torch.diag(d)), method=method, budget=60)
    plain_probes = hs.diagonal(hs.operator(torch.diag(d)), method="hutchinson", budget=4)
    torch.testing.assert_close(plain_probes.flat(), d)
    assert float((found.flat() - d).norm() / d.norm()) < 0.06


@pytest.mark.parametrize("method", [*METHODS, "hutchinson"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_small_operators(method: str, n: int) -> None:
    A = generic(n, seed=3) + torch.eye(n, dtype=F64)
    found = hs.diagonal(hs.operator(A), method=method, budget=12 if method != "auto" else None)
    assert found.flat().shape == (n,)
    if method in ("xdiag", "deflated", "nystrom"):
        torch.testing.assert_close(found.flat(), A.diagonal(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", [*METHODS, "hutchinson"])
@pytest.mark.parametrize("budget", [4, 5, 13, 50, 77])
def test_never_more_than_the_budget(method: str, budget: int) -> None:
    counted = Counted(generic(130))
    found = hs.diagonal(counted.operator(), method=method, budget=budget)
    assert found.products == counted.columns <= budget
    assert found.products >= budget - (budget % 2 if method == "xdiag" else 0)
    assert found.degrees_of_freedom > 0


def test_half_of_the_budget_is_deflated_or_as_many_as_asked_for() -> None:
    H = hs.operator(generic(90))
    for directions, expected in ((None, 20), (0, 0), (13, 13)):
        found = hs.diagonal(H, method="deflated", budget=40, directions=directions)
        assert found.provenance["estimator"] == {"directions": expected, "probes": 40 - expected}
        assert found.degrees_of_freedom == 39 - expected


def test_deflating_nothing_is_hutchinsons_estimator() -> None:
    H = hs.operator(matrix())
    one, other = (hs.diagonal(H, m, budget=30, directions=k) for m, k in (("deflated", 0), ("hutchinson", None)))
    torch.testing.assert_close(one.flat(), other.flat())
    torch.testing.assert_close(one.standard_error, other.standard_error)


def test_several_parameters_and_float32() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4))
    batches = [(torch.randn(m, 6), torch.randint(4, (m,))) for m in (3, 17)]
    problem = hs.supervised(model, batches)
    H = hs.hessian(problem)
    exact = hs.diagonal(H, method="exact")
    for method in ("deflated", "xdiag", "nystrom"):
        found = hs.diagonal(H, method=method, budget=60)
        assert {name: part.shape for name, part in found.values.items()} == {
            n: p.shape for n, p in exact.values.items()
        }
        assert float((found.flat() - exact.flat()).norm() / exact.flat().norm()) < 4 * found.relative_error + 1e-4


# ---- stopping


@pytest.mark.parametrize("method", ["gaussian", "deflated", "xdiag", "nystrom", "auto"])
def test_stopping_at_a_target(method: str) -> None:
    H = hs.operator(matrix())
    found = hs.diagonal(H, method=method, target_error=0.3, budget=79 if method == "auto" else None)
    assert found.relative_error <= 0.3
    assert found.degrees_of_freedom >= 15
    assert found.products < 1000


@pytest.mark.parametrize("method", ["deflated", "nystrom", "xdiag"])
def test_never_before_thirty_probes(method: str) -> None:
    A = generic(300) + 100 * torch.eye(300, dtype=F64)
    found = hs.diagonal(hs.operator(A), method=method, target_error=0.9)
    assert found.provenance["estimator"]["probes"] >= 30


@pytest.mark.parametrize("method", ["hutchinson", "deflated", "xdiag", "nystrom", "auto"])
def test_stopping_at_a_time(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks once a look."""
    ticks = count()
    monkeypatch.setattr(estimate_module.time, "perf_counter", lambda: float(next(ticks)))
    found = hs.diagonal(hs.operator(generic(400)), method=method, max_seconds=60)
    assert 2 <= found.products < 2000
    assert torch.isfinite(found.flat()).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_seconds": 0.0}, "max_seconds to be positive"),
        ({"directions": 3}, "with method='deflated' only"),
        ({"method": "deflated", "directions": -1}, "at least 0"),
        ({"method": "deflated", "directions": 5, "budget": 5}, "at least 6 products"),
        ({"method": "xdiag", "budget": 3}, "at least 4 products"),
    ],
)
def test_impossible_requests_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        hs.diagonal(hs.operator(torch.eye(200)), **arguments)


def test_vectors_that_do_not_fit_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesscope.operators.free.available_bytes", lambda _: 100 * 200 * 8)
    H = hs.operator(generic(200))
    for method in ("nystrom", "xdiag"):
        with pytest.raises(hs.HesscopeError, match="Lower the budget, or use method='hutchinson'"):
            hs.diagonal(H, method=method, budget=90)
    assert hs.diagonal(H, budget=90).method == "hutchinson"
    assert hs.diagonal(H, method="nystrom", budget=20).products == 20


# ---- the choice


def test_the_choice_is_recorded_and_said() -> None:
    found = hs.diagonal(hs.operator(matrix()), budget=70)
    record = found.provenance["estimator"]
    assert found.method == "nystrom"
    assert record["chosen"]["pilot_products"] == 14
    assert record["chosen"]["share"] == 0.3
    assert 0 < record["chosen"]["ratio"] < 0.5
    assert f"nystrom with {record['directions']} directions (chosen by a pilot)" in found.summary()


def test_the_choice() -> None:
    assert choice(1.0, 10_000) is None
    assert choice(0.3, 200) == 0.3
    assert choice(0.95, 200) == 0.0


def test_a_target_is_estimated_where_that_is_cheaper_than_the_exact_diagonal() -> None:
    """Although the budget would allow the latter; without a target, or for few weights, it is exact."""
    d = torch.cat([torch.tensor([60.0, -40.0, 30.0], dtype=F64), torch.linspace(1, 2, 397, dtype=F64)])
    H = hs.operator(symmetric(d, seed=2))
    found = hs.diagonal(H, target_error=0.1, budget=1000)
    assert found.method == "nystrom"
    assert found.relative_error <= 0.1
    assert found.products < 200
    assert hs.diagonal(H, budget=1000).method == "exact"
    assert hs.diagonal(hs.operator(matrix()), target_error=0.1, budget=1000).products == 80


@pytest.mark.parametrize("seconds", [None, 1e6])
def test_an_estimate_is_given_up_once_it_is_seen_to_be_dearer_than_the_exact_diagonal(seconds: float | None) -> None:
    """Not where a time ends the run, of which the exact diagonal would take no notice, nor beyond the budget."""
    H = hs.operator(generic(150))
    found = hs.diagonal(H, target_error=0.01, budget=600, max_seconds=seconds)
    chosen = found.provenance["estimator"]["chosen"]
    if seconds:
        assert found.method == "nystrom"
        assert found.products > 220
        return
    assert (found.method, chosen["reason"]) == ("exact", "a pilot and 32 samples")  # they come eight at a time
    assert torch.equal(found.flat(), generic(150).diagonal())
    assert (found.relative_error, found.degrees_of_freedom, float(found.standard_error["x"].max())) == (0.0, 0, 0.0)
    assert found.products == chosen["pilot_products"] + 150 <= 220
    assert "exact (chosen by a pilot and 32 samples)" in found.summary()
    assert hs.diagonal(H, target_error=0.01, budget=160).method == "nystrom"


def test_without_structure_probes_are_left_alone() -> None:
    """Of a multiple of the identity plus a little noise there is nothing to remove."""
    A = torch.eye(400, dtype=F64) + 0.01 * torch.diag(torch.ones(399, dtype=F64), 1)
    found = hs.diagonal(hs.operator(0.5 * (A + A.T)), budget=80)
    assert found.method in ("hutchinson", "nystrom")
    assert found.provenance["estimator"]["chosen"]["share"] in (None, 0.0)
