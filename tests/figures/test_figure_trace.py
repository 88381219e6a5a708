"""Traces: how an estimate settles, and exact ones shown plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_by_hand import trace

from hesscope.figures.trace import running
from hesscope.results.statistics import t_quantile


def test_the_running_band_is_students_interval_of_the_first_samples() -> None:
    samples = 1e6 + np.random.default_rng(0).standard_normal(12)
    mean, half = running(samples)
    for m in range(2, 13):
        first = torch.tensor(samples[:m])
        assert mean[m - 1] == pytest.approx(float(first.mean()), rel=1e-12)
        assert half[m - 1] == pytest.approx(t_quantile(0.95, m - 1) * float(first.std()) / m**0.5, rel=1e-6)
    assert half[0] == np.inf


@pytest.mark.parametrize(
    ("samples", "method", "axis"),
    [
        ([3.0, 5.0, 4.0, 6.0, 5.5, 5.2], "hutchinson", "products"),
        ([-3.0, -5.0], "hutchinson", "products"),
        ([7.0], "hutchinson", "products"),
        ([0.0, 0.0, 0.0], "hutchinson", "products"),
        ([1.0, -2.0, 4.0], "exact", "diagonal entries summed, in the selection's order"),
        ([], "exact", "diagonal entries summed, in the selection's order"),
    ],
    ids=["several", "negative only", "one probe", "zero", "exact", "exact without samples"],
)
def test_traces_are_drawn(samples: list[float], method: str, axis: str, tmp_path: Path, drawn: list[Any]) -> None:
    result = trace(samples, method)
    result.plot(tmp_path / "t.png")
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == axis
    assert "nats per squared weight" in axes.get_ylabel()
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(result.estimate)
    assert ("exact" in drawn[0].texts[0].get_text()) == (method == "exact")


def test_samples_of_other_methods_are_not_passed_off_as_a_running_mean(tmp_path: Path, drawn: list[Any]) -> None:
    import dataclasses

    result = dataclasses.replace(trace([1.0, 2.0, 3.0], "xtrace"), estimate=50.0)
    result.plot(tmp_path / "t.png")
    assert drawn[0].axes[0].get_xlabel() == "sample"
    assert "XTrace" in drawn[0].texts[1].get_text()
