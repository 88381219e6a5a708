"""Trace and diagonal: exact routes, budgets, sequential stopping, chunks and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hesscope as hs
from hesscope.algorithms.checkpoint import Checkpoint
from hesscope.operators import chunks as chunks_module
from spectra import SPECTRA, Counted, generic, symmetric

F64 = torch.float64
both = pytest.mark.parametrize("estimate", [hs.trace, hs.diagonal], ids=["trace", "diagonal"])


def value(result: Any) -> Tensor:
    return result.flat() if result.kind == "diagonal" else torch.tensor(result.estimate, dtype=F64)


# ---- exact


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("method", ["auto", "exact"])
def test_exact_routes_equal_the_matrix(name: str, method: str) -> None:
    A = symmetric(SPECTRA[name])
    diagonal, trace = hs.diagonal(hs.operator(A), method=method), hs.trace(hs.operator(A), method=method)
    torch.testing.assert_close(diagonal.flat(), A.diagonal())
    torch.testing.assert_close(trace.estimate, float(A.trace()))
    assert diagonal.method == trace.method == "exact"
    assert diagonal.products == trace.products == len(A)
    assert (trace.standard_error, diagonal.relative_error) == (0.0, 0.0)
    assert trace.interval() == (trace.estimate, trace.estimate)
    low, high = diagonal.interval()
    assert torch.equal(low["x"], high["x"])


@both
def test_estimates_of_a_diagonal_matrix_have_no_error(estimate: Any) -> None:
    A = torch.diag(torch.arange(1.0, 41.0, dtype=F64))
    found = estimate(hs.operator(A), method="hutchinson", budget=3)
    exact = A.diagonal() if found.kind == "diagonal" else A.trace()
    torch.testing.assert_close(value(found), exact)
    spread = found.standard_error["x"].abs().max() if found.kind == "diagonal" else found.standard_error
    assert float(spread) < 1e-12


@both
def test_auto_is_exact_where_that_costs_no_more_than_the_budget(estimate: Any) -> None:
    H = hs.operator(generic(20))
    assert estimate(H, budget=20).method == "exact"
    assert estimate(H, budget=19).method != "exact"
    assert estimate(hs.operator(generic(100))).method == "exact"
    assert estimate(hs.operator(generic(101))).method != "exact"


def test_rademacher_is_another_name_for_hutchinson() -> None:
    H = hs.operator(generic(20))
    one, other = hs.diagonal(H, method="rademacher", budget=5), hs.diagonal(H, method="hutchinson", budget=5)
    assert one.method == "hutchinson"
    assert torch.equal(one.flat(), other.flat())


@both
def test_float32_operators(estimate: Any) -> None:
    A = generic(50)
    wide = value(estimate(hs.operator(A), method="hutchinson", budget=40))
    narrow = value(estimate(hs.operator(A.float()), method="hutchinson", budget=40))
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
def test_estimates_of_prescribed_spectra_have_no_bias(name: str) -> None:
    """A thousand probes: within four standard errors, entry by entry."""
    A = symmetric(SPECTRA[name])
    slack = 1e-12 * float(A.norm())
    trace = hs.trace(hs.operator(A), method="hutchinson", budget=1000)
    assert abs(trace.estimate - float(A.trace())) <= 4 * trace.standard_error + slack
    diagonal = hs.diagonal(hs.operator(A), method="hutchinson", budget=1000)
    assert bool(((diagonal.flat() - A.diagonal()).abs() <= 4 * diagonal.standard_error["x"] + slack).all())


# ---- what is spent


@both
@pytest.mark.parametrize("budget", [1, 2, 15, 16, 17, 99])
def test_the_budget_is_spent_and_no_more(estimate: Any, budget: int) -> None:
    counted = Counted(generic(120))
    found = estimate(counted.operator(), method="hutchinson", budget=budget)
    assert found.products == counted.columns == budget
    assert found.degrees_of_freedom == budget - 1


@both
def test_one_probe_has_no_error_to_speak_of(estimate: Any) -> None:
    found = estimate(hs.operator(generic(30)), method="hutchinson", budget=1)
    low, high = found.interval()
    ends = torch.stack([low["x"], high["x"]]) if found.kind == "diagonal" else torch.tensor([low, high])
    assert bool(ends.isinf().all())
    assert "inf" in str(found.error())
    found.summary()


@both
def test_a_long_run_is_preceded_by_a_probe_of_three_products(estimate: Any) -> None:
    counted = Counted(generic(120))
    found = estimate(counted.operator(), method="hutchinson", budget=100)
    assert (found.products, counted.columns) == (100, 103)
    assert found.provenance["probe"]["symmetry"] < 1e-13
    assert found.provenance["probe"]["repeatability"] == 0.0


# ---- stopping at a target


def stopped_at(samples: Tensor, target: float, m: int) -> bool:
    x = samples[:m]
    return float(x.std() / m**0.5) <= target * abs(float(x.mean()))


def test_a_trace_stops_at_the_first_probe_that_meets_its_target() -> None:
    A = generic(80, seed=4) + torch.eye(80, dtype=F64)
    found = hs.trace(hs.operator(A), method="hutchinson", target_error=0.01)
    m = found.products
    assert 30 < m < 10_000
    assert stopped_at(found.samples, 0.01, m)
    assert not any(stopped_at(found.samples, 0.01, i) for i in range(30, m))
    assert found.degrees_of_freedom == m - 1


def test_a_diagonal_stops_at_the_first_probe_that_meets_its_target() -> None:
    A = generic(80, seed=4) + torch.eye(80, dtype=F64)
    found = hs.diagonal(hs.operator(A), method="hutchinson", target_error=0.1)
    m = found.products
    assert 30 < m < 1000
    assert found.relative_error <= 0.1
    before = hs.diagonal(hs.operator(A), method="hutchinson", budget=m - 1)
    assert before.relative_error > 0.1


@both
def test_never_before_thirty_probes(estimate: Any) -> None:
    for A in (torch.eye(200, dtype=F64), torch.zeros(200, 200), generic(200) + 100 * torch.eye(200, dtype=F64)):
        assert estimate(hs.operator(A), method="hutchinson", target_error=0.9).products == 30


@both
@pytest.mark.parametrize("budget", [7, 30, 45])
def test_a_target_out_of_reach_stops_at_the_budget(estimate: Any, budget: int) -> None:
    found = estimate(hs.operator(generic(60)), method="hutchinson", budget=budget, target_error=1e-6)
    assert found.products == budget


@both
def test_a_target_does_not_change_which_probes_are_drawn(estimate: Any) -> None:
    H = hs.operator(generic(60) + 5 * torch.eye(60, dtype=F64))
    stopped = estimate(H, method="hutchinson", target_error=0.1, seed=3)
    torch.testing.assert_close(value(stopped), value(estimate(H, method="hutchinson", budget=stopped.products, seed=3)))


# ---- chunks and seeds


@both
@pytest.mark.parametrize("method", ["hutchinson", "exact"])
def test_chunks_do_not_change_the_numbers(estimate: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    A = generic(50)
    reference = estimate(hs.operator(A), method=method, budget=50)
    for largest, size, calls in ((1, 2**28, 50), (7, 2**28, 8), (64, 2**28, 1), (64, 1, 50), (64, 5 * 50 * 8, 10)):
        monkeypatch.setattr(chunks_module, "_LARGEST_CHUNK", largest)
        monkeypatch.setattr(chunks_module, "_CHUNK_BYTES", size)
        counted = Counted(A)
        found = estimate(counted.operator(), method=method, budget=50)
        assert counted.calls == calls
        torch.testing.assert_close(value(found), value(reference), rtol=1e-12, atol=1e-12)
        stated, expected = found.standard_error, reference.standard_error
        torch.testing.assert_close(stated, expected, rtol=1e-11, atol=1e-12)


@both
def test_one_seed_one_answer_and_a_drawn_seed_is_recorded(estimate: Any) -> None:
    H = hs.operator(generic(40))
    drawn = estimate(H, method="hutchinson", budget=5, seed=None)
    assert drawn.seed == drawn.provenance["options"]["seed"]
    again = estimate(H, method="hutchinson", budget=5, seed=drawn.seed)
    other = estimate(H, method="hutchinson", budget=5, seed=drawn.seed + 1)
    assert torch.equal(value(drawn), value(again))
    assert not torch.equal(value(drawn), value(other))
    assert len({estimate(H, method="hutchinson", budget=1, seed=None).seed for _ in range(3)}) == 3


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "guess"}, "method to be one of auto, exact, hutchinson"),
        ({"budget": 0}, "budget to be at least 1"),
        ({"target_error": 0.0}, "between 0 and 1"),
        ({"target_error": 1.5}, "between 0 and 1"),
        ({"target_error": float("nan")}, "between 0 and 1"),
        ({"method": "exact", "budget": 4}, "budget of at least 5 products"),
    ],
)
def test_impossible_requests_are_refused(estimate: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        estimate(hs.operator(torch.eye(5)), **arguments)


# ---- a target that no probes meet


def cancelling(n: int = 300) -> tuple[hs.Operator, float]:
    """Eigenvalues that add up to next to nothing beside their size."""
    A = symmetric([1.0, -1.0] * (n // 2 - 1) + [1.0, -0.7])
    return hs.operator(A), float(A.trace())


def test_a_trace_goes_over_to_its_entries_once_probes_would_take_more() -> None:
    H, exact = cancelling()
    found = hs.trace(H, target_error=0.01)
    assert found.method == "exact"
    assert (found.estimate, found.standard_error) == (pytest.approx(exact), 0.0)
    assert found.products == 330
    assert hs.trace(H, "hutchinson", budget=500, target_error=0.01).method == "hutchinson"
    assert hs.trace(H, budget=200, target_error=0.01).method == "hutchinson"  # no budget for all entries


def test_a_trace_that_probes_settle_stays_with_them() -> None:
    H = hs.operator(symmetric([2.0, 1.0] * 150))
    found = hs.trace(H, target_error=0.05)
    assert (found.method, found.products) == ("hutchinson", 30)


@pytest.mark.parametrize("limit", [25, 40, 200])
def test_a_trace_that_goes_over_is_taken_up_again(limit: int, tmp_path: Path) -> None:
    A, spent = symmetric([1.0, -1.0] * 149 + [1.0, -0.7]), [0]

    def at_most(most: float) -> hs.Operator:
        spent[0] = 0

        def product(X: Tensor) -> Tensor:
            spent[0] += X.shape[1]
            if spent[0] > most:
                raise KeyboardInterrupt
            return A @ X

        return hs.operator(product, size=300, dtype=F64)

    whole = hs.trace(at_most(1000), target_error=0.01)
    with pytest.raises(KeyboardInterrupt):
        hs.trace(at_most(limit), target_error=0.01, checkpoint=Checkpoint(tmp_path / "run", every=0.0))
    resumed = hs.trace(at_most(1000), target_error=0.01, checkpoint=tmp_path / "run")
    assert resumed.provenance["resumed"] == 1
    assert (resumed.estimate, resumed.method, resumed.products) == (whole.estimate, "exact", whole.products)
    assert torch.equal(resumed.samples, whole.samples)
