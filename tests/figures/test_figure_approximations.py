"""Approximations as a picture: all matrices on the block's own scale, and bars as long as the errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.figures.scales import array
from hesscope.results import Approximations


def result(kinds: list[str] | None = None, factor: float = 1.0) -> Approximations:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False)).double()
    problem = hs.supervised(model, [(torch.randn(5, 2, dtype=torch.float64), torch.arange(5) % 2)])
    H = hs.hessian(problem)
    return hs.approximations(H, kinds=kinds, others={"scaled": factor * H})


def panels(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.images and axes.get_label() != "<colorbar>"]


def test_every_matrix_is_drawn_on_the_exact_blocks_scale(tmp_path: Path, drawn: list[Any]) -> None:
    made = result()
    made.plot(tmp_path / "a.png")
    shown = panels(drawn[0])
    assert [axes.get_title(loc="left") for axes in shown] == ["exact", *made.titles]
    matrices = [made.exact, *(made.matrix(name) for name in made.names)]
    for axes, matrix in zip(shown, matrices, strict=True):
        (image,) = axes.images
        assert np.array_equal(np.asarray(image.get_array()), array(matrix))
        assert image.norm is shown[0].images[0].norm
        white = (image.to_rgba(image.get_array())[..., :3] == 1.0).all(-1)
        assert white[array(matrix) == 0].all()
        assert not white.all()
    assert shown[0].images[0].norm.vmax == pytest.approx(float(made.exact.abs().max()))


def test_bars_are_as_long_as_the_errors_and_cut_off_where_they_would_dwarf_the_others(
    tmp_path: Path, drawn: list[Any]
) -> None:
    made = result(["diagonal", "kfac"], factor=9.0)
    made.plot(tmp_path / "a.pdf")
    bars = next(axes for axes in drawn[0].axes if len(axes.patches) == 3 * len(made.names))
    widths = np.array([p.get_width() for p in bars.patches]).reshape(3, -1)
    errors = np.stack([array(x) for x in (made.errors, made.scaled_errors, made.diagonal_errors)])
    assert errors[0, -1] == pytest.approx(8.0)
    assert widths == pytest.approx(np.minimum(errors, 2.0))
    assert [t.get_text() for t in bars.get_yticklabels()] == ["diagonal", "K-FAC", "scaled"]
    assert "cut off" in bars.get_xlabel()
    assert "800.0%" in {text.get_text() for text in bars.texts}


@pytest.mark.parametrize("matrix", [torch.zeros(3, 3), torch.eye(1)])
def test_a_zero_matrix_and_a_single_number(matrix: torch.Tensor, tmp_path: Path, drawn: list[Any]) -> None:
    hs.approximations(hs.operator(matrix), kinds=["diagonal"]).plot(tmp_path / "z.svg")
    assert len(panels(drawn[0])) == 2
