"""Runs an algorithm step by step: progress, cost, provenance."""

from __future__ import annotations

import platform
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from hesscope.algorithms.probing import probe
from hesscope.operators import Operator

#: A run of at least so many products is preceded by a probe of the operator.
LONG_RUN = 100


class Iteration(ABC):
    """An algorithm under way. `step` does a bounded amount of work; nothing else changes the state."""

    #: What the progress bar says.
    description: str
    #: Products expected in all: a number to measure progress by, not a promise.
    expected: int

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether there is nothing left to do."""

    @abstractmethod
    def step(self) -> None:
        """Spend a few products."""

    def note(self) -> str:
        """What is worth saying at this moment, for the progress bar."""
        return ""


def drive(H: Operator, iteration: Iteration, options: dict[str, Any]) -> dict[str, Any]:
    """Step until done; returns the fields every result has: products, units, seconds, provenance."""
    began = time.perf_counter()
    products, units = H.products, H.units
    report: dict[str, float] | None = None
    if iteration.expected >= LONG_RUN:
        # The probe's own cost, graphs built for it included, stands in its report and not in the result's.
        report = probe(H) | {"products": H.products - products, "units": H.units - units}
        products, units = H.products, H.units
    with _progress(iteration) as update:
        while not iteration.done:
            iteration.step()
            update(H.products - products, iteration.note)
    return {
        "products": H.products - products,
        "units": H.units - units,
        "seconds": time.perf_counter() - began,
        "provenance": provenance(H, options) | {"probe": report},
    }


def provenance(H: Operator, options: dict[str, Any]) -> dict[str, Any]:
    """What a result was computed from and with."""
    return {
        "problem": H.origin(),
        "selection": H.space.describe(),
        "operator": H.describe(),
        "options": options,
        "versions": versions(),
    }


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


@contextmanager
def _progress(iteration: Iteration) -> Iterator[Any]:
    """A bar on the terminal's error stream; nothing where there is no terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(iteration.description, total=iteration.expected, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note())
