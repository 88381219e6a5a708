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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import torch

from hesscope.dryrun.meter import MAPPED

#: Sizes of the small blocks that come with a tensor, a guess a line: which gaps they settle in is a matter of chance. It is those
#: below 64 bytes that settle in the gaps of aligned blocks.
_SMALL = ((16, 24, 32, 40, 48, 56), (32, 32, 48, 48, 56), (8, 16, 24, 32, 48, 56))
#: Blocks from this size on are mapped, once a process has worked for a while.
THRESHOLD = 2**24
#: Libraries' own buffers and code that is loaded when it is first used.
_ONCE = 24 * 2**20
#: Where there is nothing to replay through.
_ELSEWHERE = 1.1


@dataclass(frozen=True)
class Resident:
    """What a run takes of the system.

    Attributes:
        peak: the most memory that it adds to the process.
        fresh: bytes that come anew from the system in each section of the run, and in each of the last ones once the heap has
            stopped giving back and has grown; empty where that is not known, or costs nothing.
    """

    peak: int
    fresh: tuple[int, ...] = ()


def resident(trace: array[int], peak: int, device: torch.device, again: int = 0) -> Resident:
    """What a run with these allocations takes, the last `again` sections repeated; on a GPU, what its allocator hands out."""
    if device.type == "cuda":
        return Resident(peak)
    known = _replayed(trace, again) if _has_glibc() else []
    if not known:
        return Resident(int(_ELSEWHERE * peak) + _ONCE)
    most, *fresh = (int(median(figures)) for figures in zip(*known, strict=True))
    return Resident(most + _ONCE, tuple(fresh))


def _replayed(trace: array[int], again: int) -> list[list[int]]:
    """Figures for every guess; none where the replay fails, as where the system does not promise memory that it does not have."""
    script, found = Path(__file__).with_name("replay.py"), []
    with tempfile.TemporaryFile() as file:
        file.write(trace.tobytes())
        file.flush()
        runs = []
        for small in _SMALL:
            command = [
                sys.executable,
                "-I",
                "-S",
                str(script),
                str(THRESHOLD),
                str(MAPPED),
                str(again),
                *map(str, small),
            ]
            # Of the offset in a file that processes share; each reads from a description of its own.
            source = open(f"/proc/self/fd/{file.fileno()}", "rb")  # noqa: SIM115
            runs.append(
                (source, subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
            )
        for source, run in runs:
            output, _ = run.communicate()
            source.close()
            found += [[int(figure) for figure in output.split()]] if run.returncode == 0 else []
    return found


@cache
def _has_glibc() -> bool:
    import ctypes

    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")
