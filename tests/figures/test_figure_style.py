"""The shared look: white zero, two hues that colour-blind readers can tell apart, files written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from made_by_hand import density, diagonal, eigenpairs, trace, verification
from PIL import Image

from hesscope.errors import HesscopeError
from hesscope.figures.style import MAGNITUDE, NEGATIVE, POSITIVE, SIGNED, look, new_figure, save, wrap
from hesscope.results import Result

STARTS = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
# How people without long- or medium-wave cones see linear RGB (Vienot, Brettel and Mollon, 1999).
DEUTERANOPIA = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
PROTANOPIA = np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]])


def luminance(colours: Any) -> Any:
    return np.asarray(colours)[..., :3] @ np.array([0.2126, 0.7152, 0.0722])


def test_zero_is_exactly_white() -> None:
    assert SIGNED(0.5) == (1.0, 1.0, 1.0, 1.0)
    assert MAGNITUDE(0.0) == (1.0, 1.0, 1.0, 1.0)


def test_both_sides_darken_away_from_zero() -> None:
    positive, negative = (luminance(SIGNED(np.linspace(0.5, end, 60))) for end in (1.0, 0.0))
    assert (np.diff(positive) <= 1e-12).all()
    assert (np.diff(negative) <= 1e-12).all()


@pytest.mark.parametrize("sight", [np.eye(3), DEUTERANOPIA, PROTANOPIA], ids=["usual", "deuteranopia", "protanopia"])
@pytest.mark.parametrize("strength", [0.15, 0.3, 0.5])
def test_signs_stay_apart_for_the_colour_blind(sight: Any, strength: float) -> None:
    seen = [sight @ np.array(SIGNED(0.5 + side * strength)[:3]) ** 2.2 for side in (1, -1)]
    assert np.abs(seen[0] - seen[1]).max() > 0.1


def test_the_colour_map_uses_the_colours_of_the_signs() -> None:
    for value, colour in ((5 / 6, POSITIVE), (1 / 6, NEGATIVE)):
        assert np.allclose(SIGNED(value)[:3], matplotlib.colors.to_rgb(colour), atol=0.03)


def test_nothing_global_changes_and_nothing_global_shows(tmp_path: Path, drawn: list[Any]) -> None:
    with matplotlib.rc_context({"axes.facecolor": "black", "text.usetex": True, "savefig.facecolor": "red"}):
        before, backend = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
        trace([1.0, 2.0, 4.0]).plot(tmp_path / "trace.png")
        assert dict(matplotlib.rcParams) == before
        assert matplotlib.get_backend(auto_select=False) == backend
    assert drawn[0].axes[0].get_facecolor() == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("ending", STARTS)
def test_the_ending_decides_the_format(ending: str, tmp_path: Path) -> None:
    with look():
        figure = new_figure(2, 1, "title", ["one", "two"], ["three"])
        path = save(figure, tmp_path / "made" / "on the way" / f"picture{ending}")
        first = path.read_bytes()
        save(figure, path)
    assert first.startswith(STARTS[ending])
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "result",
    [
        density(torch.tensor([[0.0, 1.0], [0.0, 1.1]]), torch.tensor([[0.5, 0.5], [0.4, 0.6]])),
        diagonal({"w": torch.tensor([[1.0, -2.0]])}, "hutchinson", 0.1),
        eigenpairs([3.0, -1.0], [1e-6, 1e-6]),
        verification([1e-7], [1e-4]),
    ],
    ids=lambda result: result.kind,
)
def test_results_reach_a_file(result: Result, tmp_path: Path) -> None:
    path = result.plot(str(tmp_path / "picture.png"))
    assert path == tmp_path / "picture.png"
    with Image.open(path) as picture:
        assert picture.width >= 1000
        assert len(set(picture.convert("L").resize((40, 40)).tobytes())) > 10


@pytest.mark.parametrize("name", ["picture.jpg", "picture", "picture.png.txt"])
def test_other_endings_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with look(), pytest.raises(HesscopeError, match=r"\.png, \.pdf, \.svg"):
        save(new_figure(1, 1, "title"), tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "old.png"
    path.write_bytes(b"old")
    with look():
        figure = new_figure(2, 1, "title")
        figure.text(0, 0, r"$\nosuchsymbol$")
        with pytest.raises(ValueError, match="nosuchsymbol"):
            save(figure, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["old.png"]


def test_lines_break_between_parts_and_stay_within_the_width() -> None:
    assert wrap(["abc", "", "def", "a much longer part"], 20) == ["abc  ·  def", "a much longer part"]
    assert all(len(line) <= 20 for line in wrap(["word " * 30, "end"], 20))
    assert wrap([], 20) == []
