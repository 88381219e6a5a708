"""Block heatmaps: sign, borders, names and units, from one coordinate to thousands."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_by_hand import block, labels, provenance

from hesscope.figures.heatmap import draw_block, pool
from hesscope.figures.segments import parameters, rows, shorten, spaced

MANY = labels(**{f"model__layers__{i}__mlp__up_proj__weight": (2,) for i in range(60)})
TWO = labels(a__q__weight=(2, 3), a__k__bias=(4,))


def symmetric(n: int) -> torch.Tensor:
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    return A + A.T


CASES = {
    "one coordinate": (symmetric(1), labels(w=())),
    "one row": (symmetric(5), None),
    "a vector": (symmetric(7), labels(b=(7,))),
    "zero": (torch.zeros(4, 4), labels(w=(2, 2))),
    "negative only": (-symmetric(4).abs(), labels(w=(2, 2))),
    "two parameters": (symmetric(10), TWO),
    "many rows": (symmetric(90), labels(w=(45, 2))),
    "many parameters": (symmetric(len(MANY)), MANY),
    "not finite": (torch.tensor([[torch.nan, 1.0], [1.0, -2.0]]), None),
}


@pytest.mark.parametrize(
    ("case", "absolute"),
    [*((case, False) for case in CASES), ("zero", True), ("negative only", True), ("one row", True)],
)
def test_every_block_is_drawn_with_white_zeros(case: str, absolute: bool, tmp_path: Path, drawn: list[Any]) -> None:
    matrix, names = CASES[case]
    draw_block(block(matrix, names), tmp_path / "b.png", absolute)
    image = drawn[0].axes[0].images[0]
    assert image.get_interpolation() == "nearest"
    assert image.to_rgba(np.zeros((1, 1)))[0, 0].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert image.norm.vmin == (0.0 if absolute else -image.norm.vmax)


def test_positive_is_warm_and_negative_is_cold(tmp_path: Path, drawn: list[Any]) -> None:
    block(torch.tensor([[3.0, -2.0], [-2.0, 1.0]])).plot(tmp_path / "b.png")
    image = drawn[0].axes[0].images[0]
    colours = image.to_rgba(image.get_array())
    red, blue = colours[..., 0], colours[..., 2]
    assert ((red > blue) == np.array([[True, False], [False, True]])).all()


def test_title_colour_bar_and_names_say_what_is_shown(tmp_path: Path, drawn: list[Any]) -> None:
    block(symmetric(10), TWO).plot(tmp_path / "b.svg")
    figure = drawn[0]
    said = " ".join(text.get_text() for text in figure.texts)
    assert "10 × 10" in said
    assert "asymmetry 1.0e-07" in said
    axes, bar = figure.axes
    assert bar.get_ylabel() == "∂²R / ∂θ$_i$ ∂θ$_j$  [nats per squared weight]"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["q.weight", "k.bias"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["q.weight", "k.bias"]
    # Fine borders between rows and strong ones between parameters: vertical, then horizontal.
    places = [[float(s[0, way % 2]) for s in lines.get_segments()] for way, lines in enumerate(axes.collections)]
    assert places == [[2.5, 5.5], [2.5, 5.5], [5.5], [5.5]]


@pytest.mark.parametrize(
    ("changed", "label"),
    [
        (provenance("perplexity"), "∂²P / ∂θ$_i$ ∂θ$_j$  [perplexity per squared weight]"),
        (provenance(loss="SquaredErrorLoss"), "∂²R / ∂θ$_i$ ∂θ$_j$  [loss per squared weight]"),
        ({"operator": {"operator": "matrix", "size": 2}}, "A$_{ij}$"),
        ({}, "A$_{ij}$"),
    ],
)
def test_units_follow_the_objective(changed: Any, label: str, tmp_path: Path, drawn: list[Any]) -> None:
    block(symmetric(2), provenance=changed).plot(tmp_path / "b.png")
    assert drawn[0].axes[1].get_ylabel() == label


@pytest.mark.parametrize("case", ["many parameters", "many rows", "two parameters", "a vector"])
def test_names_never_touch(case: str, tmp_path: Path, drawn: list[Any]) -> None:
    block(*CASES[case]).plot(tmp_path / "b.png")
    boxes = [t.get_window_extent() for t in drawn[0].axes[0].get_yticklabels() if t.get_text()]
    boxes.sort(key=lambda box: box.y0)
    assert len(boxes) > 1
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))


def test_rows_of_one_weight_are_named(tmp_path: Path, drawn: list[Any]) -> None:
    block(symmetric(6), labels(m__w=(2, 3))).plot(tmp_path / "b.png")
    axes = drawn[0].axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["[0, :]", "[1, :]"]
    assert axes.get_xlabel() == "rows of m.w"


def test_large_blocks_get_a_pixel_an_entry_and_huge_ones_their_strongest_entries(tmp_path: Path) -> None:
    from PIL import Image

    n = 900
    path = block(torch.eye(n), labels(w=(n,))).plot(tmp_path / "b.png")
    with Image.open(path) as picture:
        assert picture.width > n
    A = np.arange(25.0).reshape(5, 5)
    A[0, 0] = -50.0
    cells, k = pool(A, 3)
    assert k == 2
    assert cells.tolist() == [[-50.0, 8.0, 9.0], [16.0, 18.0, 19.0], [21.0, 23.0, 24.0]]
    assert pool(A, 5)[1] == 1


def test_segments_follow_labels() -> None:
    assert [(s.name, s.start, s.stop) for s in parameters(TWO)] == [("a.q.weight", 0, 6), ("a.k.bias", 6, 10)]
    assert [s.name for s in rows(TWO)] == ["a.q.weight[0, :]", "a.q.weight[1, :]", "a.k.bias"]
    assert [s.name for s in parameters(["scale"])] == ["scale"]
    assert shorten(["a.b.c", "a.b.d"]) == ("a.b", ["c", "d"])
    assert shorten(["a.b", "a.b.c"]) == ("a", ["b", "b.c"])
    assert shorten(["only.one"]) == ("", ["only.one"])
    kept = spaced(parameters(MANY), 10.0)
    assert 1 < len(kept) < 60
    assert all(b.centre - a.centre >= 10 for a, b in itertools.pairwise(kept))
