"""Engines by name."""

from __future__ import annotations

from hesscope.engines.base import Engine
from hesscope.engines.finite_difference import FiniteDifference
from hesscope.engines.reverse_over_reverse import ReverseOverReverse
from hesscope.errors import HesscopeError

ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (ReverseOverReverse, FiniteDifference)}


def make_engine(name: str) -> Engine:
    """The engine of that name; "auto" is reverse-over-reverse."""
    if name == "auto":
        return ReverseOverReverse()
    if name not in ENGINES:
        raise HesscopeError(f"Expected engine to be auto, {' or '.join(ENGINES)}, got {name!r}.")
    return ENGINES[name]()
