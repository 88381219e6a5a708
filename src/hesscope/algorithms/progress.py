"""How far a run is, and when it will be done."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

#: The rate remembers so many seconds, or a quarter of the time so far where that is more.
_MEMORY = 30.0
#: Seconds between two lines, where there is no terminal.
LINE_EVERY = 60.0
_BAR_EVERY = 0.1


class Pace:
    """Seconds a product, from steps as they come, and the time left at that rate.

    With steps of dt_i seconds and dp_i products, and weights w_i that halve with every `memory` seconds of age, the rate
    is sum w_i dt_i / sum w_i dp_i. The first step, which builds graphs and warms caches, does not count. Old steps fade,
    because some algorithms slow down as they go (a Lanczos basis grows); not too soon, because others go up and down.
    """

    def __init__(self) -> None:
        self._steps, self._elapsed = 0, 0.0
        self._seconds, self._products = 0.0, 0.0

    def observe(self, seconds: float, products: int) -> None:
        """Take in one step."""
        self._steps += 1
        if self._steps == 1:
            return
        self._elapsed += seconds
        kept = 0.5 ** (seconds / max(_MEMORY, self._elapsed / 4))
        self._seconds = kept * self._seconds + seconds
        self._products = kept * self._products + products

    @property
    def rate(self) -> float | None:
        """Seconds a product; None until two steps have been seen."""
        return self._seconds / self._products if self._products > 0 else None

    def left(self, products: int) -> float | None:
        """Seconds that so many products will take."""
        return None if self.rate is None else self.rate * max(products, 0)


class Measured(Protocol):
    """What progress is shown of."""

    description: str
    at_most: bool

    @property
    def expected(self) -> int: ...

    def note(self) -> str: ...


class Progress(ABC):
    """Where progress is shown."""

    def __init__(self, run: Measured, every: float) -> None:
        self._run, self._every = run, every
        self._pace = Pace()
        self._at = self._shown = time.monotonic()

    def update(self, products: int, done: int) -> None:
        """A step has ended that took `products`; `done` of them were made in all, before a resumption too."""
        now = time.monotonic()
        self._pace.observe(now - self._at, products)
        self._at = now
        if now - self._shown >= self._every:
            self._shown = now
            self.show(done, self._remaining(done))

    @abstractmethod
    def show(self, done: int, remaining: str) -> None:
        """Draw."""

    def _remaining(self, done: int) -> str:
        return remaining(self._pace.left(self._run.expected - done), self._run.at_most)

    def line(self, done: int, remaining: str) -> str:
        """Everything in one line, such as `trace: 34 of 100 products (34%), 1.2 s each, 1 min 20 s left; 3.1 +- 0.2`."""
        total = self._run.expected
        rate = "" if self._pace.rate is None else f", {self._pace.rate:.2g} s each"
        note = f"; {said}" if (said := self._run.note()) else ""
        share = min(100, 100 * done // max(total, 1))
        return f"{self._run.description}: {done} of {total} products ({share}%){rate}, {remaining}{note}"


class _Lines(Progress):
    def show(self, done: int, remaining: str) -> None:
        print(f"hesscope: {self.line(done, remaining)}", file=sys.stderr, flush=True)


class _Bar(Progress):
    def __init__(self, run: Measured, draw: Callable[[int, int, str, str], None]) -> None:
        super().__init__(run, _BAR_EVERY)
        self._draw = draw

    def show(self, done: int, remaining: str) -> None:
        self._draw(done, self._run.expected, remaining, self._run.note())


def remaining(seconds: float | None, at_most: bool = False) -> str:
    """The time left in words."""
    if seconds is None:
        return "time left not known yet"
    return f"{'at most ' if at_most else ''}{duration(seconds)} left"


def duration(seconds: float) -> str:
    """Seconds in words, no more exactly than anyone needs: 40 s, 3 min 20 s, 2 h 05 min, 1 d 4 h."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


@contextmanager
def progress(run: Measured, done: int = 0) -> Iterator[Progress]:
    """A bar on the terminal's error stream; where there is no terminal a line a minute."""
    if not sys.stderr.isatty():
        yield _Lines(run, LINE_EVERY)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    words = (TextColumn("{task.fields[left]}"), TextColumn("{task.fields[note]}"))
    with RichProgress(*columns, *words, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(run.description, total=run.expected, completed=done, left="", note="")
        yield _Bar(
            run, lambda done, total, left, note: bar.update(task, completed=done, total=total, left=left, note=note)
        )
