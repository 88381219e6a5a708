"""Start the ranks of a test as torchrun would, on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Started = subprocess.Popen[bytes]
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


def start_command(folder: Path, ranks: int, *command: str, only: Sequence[int] | None = None) -> dict[int, Started]:
    """The command on so many ranks, or only some of these; each writes its errors to a file beside the folder, RANK.err."""
    port = free_port()
    words = [sys.executable, "-m", "hesscope", *command, "--output-dir", str(folder)]
    started = {}
    for rank in range(ranks) if only is None else only:
        own = environment(rank, ranks, port) if ranks > 1 else {**os.environ, "OMP_NUM_THREADS": "1"}
        with (folder.parent / f"{rank}.err").open("w") as errors:
            started[rank] = subprocess.Popen(words, env=own, stderr=errors, stdout=subprocess.DEVNULL)
    return started


def run_ranks(
    ranks: int, folder: Path, *programs: str, seconds: float = 900.0, killed: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """What the programs return on every rank but those that are killed on the way."""
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
    left = [rank for rank in range(ranks) if rank not in killed]
    assert codes == [0 if rank in left else -signal.SIGKILL for rank in range(ranks)]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in left]
