"""Blocks and layers on a heatmap: lines of three strengths, two rows of names, nothing overlapping."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from made_by_hand import block, provenance

from hesscope.figures.heatmap import draw_block
from hesscope.figures.places import places_of
from hesscope.results import Block

OPT = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"]
GPT2 = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
BESIDE = ("model.embed_tokens.weight", "model.final_layer_norm.weight")


def placed(blocks: int, layers: list[str], each: int, beside: tuple[str, ...] = (), bias: bool = False) -> Block:
    """A block over `each` weights of every layer of some trunk blocks, with what stands before and after the trunk."""
    inside = [
        (f"model.layers.{b}.{layer}.{kind}", b, layer)
        for b in range(blocks)
        for layer in layers
        for kind in (["weight", "bias"] if bias else ["weight"])
    ]
    named = [(name, None, None) for name in beside[:1]] + inside + [(name, None, None) for name in beside[1:]]
    labels = [f"{name}[0, {i}]" for name, _, _ in named for i in range(each)]
    described = {name: {"shape": [each], "block": b, "layer": layer} for name, b, layer in named}
    record = provenance()
    record["operator"]["selection"] = {"size": len(labels), "parameters": described}
    A = torch.randn(len(labels), len(labels), generator=torch.Generator().manual_seed(0))
    return block(A + A.T, labels, provenance=record)


def outer_names(figure: Any, across: bool) -> list[Any]:
    """The texts outside the axes, on one side."""
    left = figure.axes[0].get_window_extent().x0
    bold = [t for t in figure.axes[0].texts if t.get_fontweight() == "bold"]
    return [t for t in bold if (t.get_window_extent().x1 >= left) == across]


CASES = {
    "blocks and what is beside": placed(3, OPT, 8, BESIDE),
    "many": placed(12, OPT, 4, BESIDE),
    "narrow names": placed(2, GPT2, 10, BESIDE, bias=True),
    "one layer": placed(12, OPT[:1], 6),
    "a crowd": placed(60, OPT, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_no_name_touches_another_or_the_matrix(case: str, tmp_path: Path, drawn: list[Any]) -> None:
    CASES[case].plot(tmp_path / "b.png")
    figure = drawn[0]
    axes = figure.axes[0]
    names = [*outer_names(figure, True), *outer_names(figure, False)]
    names += [t for t in [*axes.get_xticklabels(), *axes.get_yticklabels()] if t.get_text()]
    boxes = [t.get_window_extent() for t in names]
    assert len(boxes) > 8
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    matrix, (width, height) = axes.get_window_extent(), figure.canvas.get_width_height()
    assert not any(box.overlaps(matrix) for box in boxes)
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)


def test_blocks_outside_and_layers_inside_are_named(tmp_path: Path, drawn: list[Any]) -> None:
    CASES["blocks and what is beside"].plot(tmp_path / "b.png")
    axes = drawn[0].axes[0]
    assert [t.get_text() for t in outer_names(drawn[0], False)] == ["embed_tokens", "block 0", "block 1", "block 2", "final_layer_norm"]  # fmt: skip
    short = ["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"]
    assert [t.get_text() for t in axes.get_yticklabels()] == [t.get_text() for t in axes.get_xticklabels()] == short * 3


def test_lines_are_thickest_between_blocks(tmp_path: Path, drawn: list[Any]) -> None:
    placed(2, ["a", "b"], 10, bias=True).plot(tmp_path / "b.png")
    found = [
        ([float(s[0, 0]) for s in lines.get_segments()], float(lines.get_linewidth()[0]))
        for lines in drawn[0].axes[0].collections[::2]
    ]
    parameters, layers, blocks = found[-3:]
    assert blocks[0] == [39.5]
    assert layers[0] == [19.5, 39.5, 59.5]
    assert len(parameters[0]) == 7
    assert parameters[1] < layers[1] < blocks[1]


def test_a_crowd_of_layers_is_told_in_a_caption(tmp_path: Path, drawn: list[Any]) -> None:
    for case in ("a crowd", "one layer"):
        CASES[case].plot(tmp_path / "b.png")
    captions = [" ".join(t.get_text() for t in f.axes[0].texts if t.get_fontweight() != "bold") for f in drawn]
    assert "in every block: k_proj, v_proj, q_proj, out_proj, fc1, fc2" in captions[0]
    assert captions[1] == "k_proj of every block"


def test_names_that_only_differ_before_the_dot_stay_whole() -> None:
    found = places_of(CASES["narrow names"], CASES["narrow names"].labels)
    assert [s.name for s in found.layers] == GPT2 * 2
    assert [(s.name, s.size) for s in found.blocks] == [("embed_tokens", 10), ("block 0", 80), ("block 1", 80), ("final_layer_norm", 10)]  # fmt: skip


def test_without_a_trunk_in_the_record_parameters_are_named(tmp_path: Path, drawn: list[Any]) -> None:
    labels = [f"{name}[{i}]" for name in ("a.q.weight", "a.k.bias") for i in range(3)]
    draw_block(block(torch.eye(6), labels), tmp_path / "b.png")
    assert [t.get_text() for t in drawn[0].axes[0].get_yticklabels()] == ["q.weight", "k.bias"]


@pytest.mark.slow
@pytest.mark.parametrize("absolute", [False, True])
def test_two_thousand_rows_have_a_pixel_each(absolute: bool, tmp_path: Path) -> None:
    from PIL import Image

    path = placed(10, OPT[:4], 50).plot(tmp_path / "b.png", absolute=absolute)
    with Image.open(path) as picture:
        assert 2000 < min(picture.size) <= max(picture.size) < 3200
    assert path.stat().st_size < 20e6
