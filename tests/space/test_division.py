"""Vectors of which a process has some rows: what is taken for a vector in a state, and how much room one needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hesscope.algorithms import state_file
from hesscope.space import Coordinates, Rows, Space


class _Four:
    """The first of four processes, all of which hold the same numbers."""

    size, collects = 4, True

    def gather_rows(self, own: Tensor, rows: int) -> Tensor:
        return own.repeat(4, *[1] * (own.dim() - 1))[:rows]

    collect = gather_rows

    def total(self, x: Tensor) -> Tensor:
        return 4 * x


@pytest.fixture
def space() -> Space:
    """A matrix and a vector whose rows are divided, and a scalar that is not."""
    cpu, exchange = torch.device("cpu"), _Four()
    rows: Any = Rows(exchange, 0, 2)  # type: ignore[arg-type]
    shapes = {"w": ((8, 3), rows), "b": ((8,), rows), "s": ((), None)}
    return Space([Coordinates(name, shape, torch.float64, cpu, rows=own) for name, (shape, own) in shapes.items()])


def test_vectors_and_single_ones_of_all_or_some_parameters_are_whole_in_a_file_and_nothing_else_changes(
    space: Space, tmp_path: Path
) -> None:
    assert space.divided is not None
    V = space.rademacher(0, range(3))
    one = {name: part[0] for name, part in V.items()}
    state = {
        "several": V,
        "none": space.zeros(0),
        "one": one,
        "of a group": [{"b": V["b"]}, {"b": one["b"]}],
        "sums": {name: torch.zeros((), dtype=torch.float64) for name in V},
        "T": torch.zeros(2, 3),
        "count": 3,
    }
    state_file.write(tmp_path / "state", space.divided.state_kept(state))
    whole = state_file.read(tmp_path / "state")
    assert {name: tuple(x.shape) for name, x in whole["several"].items()} == {"w": (3, 8, 3), "b": (3, 8), "s": (3,)}
    assert {name: tuple(x.shape) for name, x in whole["none"].items()} == {"w": (0, 8, 3), "b": (0, 8), "s": (0,)}
    assert {name: tuple(x.shape) for name, x in whole["one"].items()} == {"w": (8, 3), "b": (8,), "s": ()}
    assert [tuple(x["b"].shape) for x in whole["of a group"]] == [(3, 8), (8,)]
    assert (whole["sums"], whole["T"].shape, whole["count"]) == (state["sums"], (2, 3), 3)
    stored = state_file.Stored(tmp_path / "state")
    again = space.divided.state_taken(
        stored.outline, lambda x, count: stored.read(x, torch.empty(count, dtype=x.dtype))
    )
    stored.finish()
    assert (again["sums"], again["count"]) == (state["sums"], 3)
    for name, part in V.items():
        assert torch.equal(again["several"][name], part)
        assert torch.equal(again["one"][name], one[name])
        assert again["none"][name].shape == (0, *part.shape[1:])
    assert torch.equal(again["of a group"][1]["b"], one["b"])


def test_totals_are_those_of_all_processes(space: Space) -> None:
    ones = {c.name: torch.ones(c.shape, dtype=torch.float64) for c in space.coordinates}
    assert {name: float(x) for name, x in space.totals(lambda c: ones[c.name].sum()).items()} == {
        "w": 24,
        "b": 8,
        "s": 1,
    }
    assert float(space.total(lambda c: ones[c.name].sum())) == space.size == 33


def test_sizes_are_those_of_a_process(space: Space) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert (space.own_size, space.sizes(), space.sizes(gpu)) == (9, {cpu: 9}, {gpu: 9})
    assert space.whole.sizes() == {cpu: 33}
