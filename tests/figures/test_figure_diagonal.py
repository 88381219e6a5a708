"""Diagonals in the weights' own shapes, as histograms, and with their noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made_by_hand import diagonal
from matplotlib.colors import to_rgba
from matplotlib.patches import StepPatch

from hesscope.figures.style import NEGATIVE, POSITIVE

Values = dict[str, torch.Tensor]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


CASES: dict[str, tuple[Values, int]] = {
    "one weight": ({"w": normal(6, 4)}, 1),
    "one entry": ({"w": torch.tensor(2.0)}, 0),
    "a vector": ({"b": normal(9)}, 0),
    "three axes": ({"conv": normal(2, 3, 4)}, 1),
    "zero": ({"w": torch.zeros(3, 3)}, 1),
    "negative only": ({"w": -normal(5, 5).abs()}, 1),
    "five, mixed": ({f"m.{i}.w": normal(3, 4) for i in range(4)} | {"m.4.b": normal(5)}, 4),
    "many": ({f"model.layers.{i}.w": normal(3, 4) for i in range(9)}, 0),
    "very many": ({f"model.layers.{i}.w": normal(2) for i in range(80)}, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_every_diagonal_is_drawn(case: str, tmp_path: Path, drawn: list[Any]) -> None:
    values, heatmaps = CASES[case]
    diagonal(values, "hutchinson", error=0.1).plot(tmp_path / "d.png")
    images = [image for axes in drawn[0].axes for image in axes.images]
    assert len(images) == heatmaps
    for image in images:
        assert image.norm.vmin == -image.norm.vmax
        assert image.get_array().shape[0] in {v.shape[0] for v in values.values()}
    labelled = [axes for axes in drawn[0].axes if "nats per squared weight" in axes.get_xlabel() + axes.get_ylabel()]
    assert len(labelled) >= 2


def histogram(drawn: list[Any]) -> Any:
    return next(axes for axes in drawn[0].axes if axes.get_ylabel() == "entries")


def test_the_histogram_counts_every_entry_with_its_sign(tmp_path: Path, drawn: list[Any]) -> None:
    entries = torch.tensor([[-2.0, -1e-5, 0.0, 0.0], [1e-5, 1e-3, 1.0, 5.0]])
    diagonal({"w": entries}).plot(tmp_path / "d.png")
    axes = histogram(drawn)
    counts = dict.fromkeys((POSITIVE, NEGATIVE), 0.0)
    for stairs in (patch for patch in axes.patches if isinstance(patch, StepPatch)):
        (colour,) = (c for c in counts if stairs.get_facecolor()[:3] == to_rgba(c)[:3])
        counts[colour] += stairs.get_data().values.sum()
    assert counts == {POSITIVE: 4.0, NEGATIVE: 2.0}
    assert {"25% negative", "50% positive", "2 exactly zero"} <= {text.get_text() for text in axes.texts}


@pytest.mark.parametrize(("method", "marked"), [("exact", False), ("hutchinson", True)])
def test_the_noise_is_marked_unless_exact(method: str, marked: bool, tmp_path: Path, drawn: list[Any]) -> None:
    diagonal({"w": normal(6, 4)}, method, error=0.25).plot(tmp_path / "d.png")
    noted = [text for text in histogram(drawn).texts if "standard error" in text.get_text()]
    assert bool(noted) == marked
    if marked:
        assert noted[0].xy[0] == 0.25
    assert any("relative error" in text.get_text() for text in drawn[0].texts) == marked


def test_one_probe_has_no_error_to_mark(tmp_path: Path, drawn: list[Any]) -> None:
    diagonal({"b": normal(4)}, "hutchinson", error=float("inf")).plot(tmp_path / "d.png")
    assert not [text for text in histogram(drawn).texts if "standard error" in text.get_text()]
