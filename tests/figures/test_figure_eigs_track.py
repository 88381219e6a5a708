"""Eigenvalues over checkpoints as a picture: every value, its sign, what missed the tolerance, overlaps in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_by_hand import spent
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex

from hesscope.figures.style import NEGATIVE, POSITIVE
from hesscope.results import EigsTrack


def track(values: list[list[float]], converged: list[bool] | None = None, cold: bool = True) -> EigsTrack:
    C, k = len(values), len(values[0])
    cosines = torch.linspace(1.0, 0.2, (C - 1) * k).reshape(C - 1, k).double()
    return EigsTrack(**spent(), names=[f"checkpoint-{i}" for i in range(C)], which="LM", eigenvalues=torch.tensor(values).double(),
                     residuals=1e-4 * torch.ones(C, k).double(), converged=converged or [True] * C, cosines=cosines, spent=[9] * C,
                     cold=[9, *[12] * (C - 1)] if cold else [], tol=1e-3, seed=0)  # fmt: skip


CASES = {
    "one": [[3.0, -1.0]],
    "signs": [[3.0, -1.0], [4.0, -2.0], [-5.0, 2.0]],
    "wide": [[3e4, 1.0], [2e4, -1e-3]],
    "zero": [[0.0], [0.0]],
    "many": [[float(i + 1)] for i in range(60)],
}


@pytest.mark.parametrize("case", CASES)
def test_every_eigenvalue_and_overlap_is_drawn(case: str, tmp_path: Path, drawn: list[Any]) -> None:
    found = track(CASES[case])
    found.plot(tmp_path / "t.png")
    upper, lower = drawn[0].axes
    dots = [c for c in upper.collections if isinstance(c, PathCollection)]
    shown = np.stack([np.asarray(c.get_offsets())[:, 1] for c in dots], 1)
    assert shown == pytest.approx(found.eigenvalues.numpy())
    for c, column in zip(dots, found.eigenvalues.T.tolist(), strict=True):
        for colour, value in zip(c.get_edgecolor(), column, strict=True):
            if value:
                assert to_hex(colour) == (POSITIVE if value > 0 else NEGATIVE)
    assert lower.lines[0].get_ydata() == pytest.approx(found.overlaps.numpy())
    assert "[nats per squared weight]" in upper.get_ylabel()


def test_what_missed_the_tolerance_is_open_and_savings_are_said(tmp_path: Path, drawn: list[Any]) -> None:
    track(CASES["signs"], [True, False, True]).plot(tmp_path / "t.png")
    faces = [to_hex(c) for c in drawn[0].axes[0].collections[-1].get_facecolor()]
    assert [face == "#ffffff" for face in faces] == [False, True, False]
    said = " ".join(text.get_text() for text in drawn[0].texts)
    assert "1 checkpoints missed" in said
    assert "warm starts saved 6 of 24 products" in said
