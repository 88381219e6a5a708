"""From the bytes of tensors to what the operating system sees: the allocator keeps gaps between blocks that it cannot use.

glibc rounds a request for aligned memory up before it looks for a gap, so that the gap of a block does not take a block of
the same size, and small things settle in between: a heap of tensors of middling size holds half as much again as they need.
How much depends on the order of sizes and ends, which a dry run knows. It is replayed through the allocator itself.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from array import array
from functools import cache
from pathlib import Path
from statistics import median

import torch

#: Sizes of the small blocks that come with a tensor, a guess a line: which gaps they settle in is a matter of chance.
_SMALL = ((32, 48, 64, 80), (48, 48, 48), (48, 64, 96, 80))
#: Blocks from this size on are mapped, once a process has worked for a while.
_THRESHOLD = 2**24
#: Libraries' own buffers and code that is loaded when it is first used.
_ONCE = 40 * 2**20
#: Where there is nothing to replay through.
_ELSEWHERE = 1.1


def resident_bytes(trace: array[int], peak: int, device: torch.device) -> int:
    """The most memory that a run with these allocations adds to a process; on a GPU, what its allocator hands out."""
    if device.type == "cuda":
        return peak
    if not _has_glibc():
        return int(_ELSEWHERE * peak) + _ONCE
    known = _replayed(trace)
    return (int(median(known)) if known else int(_ELSEWHERE * peak)) + _ONCE


def _replayed(trace: array[int]) -> list[int]:
    """A figure a guess; none where the replay fails, as where the system does not promise memory that it does not have."""
    script, found = Path(__file__).with_name("replay.py"), []
    with tempfile.TemporaryFile() as file:
        file.write(trace.tobytes())
        file.flush()
        runs = []
        for small in _SMALL:
            command = [sys.executable, "-I", "-S", str(script), str(_THRESHOLD), *map(str, small)]
            # Of the offset in a file that processes share; each reads from a description of its own.
            source = open(f"/proc/self/fd/{file.fileno()}", "rb")  # noqa: SIM115
            runs.append(
                (source, subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
            )
        for source, run in runs:
            output, _ = run.communicate()
            source.close()
            found += [int(output)] if run.returncode == 0 else []
    return found


@cache
def _has_glibc() -> bool:
    import ctypes

    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")
