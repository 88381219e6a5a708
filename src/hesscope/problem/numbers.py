"""Several whole numbers in one argument: 3, "0,3,11", "0-5", ":3", a list, a slice or a range."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable

from hesscope.errors import HesscopeError

Numbers = int | str | slice | range | Iterable[int]

_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?[1-9]\d*))?")
_SPAN = re.compile(r"(\d+)-(\d+)")


def numbers(wanted: Numbers, size: int, what: str, of: str) -> list[int]:
    """The numbers that are wanted out of 0 .. size - 1, in the order given; negative ones count from the end.

    Raises HesscopeError, in terms of `what` (such as "blocks") and of whose they are, where one is out of range, given
    twice or not a number, or where none is left.
    """
    found = [n for part in _parts(wanted, what) for n in _expand(part, size, what, of)]
    if not found:
        raise HesscopeError(f"Expected at least one of the {size} {what} of {of}; {_shown(wanted)} selects none.")
    twice, times = Counter(found).most_common(1)[0]
    if times > 1:
        raise HesscopeError(f"Expected distinct {what}, but {_shown(wanted)} gives {twice} twice.")
    return found


def _parts(wanted: Numbers, what: str) -> list[int | range | slice]:
    """Integers, spans of them and slices, not yet bound to a size."""
    if isinstance(wanted, str):
        return [_parse(part.strip(), what) for part in wanted.split(",")]
    if isinstance(wanted, slice):
        return [wanted]
    try:
        items = list(wanted) if isinstance(wanted, Iterable) else [wanted]
        if any(isinstance(item, bool) for item in items):
            raise TypeError
        return [operator.index(item) for item in items]
    except TypeError:
        raise _not_numbers(str(wanted), what) from None


def _parse(part: str, what: str) -> int | range | slice:
    if part == "all":
        return slice(None)
    if re.fullmatch(r"-?\d+", part):
        return int(part)
    if span := _SPAN.fullmatch(part):
        first, last = int(span[1]), int(span[2])
        if first > last:
            raise HesscopeError(f"Expected {what} from low to high, as in 0-5, got {part!r}.")
        return range(first, last + 1)
    if bounds := _SLICE.fullmatch(part):
        return slice(*(int(x) if x else None for x in bounds.groups()))
    raise _not_numbers(part, what)


def _expand(part: int | range | slice, size: int, what: str, of: str) -> Iterable[int]:
    """A slice is cut off at the end, as in Python; a number that is named, at either end of a span too, has to exist."""
    if isinstance(part, slice):
        return range(size)[part]
    if isinstance(part, int):
        return [_bound(part, size, what, of)]
    return range(_bound(part[0], size, what, of), _bound(part[-1], size, what, of) + 1)


def _bound(n: int, size: int, what: str, of: str) -> int:
    if not -size <= n < size:
        near = size - 1 if n > 0 else 0
        raise HesscopeError(f"Expected {what} of {of} between 0 and {size - 1}, got {n}; the nearest is {near}.")
    return n % size


def _not_numbers(got: str, what: str) -> HesscopeError:
    return HesscopeError(f"Expected {what} as in '0,3,11', '0-5', ':3' or 'all', or a list of integers, got {got!r}.")


def _shown(wanted: Numbers) -> str:
    return repr(wanted) if isinstance(wanted, str) else str(wanted)
