"""A rank that is killed at any moment ends the others in time, and the run goes on from its checkpoint."""

from __future__ import annotations

import random
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
#: The heartbeat's timeout, and what a busy machine adds; mostly connections break at once.
STATED = 75.0


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
@pytest.mark.parametrize(("layout", "kills"), [("data", 10), ("fsdp", 4)])
def test_kills_at_random_moments_end_with_the_same_numbers(layout: str, kills: int, tmp_path: Path) -> None:
    # Without a basis rounding grows from step to step, and another order of summing with it.
    engine = ("--engine", "streamed", "--basis", "--steps", "30") if layout == "fsdp" else ()
    whole = start(tmp_path / "whole", 1, *engine)
    assert whole[0].wait(timeout=240) == 0
    moments, named = random.Random(0), 0
    for kill in range(kills):
        ranks = 3 if kill == kills // 2 else 2
        processes = start(tmp_path / "out", ranks, *engine, "--layout", layout)
        victim = moments.randrange(ranks)
        wait_for_checkpoint(tmp_path / "out", processes)
        time.sleep(moments.uniform(0.0, 0.4))
        processes[victim].kill()
        killed = time.monotonic()
        for rank, process in processes.items():
            process.wait(timeout=STATED)
            said = said_by(tmp_path, rank)
            named += rank != victim and "hesscope: rank" in said
            if rank != victim:
                assert process.returncode == 1, said
                assert (
                    f"Rank {victim} stopped without a word" in said or "keeps the ranks' store does not answer" in said
                )
                assert "Traceback" not in said
        assert time.monotonic() - killed < STATED
        assert not (tmp_path / "out").exists()
    assert named == kills + 1
    processes = start(tmp_path / "out", 2, *engine, "--layout", layout)
    assert [process.wait(timeout=240) for process in processes.values()] == [0, 0]
    found, expected = hs.load(tmp_path / "out"), hs.load(tmp_path / "whole")
    assert found.products == expected.products
    assert found.provenance["resumed"] >= kills - 2
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(found.tensors()[name], tensor, rtol=1e-8, atol=1e-9 * float(tensor.abs().max()))


def said_by(folder: Path, rank: int) -> str:
    """What a rank has written to its errors, without the log of torch's own C++ parts."""
    lines = (folder / f"{rank}.err").read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("["))


def _state(folder: Path) -> float:
    """When the checkpoint was last written."""
    path = folder.parent / f"{folder.name}.partial" / "state.safetensors"
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
