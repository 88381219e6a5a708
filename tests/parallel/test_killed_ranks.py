"""A rank that is killed at any moment ends the others in time, and the run goes on from its checkpoint."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import environment, free_port

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


def start(folder: Path, ranks: int, *more: str) -> list[subprocess.Popen[bytes]]:
    """The command on so many ranks, each of which writes its errors to a file beside the folder."""
    port = free_port()
    command = [sys.executable, "-m", "hesscope", *LONG, *more, "--output-dir", str(folder)]
    started = []
    for rank in range(ranks):
        own = environment(rank, ranks, port) if ranks > 1 else dict(os.environ)
        with (folder.parent / f"{rank}.err").open("w") as errors:
            started.append(subprocess.Popen(command, env=own, stderr=errors, stdout=subprocess.DEVNULL))
    return started


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "kills"), [("data", 10), ("fsdp", 4)])
def test_kills_at_random_moments_end_with_the_same_numbers(layout: str, kills: int, tmp_path: Path) -> None:
    # Without a basis rounding grows from step to step, and another order of summing with it.
    engine = ("--engine", "streamed", "--basis", "--steps", "30") if layout == "fsdp" else ()
    [whole] = start(tmp_path / "whole", 1, *engine)
    assert whole.wait(timeout=240) == 0
    moments, named = random.Random(0), 0
    for kill in range(kills):
        ranks = 3 if kill == kills // 2 else 2
        processes = start(tmp_path / "out", ranks, *engine, "--layout", layout)
        victim = moments.randrange(ranks)
        began = _state(tmp_path)
        while _state(tmp_path) == began:  # a moment at work, not in the imports
            assert all(process.poll() is None for process in processes)
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 0.4))
        processes[victim].kill()
        killed = time.monotonic()
        for rank, process in enumerate(processes):
            process.wait(timeout=STATED)
            said = (tmp_path / f"{rank}.err").read_text()
            named += rank != victim and "hesscope: rank" in said
            if rank != victim:
                assert process.returncode == 1, said
                assert f"Rank {victim} stopped without a word" in said or "keeps the ranks' store is gone" in said
                assert "Traceback" not in said
        assert time.monotonic() - killed < STATED
        assert not (tmp_path / "out").exists()
    assert named == kills + 1
    processes = start(tmp_path / "out", 2, *engine, "--layout", layout)
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    found, expected = hs.load(tmp_path / "out"), hs.load(tmp_path / "whole")
    assert found.products == expected.products
    assert found.provenance["resumed"] >= kills - 2
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(found.tensors()[name], tensor, rtol=1e-8, atol=1e-9 * float(tensor.abs().max()))


def _state(folder: Path) -> float:
    """When the checkpoint was last written."""
    path = folder / "out.partial" / "state.safetensors"
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
