"""Replays a run's allocations through the system's own allocator: run as a script, in a process of its own.

Reads 64-bit whole numbers: a positive one allocates so many bytes, -k frees the k-th allocation (from 1), 0 ends a section; what
comes after the last 0 is left out. From the number that is its second argument on, what is above it is part of a mapping that is written
to. Nothing is written to the memory, so that none is taken. With every tensor come the small
things that describe it, which end up in the gaps between large blocks and keep these from being joined. Prints the most that the
allocator held at any time before it repeats anything, heap and mappings; then the bytes that it got from the system in every section;
then, where that is asked for, those that the last ones get when they come for the sixth time, from a heap that is not given back: it is
only as long as nothing small has settled at its end, which in a real process something soon does.
"""

import array
import ctypes
import sys

#: The number by which glibc's mallopt knows how much may be free at the heap's end before that is given back; -1 is all.
_TRIM_THRESHOLD = -1
_TIMES = 5


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


class _Allocator:
    """malloc and free, and what they hold."""

    def __init__(self, small: list[int]) -> None:
        self._c, self._small = ctypes.CDLL(None), small
        self._c.mallinfo2.restype = _Info
        self._c.malloc.restype, self._c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        self._c.free.argtypes = [ctypes.c_void_p]
        self._c.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
        self._blocks: dict[int, tuple[int | None, ...]] = {}
        self._parts, self._written = dict[int, int](), 0

    @property
    def held(self) -> tuple[int, int]:
        """Bytes of the heap, and of mappings."""
        now = self._c.mallinfo2()
        return int(now.arena), int(now.hblkhd) + self._written

    def write(self, number: int, size: int) -> None:
        self._parts[number] = size
        self._written += size

    def keep_all(self) -> None:
        """Give nothing of the heap back from now on."""
        self._c.mallopt(_TRIM_THRESHOLD, -1)

    def pass_through(self, size: int) -> None:
        self._c.free(self._c.malloc(size))

    def allocate(self, number: int, size: int) -> None:
        own, block = [self._c.malloc(each) for each in self._small], ctypes.c_void_p()
        if self._c.posix_memalign(ctypes.byref(block), 64, size) != 0:
            sys.exit(1)
        self._blocks[number] = (*own, block.value)

    def free(self, number: int) -> None:
        self._written -= self._parts.pop(number, 0)
        for address in self._blocks.pop(number, ()):
            self._c.free(address)


def main(threshold: int, mapped: int, again: int, small: list[int]) -> None:
    """Replay what comes on the standard input, the last `again` sections five times more."""
    events = array.array("q", sys.stdin.buffer.read())
    ends = [i for i, event in enumerate(events) if event == 0]
    sections = list(zip([0, *(end + 1 for end in ends)], ends, strict=False))
    sections += _TIMES * sections[len(sections) - again :]
    memory = _Allocator(small)
    # What is freed raises the size from which blocks are mapped: loading a model has done so.
    memory.pass_through(threshold)
    before = held = memory.held
    most, got, numbers = 0, [], {0: 0}
    for time, (start, end) in enumerate(sections):
        number, fresh, repeated = numbers[start], 0, time >= len(ends)
        if time == len(ends):
            memory.keep_all()
        for event in events[start:end]:
            if event < 0:
                memory.free(-event)
                held = memory.held
                continue
            number += 1
            if event < mapped:
                memory.allocate(number, event)
            else:
                memory.write(number, event - mapped)
            last, held = held, memory.held
            fresh += max(0, sum(held) - sum(last))
            most = most if repeated else max(most, sum(held) - sum(before))
        numbers[end + 1] = number
        got.append(fresh)
    print(most, *got[: len(ends)], *got[len(got) - again :])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), [int(size) for size in sys.argv[4:]])
