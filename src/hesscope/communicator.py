"""Processes that work on one problem together, each on its share of the batches and all in step; one alone is the plain case.

Every process, a rank, runs the same program on the same numbers. What depends on one rank alone (its share's sum, its clock,
its free memory, its files) passes through the communicator, so that all go on with the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.exchange import Exchange

T = TypeVar("T")


@dataclass
class Own:
    """What a rank has to add beside tensors: `amount` is summed over the ranks, `error` is their largest."""

    amount: float = 0.0
    error: float = 0.0


class Communicator(ABC):
    """What ranks ask of one another. Every method but `rank`, `ranks` and `describe` is called by all of them in the same order."""

    rank: int = 0
    ranks: int = 1
    #: How many groups of ranks divide the vectors of a product; inside a group its ranks divide the batches.
    probe_groups: int = 1
    #: Where collectives work, "cpu" or "cuda".
    device_type: str = "cpu"

    @abstractmethod
    def share(self, weights: Sequence[float]) -> tuple[int, ...]:
        """The pieces of work, of these weights, that are this rank's; every piece is some rank's, and the first is rank 0's."""

    def columns(self, count: int) -> slice:
        """Which of a product's `count` vectors are this rank's; all of them where there are fewer vectors than groups."""
        return slice(0, count)

    def share_of_columns(self, weights: Sequence[float]) -> tuple[int, ...]:
        """The pieces of work, of these weights, that this rank does for its columns where columns are divided."""
        return self.share(weights)

    @abstractmethod
    def summed(
        self, *parts: dict[str, Tensor], of: dict[str, Tensor] | None = None, rows: dict[str, Tensor] | None = None
    ) -> Any:
        """A context in which a rank does its share; at its end `parts` and what it yields, an `Own`, hold all ranks' sums.

        An exception in one rank's share is raised on all. `of` is what the work was done on, held to be the same everywhere, and
        `rows` what of it is divided, held to be the same wherever the same rows are.
        """

    @abstractmethod
    def on(self, rank: int, find: Callable[[], T]) -> T:
        """What one rank finds, on every rank; an exception there is raised on all. Tensors arrive on the CPU."""

    def on_all(self, find: Callable[[], T]) -> T:
        """What each rank finds for itself; an exception on one is raised on all."""
        with self.summed():
            return find()

    def on_first(self, find: Callable[[], T]) -> T:
        """What rank 0 finds, on every rank."""
        return self.on(0, find)

    @abstractmethod
    def give(self, tensor: Tensor) -> None:
        """Rank 0's numbers on every rank, in a tensor that all have on the CPU; the ranks have just met before."""

    @abstractmethod
    def gathered(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""

    @abstractmethod
    def any(self, *flags: bool) -> list[bool]:
        """Whether each of the flags is up on some rank."""

    def join(self, exchange: Exchange | None) -> None:
        """Weights are divided among these ranks: whoever waits for the others serves them first. None where they are whole."""
        raise HesscopeError("Expected hs.data_parallel(problem) for a model whose weights are divided among processes.")

    @abstractmethod
    def watched(self) -> Any:
        """A context whose exception, where it ends a rank's part in the work, becomes known to the ranks that wait for it."""

    def attempted(self, work: Callable[[], T]) -> T:
        """What `work` gives on every rank. An exception on one is raised on all, and is a `RankLost` where it left others waiting."""
        return work()

    def connected(self) -> Any:
        """A context in which ranks may exchange by other means: a connection that breaks is a `RankLost`."""
        return nullcontext()

    @abstractmethod
    def describe(self) -> dict[str, Any] | None:
        """The layout, for the record of a result, as JSON; None for one process."""


class Alone(Communicator):
    """One process."""

    def share(self, weights: Sequence[float]) -> tuple[int, ...]:
        return tuple(range(len(weights)))

    @contextmanager
    def summed(
        self, *parts: dict[str, Tensor], of: dict[str, Tensor] | None = None, rows: dict[str, Tensor] | None = None
    ) -> Iterator[Own]:
        yield Own()

    def on(self, rank: int, find: Callable[[], T]) -> T:
        return find()

    def give(self, tensor: Tensor) -> None:
        return None

    def gathered(self, value: T) -> list[T]:
        return [value]

    def any(self, *flags: bool) -> list[bool]:
        return list(flags)

    @contextmanager
    def watched(self) -> Iterator[None]:
        yield

    def describe(self) -> dict[str, Any] | None:
        return None


ALONE = Alone()
