"""Ranks divide the memory that they share, and a vector has to fit on each of its devices."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hesscope as hs
from hesscope.communicator import ALONE, Alone
from hesscope.memory import UNLIMITED
from hesscope.operators import free
from hesscope.operators.free import free_on, vectors_that_fit

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
