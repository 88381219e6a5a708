"""A rank that is killed at any moment ends the others in time, and the run goes on from its checkpoint."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from launching import Started, start_command

import hesscope as hs

LONG = [
    *("density", "--model", "demo", "--data", "demo", "--length", "64", "--sequences", "6", "--batch-size", "2"),
    *(
        "--dtype",
        "float64",
        "--params",
        "model.layers.3.*",
        "--probes",
        "6",
        "--steps",
        "60",
        "--checkpoint-every",
        "0",
    ),
]
#: Connections break at once; what naming the rank takes, on a busy machine.
BROKEN = 20.0
#: With --timeout 3, before all have joined: twice ten times that, and what a busy machine adds.
STATED = 75.0


#: What the ranks that are left may say.
CAUSES = (
    "stopped without a word: killed",
    "has not come: not started, or stopped before",
    "keeps the ranks' store does not answer",
    "Could not join the other processes within 30 seconds",
)


def start(folder: Path, ranks: int, *more: str) -> dict[int, Started]:
    """The command on so many ranks."""
    return start_command(folder, ranks, *LONG, *more)


def wait_for_checkpoint(folder: Path, processes: dict[int, Started]) -> None:
    """Until the run at work has written one."""
    began = _state(folder)
    while _state(folder) == began:  # a moment at work, not in the imports
        assert all(process.poll() is None for process in processes.values())
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "kills"), [("data", 10), ("fsdp", 2)])
def test_kills_at_random_moments_end_with_the_same_numbers(layout: str, kills: int, tmp_path: Path) -> None:
    """Every other one soon after a checkpoint, and every other one at any moment from the start on."""
    # Without a basis rounding grows from step to step, and another order of summing with it.
    more = ("--engine", "streamed", "--basis", "--steps", "15") if layout == "fsdp" else ("--steps", "20")
    began = time.monotonic()
    whole = start(tmp_path / "whole", 1, *more)
    assert whole[0].wait(timeout=240) == 0
    seconds = time.monotonic() - began
    moments, resumed, out = random.Random(0), [], tmp_path / "out"
    for kill in range(kills):
        ranks, at_work = 3 if kill == kills // 2 else 2, kill % 2 == 0
        processes = start(out, ranks, *more, "--layout", layout, *(() if at_work else ("--timeout", "3")))
        if at_work:
            wait_for_checkpoint(out, processes)
        time.sleep(moments.uniform(0.0, 0.4 if at_work else seconds))
        victim = moments.randrange(ranks)
        processes[victim].kill()
        codes = ends(processes, BROKEN if at_work else STATED)
        if out.exists():  # it had come to its end
            resumed.append(same(out, tmp_path / "whole"))
            shutil.rmtree(out)
            continue
        for rank in processes.keys() - {victim}:
            assert codes[rank] == 1
            assert any(cause in said_by(tmp_path, rank) for cause in CAUSES)
            assert said_by(tmp_path, rank).count("hesscope: rank") == 1
            assert "Traceback" not in said_by(tmp_path, rank)
    assert set(ends(start(out, 2, *more, "--layout", layout), 240).values()) == {0}
    resumed.append(same(out, tmp_path / "whole"))
    assert sum(resumed) >= max(1, kills // 2 - len(resumed))


def ends(processes: dict[int, Started], within: float) -> dict[int, int]:
    """The statuses of ranks that stop in time."""
    stop = time.monotonic() + within
    try:
        return {rank: process.wait(max(0.0, stop - time.monotonic())) for rank, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def same(folder: Path, expected: Path) -> int:
    """Hold a folder's numbers to another's; returns how often the run was resumed."""
    found, whole = hs.load(folder), hs.load(expected)
    assert found.products == whole.products
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(found.tensors()[name], tensor, rtol=1e-8, atol=1e-9 * float(tensor.abs().max()))
    return int(found.provenance["resumed"])


def said_by(folder: Path, rank: int) -> str:
    """What a rank has written to its errors."""
    return (folder / f"{rank}.err").read_text()


def _state(folder: Path) -> float:
    """When the checkpoint was last written."""
    path = folder.parent / f"{folder.name}.partial" / "state.safetensors"
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
