"""Engines by name, and the choice between them."""

from __future__ import annotations

from hesscope.engines.auto import Auto
from hesscope.engines.base import Engine
from hesscope.engines.finite_difference import FiniteDifference
from hesscope.engines.forward_mode import ForwardOverReverse, ReverseOverForward
from hesscope.engines.output_tails import Middle
from hesscope.engines.reverse_over_reverse import ReverseOverReverse
from hesscope.engines.streaming import Streamed, StreamedThroughOutputs
from hesscope.engines.through_outputs import ThroughOutputs
from hesscope.errors import HesscopeError

ENGINES: dict[str, type[Engine]] = {
    engine.name: engine
    for engine in (ReverseOverReverse, ForwardOverReverse, ReverseOverForward, Streamed, FiniteDifference)
}


def make_engine(name: str) -> Engine:
    """The engine of that name; "auto" begins with reverse-over-reverse and measures the others on the first batch."""
    if name == "auto":
        return Auto()
    if name not in ENGINES:
        *others, last = ENGINES
        raise HesscopeError(f"Expected engine to be auto, {', '.join(others)} or {last}, got {name!r}.")
    return ENGINES[name]()


def make_output_engine(name: str, middle: Middle) -> Engine:
    """The engine of that name for the matrix J^T M J."""
    if name == Streamed.name:
        return StreamedThroughOutputs(middle)
    if name not in ("auto", ThroughOutputs.name):
        raise HesscopeError(
            f"Expected engine to be auto, {ThroughOutputs.name} or {Streamed.name} for an operator through the outputs, got "
            f"{name!r}."
        )
    return ThroughOutputs(middle, asked=name != "auto")
