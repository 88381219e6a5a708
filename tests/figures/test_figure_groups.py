"""Groups as a picture: every ridge, trace and norm is there, signs have their colours, few and many groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_by_hand import spent
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from hesscope.figures.ridges import _along, _back
from hesscope.figures.style import NEGATIVE, POSITIVE
from hesscope.results import Groups


def groups(names: list[str], scale: float = 1.0, converged: bool = True) -> Groups:
    G, g = len(names), torch.Generator().manual_seed(0)
    nodes = scale * torch.randn(G, 3, 8, generator=g, dtype=torch.float64)
    squares = scale**2 * torch.rand(G, G, generator=g, dtype=torch.float64)
    return Groups(**spent(), by="block", names=names, sizes=[100] * G, traces=scale * torch.linspace(-1, 2, G).double(),
                  trace_standard_errors=scale * 0.1 * torch.ones(G).double(), squares=squares,
                  squares_standard_error=0.1 * squares, extremes=scale * torch.tensor([[4.0, -3.0]] * G).double(),
                  residuals=scale * torch.tensor([[1e-5, 1.0]] * G).double(), converged=[converged] * G, tol=1e-3,
                  nodes=nodes, weights=torch.full((G, 3, 8), 1 / 8).double(), steps=8, rounding=1e-16, seed=0)  # fmt: skip


CASES = {"one": ["all"], "few": ["block 0", "block 1", "lm_head"], "many": [f"{b}.mlp.down_proj" for b in range(90)]}


@pytest.mark.parametrize(("case", "scale"), [("one", 1.0), ("few", 1e-7), ("few", 0.0), ("many", 1.0)])
def test_every_group_is_drawn(case: str, scale: float, tmp_path: Path, drawn: list[Any]) -> None:
    found = groups(CASES[case], scale)
    found.plot(tmp_path / "g.png")
    ridges, traces, coarse = (axes for axes in drawn[0].axes if axes.get_label() != "<colorbar>")
    G = len(found.names)
    ends = [c for c in ridges.collections if isinstance(c, PathCollection)]
    assert sorted(float(c.get_offsets()[0, 1]) for c in ends) == sorted([float(g) for g in range(G)] * 2)
    dots = next(c for c in traces.collections if isinstance(c, PathCollection))
    assert np.asarray(dots.get_offsets())[:, 0] == pytest.approx(found.traces.numpy())
    assert coarse.images[0].get_array().shape == (G, G)
    assert "[nats per squared weight]" in ridges.get_xlabel()
    assert "[nats per squared weight]" in traces.get_xlabel()


def test_signs_have_their_colours_and_what_missed_the_tolerance_is_open(tmp_path: Path, drawn: list[Any]) -> None:
    groups(CASES["few"], converged=False).plot(tmp_path / "g.png")
    ridges = drawn[0].axes[0]
    ends = [c for c in ridges.collections if isinstance(c, PathCollection)]
    for c in ends:
        value = float(c.get_offsets()[0, 0])
        assert to_hex(c.get_edgecolor()[0]) == (POSITIVE if value > 0 else NEGATIVE)
        assert (to_hex(c.get_facecolor()[0]) == "#ffffff") == (value < 0)


def test_a_ridge_is_where_its_nodes_are(tmp_path: Path, drawn: list[Any]) -> None:
    found = groups(["a", "b"])
    found.nodes[0], found.nodes[1] = 2.0, -2.0
    found.plot(tmp_path / "g.png")
    warm, cold = (
        [line for line in drawn[0].axes[0].lines if to_hex(line.get_color()) == c] for c in (POSITIVE, NEGATIVE)
    )
    for line, at, row in ((warm[0], 2.0, 0), (cold[1], -2.0, 1)):
        height = row - np.nan_to_num(np.where(np.isnan(line.get_xdata()), row, line.get_ydata()), nan=row)
        assert line.get_xdata()[height.argmax()] == pytest.approx(at, rel=0.05)


def test_the_axis_coordinate_and_its_inverse() -> None:
    t = np.array([-30.0, -1.0, -0.2, 0.0, 0.5, 1.0, 3e4])
    assert _back(_along(t, 1.0), 1.0) == pytest.approx(t)


def test_a_positive_spectrum_has_no_negative_side(tmp_path: Path, drawn: list[Any]) -> None:
    found = groups(["a", "b"])
    found.nodes.abs_()
    found.extremes[:, 1] = 0.01
    found.nodes.clamp_(min=0.01)
    found.plot(tmp_path / "g.png")
    cold = [line for line in drawn[0].axes[0].lines if to_hex(line.get_color()) == NEGATIVE]
    assert all(np.isnan(line.get_xdata()).all() for line in cold)
