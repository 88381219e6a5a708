"""One command in several processes: the ranks that torchrun starts work together, and rank 0 speaks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from hesscope.errors import HesscopeError

if TYPE_CHECKING:
    from torch import nn

    from hesscope.communicator import Communicator
    from hesscope.problem import Problem

LAYOUTS = ("data", "fsdp", "hsdp")
_COMM: ContextVar[Communicator | None] = ContextVar("comm", default=None)


def comm() -> Communicator:
    """The ranks of this command."""
    from hesscope.communicator import ALONE

    return _COMM.get() or ALONE


def started_by_launcher() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def require_layout(layout: str) -> None:
    """Raises HesscopeError for an unknown layout, and for one that divides weights where there is one process."""
    if layout not in LAYOUTS:
        raise HesscopeError(f"Expected --layout to be {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}, got {layout!r}.")
    if layout != "data" and _COMM.get() is None:
        raise HesscopeError(f"Expected several processes with --layout {layout}; put torchrun before the command.")


def divided_model(layout: str, load: Callable[[], nn.Module], skeleton: Callable[[], nn.Module]) -> nn.Module:
    """A model whose weights are divided among the ranks: rank 0 alone loads it, on the CPU, and no device holds it whole."""
    from hesscope.parallel import mesh_of, shard_model

    ranks = comm()
    with ranks.summed():
        model = load() if ranks.rank == 0 else skeleton()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return shard_model(model, mesh_of(layout, ranks.device_type, local, ranks.probe_groups), ranks)


def shared(problem: Problem, options: dict[str, Any]) -> Problem:
    """The problem with its batches divided among the ranks of this command; all must have the same, and the same options."""
    if _COMM.get() is None:
        return problem
    from hesscope.parallel import divided

    return divided(problem, comm(), {name: repr(value) for name, value in options.items()})


@contextmanager
def in_ranks(timeout: float, probe_groups: int = 1) -> Iterator[None]:
    """Inside, the processes that torchrun has started are one command; only rank 0 writes to the terminal."""
    if not started_by_launcher():
        if probe_groups != 1:
            raise HesscopeError(
                f"Expected several processes with --probe-groups {probe_groups}; put torchrun before the command."
            )
        yield
        return
    from hesscope.parallel import launched

    with launched(timeout, probe_groups) as found, ExitStack() as stack:
        if found.rank > 0:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        token = _COMM.set(found)
        try:
            with found.watched():
                yield
        finally:
            _COMM.reset(token)


def speaks() -> bool:
    """Whether this process says what all of them have to say."""
    return not started_by_launcher() or os.environ["RANK"] == "0"


def say(sentence: str) -> None:
    """One sentence on the error stream, with the rank that says it."""
    rank = f"rank {os.environ['RANK']}: " if started_by_launcher() else ""
    print(f"hesscope: {rank}{sentence}", file=sys.__stderr__ if rank else sys.stderr, flush=True)
