"""Start the ranks of a test as torchrun would, on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RANK = Path(__file__).parent / "rank.py"


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    paths = [str(RANK.parent), str(RANK.parents[1]), *sys.path]
    fixed = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": os.pathsep.join(paths)}
    return {**os.environ, **fixed} | {name: str(value) for name, value in own.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(ranks: int, folder: Path, *programs: str, seconds: float = 900.0) -> list[dict[str, Any]]:
    """What the programs return on every rank."""
    port = free_port()
    started = [
        subprocess.Popen([sys.executable, str(RANK), str(folder), *programs], env=environment(rank, ranks, port))
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * ranks
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
