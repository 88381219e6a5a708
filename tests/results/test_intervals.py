"""Intervals are Student's, with the degrees of freedom that the result keeps, before and after a trip to disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy import stats

import hesscope as hs
from hesscope.results.statistics import RunningMean, t_quantile
from spectra import generic

LEVELS = (0.5, 0.9, 0.95, 0.999)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("budget", [2, 3, 10, 200])
def test_trace_interval(budget: int, level: float, tmp_path: Path) -> None:
    found = hs.trace(hs.operator(generic(20)), method="hutchinson", budget=budget)
    expected = stats.t.interval(level, budget - 1, loc=found.estimate, scale=found.standard_error)
    assert found.interval(level) == pytest.approx(expected)
    assert hs.load(found.save(tmp_path / "run")).interval(level) == found.interval(level)
    x = found.samples.numpy()
    assert (found.estimate, found.standard_error) == pytest.approx((x.mean(), stats.sem(x)))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("budget", [2, 10, 200])
def test_diagonal_interval(budget: int, level: float, tmp_path: Path) -> None:
    found = hs.diagonal(hs.operator(generic(20)), method="hutchinson", budget=budget)
    low, high = found.interval(level)
    expected = stats.t.interval(
        level, budget - 1, loc=found.values["x"].numpy(), scale=found.standard_error["x"].numpy()
    )
    torch.testing.assert_close(low["x"], torch.from_numpy(expected[0]))
    torch.testing.assert_close(high["x"], torch.from_numpy(expected[1]))
    again = hs.load(found.save(tmp_path / "run")).interval(level)
    assert torch.equal(again[0]["x"], low["x"])


def test_quantiles() -> None:
    assert t_quantile(0.95, 1) == pytest.approx(12.706, abs=1e-3)
    assert t_quantile(0.95, 10**6) == pytest.approx(1.95997, abs=1e-4)
    assert t_quantile(0.95, 0) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_running_means_equal_those_of_all_samples_together(dtype: torch.dtype) -> None:
    """Also far from zero, where a sum of squares would cancel."""
    g = torch.Generator().manual_seed(0)
    X = (100.0 + torch.randn(500, 4, generator=g, dtype=torch.float64)).to(dtype)
    mean = RunningMean()
    for x in X:
        mean.add({"x": x})
    wide = X.double()
    assert mean.mean["x"].dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(mean.mean["x"].double(), wide.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.standard_error()["x"].double(), wide.std(0) / 500**0.5, rtol=1e-4, atol=0)
