"""Engines by name, and the choice between them."""

from __future__ import annotations

from hesscope.engines.auto import Auto
from hesscope.engines.base import Engine
from hesscope.engines.finite_difference import FiniteDifference
from hesscope.engines.forward_mode import ForwardOverReverse, ReverseOverForward
from hesscope.engines.reverse_over_reverse import ReverseOverReverse
from hesscope.errors import HesscopeError

ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (ReverseOverReverse, ForwardOverReverse, ReverseOverForward, FiniteDifference)
}


def make_engine(name: str) -> Engine:
    """The engine of that name; "auto" begins with reverse-over-reverse and measures the others in a long run."""
    if name == "auto":
        return Auto()
    if name not in ENGINES:
        *others, last = ENGINES
        raise HesscopeError(f"Expected engine to be auto, {', '.join(others)} or {last}, got {name!r}.")
    return ENGINES[name]()
