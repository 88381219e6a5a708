"""Structures as pictures: the map's colours and lines, bars that add up, chance below them, and every eigenvalue."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_by_hand import comparison, structure
from matplotlib.colors import to_hex

from hesscope.figures.energy_bars import COLOURS

TWO = {"0.q": (2, 0), "0.k": (1, 0), "1.q": (2, 1), "head": (1, None)}
MANY = {f"{b}.{name}": (1, b) for b in range(20) for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")}


def symmetric(places: dict[str, Any], seed: int = 0) -> torch.Tensor:
    n = sum(2 * rows for rows, _ in places.values())
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return A + A.T


CASES = {
    "two blocks": (symmetric(TWO), TWO),
    "many blocks": (symmetric(MANY), MANY),
    "one layer": (symmetric({"w": (1, None)}), {"w": (1, None)}),
    "zero": (torch.zeros(12, 12), TWO),
    "identity": (torch.eye(12), TWO),
    "positive": (torch.ones(12, 12) + torch.eye(12), TWO),
}


@pytest.mark.parametrize("case", CASES)
def test_every_structure_is_drawn(case: str, tmp_path: Path, drawn: list[Any]) -> None:
    made = structure(*CASES[case])
    made.plot(tmp_path / "s.png")
    coarse, bars, spectrum = (axes for axes in drawn[0].axes if axes.get_label() != "<colorbar>")
    image = coarse.images[0]
    rms = made.layer_rms.numpy()
    assert image.get_array().shape == rms.shape
    white = (image.to_rgba(image.get_array())[..., :3] == 1.0).all(-1)
    assert white[rms == 0].all()
    assert not (rms.max() > 0 and white.all())
    widths = [sum(p.get_width() for p in run) for run in np.split(np.array(bars.patches), 2)]
    assert widths == pytest.approx([1.0 if made.energy.sum() else 0.0, 1.0])
    assert (
        sum(len(points.get_offsets()) for points in spectrum.collections if hasattr(points, "get_sizes")) >= made.size
    )


def test_the_map_parts_blocks_and_names_layers(tmp_path: Path, drawn: list[Any]) -> None:
    structure(*CASES["two blocks"]).plot(tmp_path / "s.svg")
    coarse = drawn[0].axes[0]
    assert [t.get_text() for t in coarse.get_yticklabels()] == ["0.q", "0.k", "1.q", "head"]
    places = [[float(s[0, way]) for s in lines.get_segments()] for way, lines in enumerate(coarse.collections)]
    assert places == [[1.5, 2.5], [1.5, 2.5]]
    assert len(coarse.texts) == 16  # few enough cells for a number in each
    bar = next(axes for axes in drawn[0].axes if axes.get_label() == "<colorbar>")
    assert bar.get_ylabel() == "root mean square of ∂²R / ∂θ$_i$ ∂θ$_j$  [nats per squared weight]"
    said = " ".join(text.get_text() for text in drawn[0].texts)
    assert "inside blocks (chance" in said
    assert "effective rank" in said


def test_blocks_are_named_where_layers_are_too_many_and_names_never_touch(tmp_path: Path, drawn: list[Any]) -> None:
    structure(*CASES["many blocks"]).plot(tmp_path / "s.png")
    labels = [t for t in drawn[0].axes[0].get_yticklabels() if t.get_text()]
    assert {t.get_text() for t in labels} <= {f"block {b}" for b in range(20)}
    boxes = sorted((t.get_window_extent() for t in labels), key=lambda box: box.y0)
    assert len(boxes) > 10
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))


def test_bars_show_the_shares_in_their_colours_with_chance_below(tmp_path: Path, drawn: list[Any]) -> None:
    one, other = structure(symmetric(TWO), TWO), structure(torch.eye(12), TWO)
    comparison(one=one, other=other).plot(tmp_path / "c.png")
    bars, spectra = drawn[0].axes
    rows = np.array([p.get_width() for p in bars.patches]).reshape(4, 5)
    assert rows[0] == pytest.approx(one.shares.numpy())
    assert rows[1] == pytest.approx(one.chance.numpy())
    assert rows[2] == pytest.approx(other.shares.numpy())
    assert rows[3] == pytest.approx(one.chance.numpy())
    assert [to_hex(p.get_facecolor()) for p in bars.patches[:5]] == list(COLOURS)
    assert bars.patches[5].get_height() < bars.patches[0].get_height() / 3
    assert bars.patches[5].get_y() > bars.patches[0].get_y() + bars.patches[0].get_height()
    assert [t.get_text() for t in bars.get_yticklabels()] == ["one", "other"]
    first, second, zero = spectra.lines
    assert first.get_ydata() == pytest.approx((one.eigenvalues.flip(0) / one.eigenvalues.abs().max()).numpy())
    assert second.get_ydata() == pytest.approx(np.ones(12))
    assert first.get_linestyle() != second.get_linestyle()
    assert list(zero.get_ydata()) == [0, 0]


def test_positive_eigenvalues_are_warm_and_negative_cold(tmp_path: Path, drawn: list[Any]) -> None:
    structure(torch.diag(torch.tensor([2.0, -1.0])), {"w": (1, None)}).plot(tmp_path / "s.png")
    spectrum = drawn[0].axes[-1]
    dots = [c for c in spectrum.collections if hasattr(c, "get_sizes") and len(c.get_offsets()) == 1]
    colours = {float(c.get_offsets()[0, 1]): c.get_facecolor()[0] for c in dots}
    assert colours[2.0][0] > colours[2.0][2]
    assert colours[-1.0][0] < colours[-1.0][2]
