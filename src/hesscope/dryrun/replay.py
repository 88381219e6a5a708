"""Replays a run's allocations through the system's own allocator: run as a script, in a process of its own.

Reads 64-bit whole numbers: a positive one allocates so many bytes, -k frees the k-th allocation (from 1). Nothing is written
to the memory, so that none is taken. With every tensor come the small things that describe it, which end up in the gaps
between large blocks and keep these from being joined. Prints the most that the allocator held at any time, heap and mappings.
"""

import array
import ctypes
import sys


class _Info(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def main(threshold: int, small: list[int]) -> None:
    """Replay what comes on the standard input."""
    events = array.array("q", sys.stdin.buffer.read())
    c = ctypes.CDLL(None)
    c.mallinfo2.restype = _Info
    c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    c.free.argtypes = [ctypes.c_void_p]
    c.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
    # What is freed raises the size from which blocks are mapped: loading a model has done so.
    c.free(c.malloc(threshold))
    before = c.mallinfo2()
    most = 0
    blocks: list[tuple[int | None, ...]] = []
    for event in events:
        if event < 0:
            for address in blocks[-event - 1]:
                c.free(address)
            continue
        own, block = [c.malloc(size) for size in small], ctypes.c_void_p()
        if c.posix_memalign(ctypes.byref(block), 64, event) != 0:
            sys.exit(1)
        blocks.append((*own, block.value))
        now = c.mallinfo2()
        most = max(most, now.arena + now.hblkhd - before.arena - before.hblkhd)
    print(most)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(size) for size in sys.argv[2:]])
