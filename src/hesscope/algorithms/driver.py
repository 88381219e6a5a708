"""Runs an algorithm step by step: progress, checkpoints, cost, provenance."""

from __future__ import annotations

import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms import state_file
from hesscope.algorithms.checkpoint import Checkpoint, opened, postponed_interrupts
from hesscope.algorithms.identity import identity
from hesscope.algorithms.probing import probe
from hesscope.algorithms.progress import duration, progress
from hesscope.algorithms.state_file import Stored
from hesscope.operators import Operator
from hesscope.space.divided import Outline

#: A run of at least so many products is preceded by a probe of the operator.
LONG_RUN = 100


class Iteration(ABC):
    """An algorithm under way. `step` does a bounded amount of work; nothing else changes the state."""

    #: What the progress bar says.
    description: str
    #: Products expected in all: a number to measure progress by, not a promise.
    expected: int
    #: Whether `expected` is the most it can be and the end may come sooner.
    at_most: bool = False

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether there is nothing left to do."""

    @abstractmethod
    def step(self) -> None:
        """Spend a few products."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that `step` changes and that cannot be computed anew, as nested tensors and JSON values.

        What depended on something that may differ next time, such as free memory, belongs to it. Tensors may be views.
        """

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Continue where a state was taken; its tensors are on the CPU and belong to the iteration from now on."""

    def note(self) -> str:
        """What is worth saying at this moment, for the progress bar."""
        return ""


def drive(
    H: Operator, iteration: Iteration, options: dict[str, Any], checkpoint: str | Path | Checkpoint | None = None
) -> dict[str, Any]:
    """Step until done; returns the fields every result has: products, units, seconds, provenance.

    Args:
        options: everything beside operator and problem that decides the numbers.
        checkpoint: a folder in which the state is kept until the end, and from which the same run is resumed; or a
            `Checkpoint`, which its owner discards.

    Raises:
        HesscopeError: the checkpoint is of another run, or damaged; or a probe of the operator fails.
    """
    with H.comm.watched(), ExitStack() as stack:
        if checkpoint is None:
            return _drive(H, iteration, options, None)
        kept = opened(checkpoint)
        # The files are rank 0's business.
        H.comm.on_first(lambda: _hold(stack, kept))
        fields = _drive(H, iteration, options, kept)
        if kept is not checkpoint:
            H.comm.on_first(kept.discard)
        return fields


def _hold(stack: ExitStack, kept: Checkpoint) -> None:
    stack.enter_context(kept.held())


def _drive(H: Operator, iteration: Iteration, options: dict[str, Any], kept: Checkpoint | None) -> dict[str, Any]:
    cost = _Cost(H)
    named = None if kept is None else identity(H, iteration.description, options, versions())
    saved = None if kept is None or named is None else _found(H, kept, named)
    cost.products_before = H.products  # one product may have gone into the identity
    report: dict[str, float] | None = None
    resumed = 0
    if saved is not None:
        iteration.restore(saved["state"])
        cost.continue_from(saved["cost"])
        report, resumed = saved["probe"], saved["resumed"] + 1
        del saved  # what was read is not to be held through the run
        if H.comm.rank == 0:
            _say_resumed(kept, iteration, cost)
    elif iteration.expected >= LONG_RUN:
        # The probe's own cost, graphs built for it included, stands in its report and not in the result's.
        products, units = H.products, H.units
        report = probe(H)
        report |= {"products": H.products - products, "units": H.units - units}
        cost.products_before, cost.units_before = H.products, H.units

    def snapshot() -> dict[str, Any]:
        state = iteration.state()
        if H.space.divided is not None:
            state = H.space.divided.state_kept(state)
        return {"state": state, "cost": cost.now(), "probe": report, "resumed": resumed}

    _step_until_done(H, iteration, cost, kept, snapshot)
    if kept is not None and kept.keep_finished:
        _write(H, kept, snapshot)
    record = provenance(H, options) | {"probe": report, "resumed": resumed}
    return {**cost.now(), "provenance": record if named is None else record | {"identity": named}}


def _step_until_done(
    H: Operator, iteration: Iteration, cost: _Cost, kept: Checkpoint | None, snapshot: Callable[[], dict[str, Any]]
) -> None:
    postponed = nullcontext(_never) if kept is None else postponed_interrupts()
    with progress(iteration, cost.products) as shown, postponed as asked_to_stop:
        while not iteration.done:
            products = H.products
            iteration.step()
            shown.update(H.products - products, cost.products)
            due = [kept is not None and H.comm.rank == 0 and kept.is_due(last) for last in (False, True)]
            stop, *due = H.comm.any(asked_to_stop(), *due)
            if kept is not None and due[stop]:
                _write(H, kept, snapshot)
            if stop:
                raise KeyboardInterrupt


def _found(H: Operator, kept: Checkpoint, named: dict[str, str]) -> dict[str, Any] | None:
    """What was kept of this run, or None. Of vectors that are divided each rank keeps its rows while rank 0 reads the file."""
    if H.space.divided is None:
        whole: dict[str, Any] | None = H.comm.on_first(lambda: kept.begin(named))
        return whole
    files: list[Stored] = []
    outline = H.comm.on_first(lambda: kept.begin(named, lambda path: _opened(path, files)))
    if outline is None:
        return None

    def take(x: Outline, count: int) -> Tensor:
        piece = torch.zeros(count, dtype=x.dtype)
        for file in files:
            file.read(x, piece)
        H.comm.give(piece)
        return piece

    saved: dict[str, Any] = H.space.divided.state_taken(outline, take)
    H.comm.on_first(lambda: kept.checked(files[0]))
    return saved


def _opened(path: Path, files: list[Stored]) -> Any:
    files.append(Stored(path))
    return files[0].outline


def _write(H: Operator, kept: Checkpoint, snapshot: Callable[[], dict[str, Any]]) -> None:
    """Rank 0 writes the state; the others give it their rows of what is divided, and wait for it."""
    taken = snapshot()
    with H.comm.summed():
        if H.comm.rank == 0:
            kept.write(taken)
        else:
            state_file.take_part(taken)


def _never() -> bool:
    return False


class _Cost:
    """What a run has spent, in this process and before it was resumed."""

    def __init__(self, H: Operator) -> None:
        self._H = H
        self._began = time.perf_counter()
        self.products_before, self.units_before = H.products, H.units
        self._earlier: dict[str, Any] = {"products": 0, "units": 0.0, "seconds": 0.0}

    def continue_from(self, earlier: dict[str, Any]) -> None:
        """Add to what was spent before."""
        self._earlier = earlier

    @property
    def products(self) -> int:
        return int(self._earlier["products"]) + self._H.products - self.products_before

    def now(self) -> dict[str, Any]:
        """Products, units and seconds so far."""
        return {
            "products": self.products,
            "units": self._earlier["units"] + self._H.units - self.units_before,
            "seconds": self._earlier["seconds"] + time.perf_counter() - self._began,
        }


def _say_resumed(kept: Checkpoint | None, iteration: Iteration, cost: _Cost) -> None:
    if kept is not None and kept.say is not None:
        done = f"{cost.products} of {iteration.expected} products, {duration(cost.now()['seconds'])} of work"
        kept.say(f"{iteration.description}: resumed from the checkpoint in {kept.folder} ({done})")


def provenance(H: Operator, options: dict[str, Any]) -> dict[str, Any]:
    """What a result was computed from and with."""
    error = H.known_error
    return (
        {
            "problem": H.origin(),
            "selection": H.space.describe(),
            "operator": H.describe(),
            "options": options,
            "versions": versions(),
        }
        | ({} if (layout := H.comm.describe()) is None else {"processes": layout})
        | ({} if error is None else {"product_error": error.describe()})
    )


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    # Reading the packages' metadata takes milliseconds, as long as a small estimate.
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("hesscope", "torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
