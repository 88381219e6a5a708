"""A Lanczos run in its three forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_by_hand import lanczos

import hesscope as hs

RUNS = [([-1.0, 0.0, 2.0], [0.1, 0.9, 1e-9]), ([3.0], [1.0]), ([-2.0, -1.0], [1.0, 0.0]), ([0.0], [1.0])]


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("form", ["stem", "binned", "smoothed"])
@pytest.mark.parametrize(("nodes", "weights"), RUNS)
def test_every_form_is_drawn(
    nodes: list[float], weights: list[float], form: str, log: bool, tmp_path: Path, drawn: list[Any]
) -> None:
    lanczos(nodes, weights).plot(tmp_path / "l.png", form, log=log)
    axes = drawn[0].axes[0]
    assert axes.get_yscale() == ("log" if log else "linear")
    assert "nats per squared weight" in axes.get_xlabel()


def test_bins_hold_the_weights(tmp_path: Path, drawn: list[Any]) -> None:
    lanczos([-1.0, 0.01, 0.02, 2.0], [0.1, 0.3, 0.4, 0.2]).plot(tmp_path / "l.png", "binned", grid=6, log=False)
    heights = [bar.get_height() for bar in drawn[0].axes[0].patches]
    assert np.allclose(sorted(heights), [0.1, 0.2, 0.7])


def test_the_smoothed_curve_integrates_to_one(tmp_path: Path, drawn: list[Any]) -> None:
    lanczos([1.0, 2.0, 4.0], [0.2, 0.5, 0.3]).plot(tmp_path / "l.png", "smoothed", bandwidth=0.1, grid=2000, log=False)
    curve = drawn[0].axes[0].lines[0]
    assert len(curve.get_xdata()) == 2000
    assert float(np.trapezoid(np.nan_to_num(curve.get_ydata()), curve.get_xdata())) == pytest.approx(1.0, abs=1e-3)
    assert any("smoothed by 0.10" in text.get_text() for text in drawn[0].texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"form": "pie"}, "stem, binned, smoothed"), ({"bandwidth": 0.0}, "bandwidth"), ({"grid": 1}, "at least 2")],
)
def test_impossible_pictures_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        lanczos([1.0], [1.0]).plot(tmp_path / "l.png", **arguments)
