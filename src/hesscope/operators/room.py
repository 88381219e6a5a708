"""Whether an engine's products fit into memory, found by a dry run before the first of them, and what to do where they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.utils._pytree import tree_leaves

from hesscope.engines import Auto, Engine
from hesscope.engines.dry import DryProduct, DryRuns, NotDry, largest_batch
from hesscope.engines.streaming import Streamed
from hesscope.errors import HesscopeError
from hesscope.memory import is_unlimited
from hesscope.models import elsewhere, is_shadow, sharded
from hesscope.operators.free import free_on
from hesscope.problem import Problem
from hesscope.space import Space

#: A problem whose rough estimate is below this share of what is free is not looked at any closer.
_PLENTY = 0.25
#: Engines whose vectors may be on another device than the model.
_ACROSS = ("streamed", "reverse-over-reverse")


def make_room(
    engine: Engine, streamed: Callable[[], Engine], problem: Problem, space: Space
) -> tuple[Engine, int | None]:
    """The engine, known to fit, and the bytes that its products leave, where these were looked at.

    An engine that nobody asked for by name gives way to `streamed` where it does not fit. Called by all ranks of several.

    Raises:
        HesscopeError: neither fits; says what takes how much, and what would help.
    """
    if is_shadow(problem.model):
        return engine, None
    if elsewhere(problem.model) is not None:
        reason = "divided among processes" if sharded(problem.model) is not None else "offloaded"
        return _for_elsewhere(engine, streamed, f"the model's weights are {reason}"), None
    if problem.vectors != "device":
        engine = _for_elsewhere(engine, streamed, "the problem's vectors rest elsewhere")
        if problem.device.type != "cpu" and name_of(engine) not in _ACROSS:
            raise HesscopeError(
                f"Expected engine auto or {' or '.join(_ACROSS)} for vectors on the CPU of a model on {problem.device}, got "
                f"{name_of(engine)!r}."
            )
        return engine, None
    if is_unlimited():
        return engine, None
    available, least_of_one = free_on(problem.comm, problem.devices)
    if rough_bytes(problem, space) <= _PLENTY * available:
        return engine, None
    found = problem.comm.on_first(lambda: _decide(engine, streamed, problem, space, available, least_of_one))
    if not found.reason:
        return engine, found.left
    return _giving_way(engine, streamed, found.reason), found.left


@dataclass(frozen=True)
class _Decision:
    """Why the engine gives way, if it does, and what is left; every rank of several takes the first one's."""

    reason: str
    left: int | None


def _decide(
    engine: Engine, streamed: Callable[[], Engine], problem: Problem, space: Space, available: int, least_of_one: int
) -> _Decision:
    try:
        runs = DryRuns(problem, space)
        needed = _resident(runs, engine.for_part)
    except NotDry:
        return _Decision("", None)  # nothing is known, so nothing is refused
    if needed <= available:
        return _Decision("", min(available - needed, least_of_one))
    instead = None if engine.asked else _resident_if_it_runs(runs, streamed)
    if instead is not None and instead <= available:
        reason = f"{_gigabytes(needed)} for {name_of(engine)} do not fit into {_gigabytes(available)}"
        return _Decision(reason, min(available - instead, least_of_one))
    least = needed if instead is None else min(needed, instead)
    free = f"{_gigabytes(available)} of memory that are free" + (" for each process" if problem.comm.ranks > 1 else "")
    raise HesscopeError(
        f"Expected a product of engine {name_of(engine)!r} to fit into the {free}, but it is predicted to take "
        f"{_gigabytes(needed)}"
        + (f" ({_gigabytes(instead)} streamed)" if instead is not None else "")
        + f"; {_advice(problem, engine, least, available)}, or lift the check (--force, hs.memory_limit(None))."
    )


def _for_elsewhere(engine: Engine, streamed: Callable[[], Engine], reason: str) -> Engine:
    """The engine, or in place of one that nobody asked for the one that brings a block's weights at a time."""
    if engine.asked or isinstance(engine, Streamed) or (isinstance(engine, Auto) and engine.settled):
        return engine
    return _giving_way(engine, streamed, reason)


def _giving_way(engine: Engine, streamed: Callable[[], Engine], reason: str) -> Engine:
    other = streamed()
    other.asked = False
    if isinstance(engine, Auto):
        engine.settle(other, reason)
        return engine
    return other


def rough_bytes(problem: Problem, space: Space) -> float:
    """About what a product takes, without looking at the model's code: too much rather than too little, for ordinary models."""
    model, batch = problem.model, problem.batches[largest_batch(problem)]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    width = sum(sum(p.shape) * p.itemsize for p in matrices)
    shapes = [x.shape for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim() >= 1]
    rows = max((s[0] for s in shapes), default=1)
    length = max((s[1] for s in shapes if len(s) == 2), default=1)
    config = getattr(model, "config", None)
    maps = (getattr(config, "num_hidden_layers", None) or 8) * (getattr(config, "num_attention_heads", None) or 8)
    itemsize = max((p.itemsize for p in model.parameters()), default=4)
    activations = 8.0 * rows * length * width + 8.0 * rows * length**2 * maps * itemsize
    return 6.0 * space.size * space.dtype.itemsize + activations


def name_of(engine: Engine) -> str:
    """What runs, for engine="auto" too."""
    return engine.chosen if isinstance(engine, Auto) else engine.name


def _resident(runs: DryRuns, make: Callable[[], Engine]) -> int:
    found: DryProduct = runs.product(make)
    return found.resident


def _resident_if_it_runs(runs: DryRuns, make: Callable[[], Engine]) -> int | None:
    try:
        return _resident(runs, make)
    except HesscopeError:
        return None


def _advice(problem: Problem, engine: Engine, needed: int, available: int) -> str:
    rows = max(
        (len(x) for x in tree_leaves(problem.batches[largest_batch(problem)]) if isinstance(x, Tensor) and x.dim()),
        default=1,
    )
    if rows > 1:
        return f"use batches of {max(1, int(rows * available / needed))} or fewer of their {rows} sequences (--batch-size, microbatch=)"
    other = "" if isinstance(engine, Streamed) or not engine.asked else "take engine='streamed', "
    return f"{other}shorten the sequences or select fewer parameters"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
