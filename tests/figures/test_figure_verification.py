"""Verifications: bars against limits, and failures that cannot be overlooked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_by_hand import verification
from matplotlib.colors import to_rgba

from hesscope.figures.style import FAILED, GRID, PASSED


@pytest.mark.parametrize(
    ("measured", "limits", "passed"),
    [
        ([1e-7, 1e-2], [1e-4, 1e-3], [True, False]),
        ([0.0], [1e-4], [True]),
        ([float("nan"), float("inf"), 0.5], [1e-3, 1e-3, 1.0], [False, False, True]),
        ([0.0, 1e-9], [0.0, 0.0], [True, False]),
        ([], [], []),
    ],
    ids=["one fails", "exact zero", "not finite", "limit zero", "no checks"],
)
def test_bars_have_the_colour_of_their_outcome(
    measured: list[float], limits: list[float], passed: list[bool], tmp_path: Path, drawn: list[Any]
) -> None:
    verification(measured, limits).plot(tmp_path / "v.png")
    axes = drawn[0].axes[0]
    bars = [bar for bar in axes.patches if bar.get_facecolor() != to_rgba(GRID)]
    assert [bar.get_facecolor() for bar in bars] == [to_rgba(PASSED if ok else FAILED) for ok in passed]
    assert axes.get_xscale() == "log"
    said = [text.get_text() for text in axes.texts]
    assert sum(text.endswith("✓") for text in said) == sum(passed)
    assert sum(text.endswith("✗") for text in said) == len(passed) - sum(passed)
    assert f"{sum(passed)} of {len(passed)} checks passed" in drawn[0].texts[0].get_text()


def test_a_failing_bar_passes_its_limit(tmp_path: Path, drawn: list[Any]) -> None:
    verification([1e-2, 1e-5], [1e-3, 1e-3]).plot(tmp_path / "v.png")
    bars = [bar for bar in drawn[0].axes[0].patches if bar.get_facecolor() != to_rgba(GRID)]
    ends = [bar.get_x() + bar.get_width() for bar in bars]
    assert ends == pytest.approx([1e-2, 1e-5])
