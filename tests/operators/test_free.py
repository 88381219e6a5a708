"""Ranks divide the memory that they share, and a vector has to fit on each of its devices."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.algorithms.structure import of_block
from hesscope.communicator import ALONE, Alone
from hesscope.memory import UNLIMITED
from hesscope.operators import free
from hesscope.operators.batch_columns import BatchColumns
from hesscope.operators.free import free_on, short_of, vectors_that_fit
from hesscope.operators.graphs import graph_memory_of
from hesscope.operators.probed_diagonal import ProbedDiagonal

CPU = torch.device("cpu")
GPUS = torch.device("cuda", 0), torch.device("cuda", 1)
FREE = {CPU: 1200, GPUS[0]: 600, GPUS[1]: 400}


class Alike(Alone):
    """One of several ranks of a machine, all of them like this one."""

    ranks = 4

    def gathered(self, value: Any) -> list[Any]:
        return [value] * self.ranks


class Own(Alike):
    """The same, each with GPUs of its own, and one with less that is free than this one."""

    def gathered(self, value: Any) -> list[Any]:
        if value is None:
            return [None, None, ("cuda:1", 500.0, 10), ("cpu", 8.0, 4)]
        if isinstance(value, int):
            return [value, 3, 50, 60]
        if isinstance(value[0], int):
            return [value, (20, 10), (900, 300), (900, 300)]
        node, places = value
        return [
            (node, [p if p == "memory" else f"{p} of {rank}" for p in places]) if rank else value for rank in range(4)
        ]


class Second(Alone):
    """Another rank."""

    rank = 1


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs."""
    monkeypatch.setattr(free, "available_bytes", lambda device: FREE[device])
    monkeypatch.setattr(free, "_name_of_gpu", str)


def space(sizes: dict[torch.device, int]) -> Any:
    """Vectors that have so many numbers on each of some devices."""
    own = sum(sizes.values())
    return SimpleNamespace(own_size=own, sizes=lambda device: sizes if device is None else {device: own})


def test_one_process_has_all() -> None:
    assert free_on(ALONE, [CPU]) == (1200, 1200)
    assert free_on(ALONE, [*GPUS, CPU, torch.device("meta")]) == (2200, 400)


def test_ranks_divide_what_they_share() -> None:
    assert free_on(Alike(), [CPU]) == (300, 300)
    assert free_on(Alike(), [*GPUS, CPU]) == (550, 100)
    assert vectors_that_fit(Alike(), space({CPU: 10}), 4) == 7


def test_all_reckon_with_the_poorest() -> None:
    assert free_on(Own(), GPUS) == (20, 10)
    assert vectors_that_fit(Own(), space({GPUS[0]: 10}), 4) == 3


def test_what_one_rank_lacks_is_said_on_all() -> None:
    assert short_of(ALONE, {CPU: 1200}) is None
    assert short_of(ALONE, {GPUS[0]: 600, CPU: 1201}) == ("cpu", 1201, 1200)
    assert short_of(ALONE, {CPU: 700, torch.device("meta"): 600}) == ("cpu", 1300, 1200)
    assert short_of(Alike(), {CPU: 301}) == ("cpu", 301, 300)
    assert short_of(Own(), {GPUS[0]: 1}) == ("cuda:1", 500.0, 10)


def shared(problem: hs.Problem) -> hs.Problem:
    """A problem that four ranks of a machine work on."""
    problem.comm = Alike()
    return problem


def linear() -> hs.Problem:
    model = torch.nn.Linear(8, 8, bias=False)
    return hs.supervised(model, [(torch.ones(2, 8), torch.zeros(2, 8))], loss="mse")


def test_ranks_that_share_memory_keep_graphs_in_their_parts_of_it() -> None:
    problem = shared(linear())
    assert (graph_memory_of(linear(), None).limit, graph_memory_of(problem, None).limit) == (600, 150)
    assert (ProbedDiagonal(linear(), hs.select(linear()), None)._limit) == 600
    assert (ProbedDiagonal(problem, hs.select(problem), None)._limit) == 150


def test_ranks_that_share_memory_hold_copies_of_a_batch_in_their_parts_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(problem: hs.Problem) -> BatchColumns:
        return BatchColumns(problem, hs.select(problem, "*h.1.mlp.c_fc.weight"), "positions")

    one, four = (hs.causal_lm(tiny("gpt2"), ragged_batches()[:1]) for _ in range(2))
    monkeypatch.setitem(FREE, CPU, 2**40)
    wide = run(one)
    copies = wide._plans[0].copies
    assert copies >= 8
    monkeypatch.setitem(FREE, CPU, 2 * copies * wide.graph_bytes)
    assert run(one)._plans[0].copies == copies
    assert run(shared(four))._plans[0].copies == copies // 4


def test_ranks_that_share_memory_refuse_what_is_no_more_than_all_of_it() -> None:
    exact = hs.block(hs.operator(torch.eye(10)))
    assert of_block(exact).size == 10
    with pytest.raises(hs.HesscopeError, match=r"copy of the 10 x 10 matrix.*at most 6 coordinates"):
        of_block(exact, Alike())
    hs.kfac(linear(), labels="empirical")
    with pytest.raises(hs.HesscopeError, match="Kronecker factors that fit in memory"):
        hs.kfac(shared(linear()), labels="empirical")


def test_gpus_of_ones_own_are_not_divided() -> None:
    assert free._fair(Own(), {"GPU": 400, "memory": 1200}) == {"GPU": 400, "memory": 300}


def test_a_limit_is_each_ranks_own() -> None:
    names = {free._place(comm, CPU) for comm in (ALONE, Second())}
    with hs.memory_limit("1GB"):
        limited = {free._place(comm, CPU) for comm in (ALONE, Second())}
    assert (len(names), len(limited)) == (1, 2)


def test_the_device_with_least_room_decides() -> None:
    assert vectors_that_fit(ALONE, space({GPUS[0]: 10, GPUS[1]: 50}), 4) == 400 // 200
    assert vectors_that_fit(ALONE, space({GPUS[0]: 50, GPUS[1]: 10}), 4) == 600 // 200
    assert vectors_that_fit(ALONE, space({GPUS[0]: 50, GPUS[1]: 10}), 4, CPU) == 1200 // 240


def test_what_is_not_a_gpu_shares_the_machines_memory() -> None:
    assert vectors_that_fit(ALONE, space({CPU: 20, torch.device("meta"): 30}), 4) == 1200 // 200


def test_a_folder_has_what_its_disk_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=8000 if folder == tmp_path else 0))
    sizes = space({GPUS[0]: 10, CPU: 10})
    assert vectors_that_fit(ALONE, sizes, 4, CPU, tmp_path) == 100
    assert vectors_that_fit(Alike(), sizes, 4, None, tmp_path) == 25


def test_no_numbers_fit_without_end() -> None:
    assert vectors_that_fit(ALONE, space({CPU: 0}), 4) == UNLIMITED
