"""What one batch's product takes with an engine, found by running it on shapes alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hesscope.dryrun import META, THRESHOLD, Meter, Shadow, Work, resident, shadow_problem
from hesscope.engines.base import Engine
from hesscope.errors import HesscopeError, HesscopeWarning
from hesscope.memory import shapes_for
from hesscope.problem import Problem
from hesscope.space import Space, Vectors
from hesscope.space import vectors as _vectors

#: A check, a linearization and a product; the last two come again.
_SECTIONS, _AGAIN = 3, 2


class NotDry(HesscopeError):
    """The model asks for numbers that a dry run does not have."""


@dataclass(frozen=True)
class DryProduct:
    """What a product with `vectors` vectors takes on one batch.

    Attributes:
        peak: bytes of tensors alive at once, at most, the check before the first product included; model and vectors are not.
        resident: the same as the operating system sees it, with what its allocator wastes.
        kept: bytes that the batch's linearization holds between products.
        prepare, build, product: the work of that check, of a linearization, and of a product on one.
        remark: what the engine says about itself.
        fresh: bytes that come anew from the system in a first product, and in a second one: on the linearization if that is kept.
    """

    vectors: int
    peak: int
    resident: int
    kept: int
    prepare: Work
    build: Work
    product: Work
    remark: str = ""
    fresh: tuple[int, int] = (0, 0)

    def replayed(self, meter: Meter, device: torch.device) -> DryProduct:
        """With what the allocator of a device makes of the allocations."""
        once = meter.trace.count(0) == _SECTIONS
        found = resident(meter.trace, meter.peak, device, again=_AGAIN if once else 0)
        # A second product is a section of its own, or the linearization and the product once more.
        return replace(self, resident=found.peak, fresh=(sum(found.fresh[:_SECTIONS]), sum(found.fresh[_SECTIONS:])))


class DryRuns:
    """Dry runs of a problem's largest batch; the problem and its model are left alone. Products are summed in `sum_dtype`.

    Raises:
        NotDry: from `product`, for a model that asks for numbers: which expert a token goes to, for instance.
    """

    def __init__(
        self,
        problem: Problem,
        space: Space,
        device: torch.device | None = None,
        sum_dtype: torch.dtype | None = None,
    ) -> None:
        self.device, self._sum_dtype = device or problem.device, sum_dtype
        self.problem = shadow_problem(problem.subset([largest_batch(problem)]))
        self.space = Space([replace(c, device=META, folder=None) for c in space.coordinates])
        self._shadow = Shadow()

    def with_batch(self, batch: Any) -> DryRuns:
        """The same for another batch."""
        other = copy(self)
        other.problem = self.problem.related(batches=[batch])
        return other

    def product(
        self,
        make: Callable[[], Engine],
        vectors: int = 1,
        kept: bool = False,
        checked: bool = True,
        replayed: bool = True,
        result: bool = True,
        peak_alone: bool = False,
    ) -> DryProduct:
        """A product with so many vectors at once; `kept` for two on a linearization that stays.

        Without `checked` the engine's own check before its first product is left out. Without `replayed` nothing is found out
        about the allocator, and `resident` is `peak`. Without `result` the product's own vectors are not counted. With
        `peak_alone` the work is less than it is: of steps with the same memory one is run.
        """
        # An allocator of a GPU hands out memory that is there.
        meter = Meter(self._shadow, kinds=not peak_alone, mapped=THRESHOLD if self.device.type == "cpu" else None)
        engine = make()
        V = {
            c.name: torch.empty(vectors, *c.shape, dtype=self.space.dtype, device=META) for c in self.space.coordinates
        }
        into = None if result else {name: torch.zeros_like(part) for name, part in V.items()}
        with warnings.catch_warnings(), in_words(), shapes_for(self.device, peak_alone):
            warnings.simplefilter("ignore", HesscopeWarning)
            with meter:
                found = run_product(engine, self.problem, self.space, V, meter, kept, checked, into, self._sum_dtype)
        return found.replayed(meter, self.device) if replayed else found


def run_product(
    engine: Engine,
    problem: Problem,
    space: Space,
    V: Vectors,
    meter: Meter,
    kept: bool = False,
    checked: bool = True,
    into: Vectors | None = None,
    sum_dtype: torch.dtype | None = None,
) -> DryProduct:
    """Run the product of a problem's first batch under a meter that is entered; V was there before, and `into` if given."""
    if checked:
        engine.prepare(problem, space)
    prepare = meter.work
    meter.mark()
    into = space.sums(_vectors.count(V), sum_dtype) if into is None else into
    made = engine.linearize(problem, 0, space)
    build = meter.work - prepare
    meter.mark()
    made.add_product(V, into, last=not kept)
    held = made.bytes
    product = meter.work - prepare - build
    meter.mark()
    if kept:
        del into  # the algorithm is done with it
        made.add_product(V, space.sums(_vectors.count(V), sum_dtype))
        meter.mark()
    return DryProduct(_vectors.count(V), meter.peak, meter.peak, held, prepare, build, product, engine.note)


class in_words:
    """Say of a failure inside a dry run that it is one of the dry run."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, HesscopeError) or not isinstance(error, (RuntimeError, NotImplementedError, ValueError)):
            return
        lines = str(error).strip().splitlines()
        raise NotDry(
            f"The model cannot be run without numbers ({lines[0][:160] if lines else type(error).__name__})."
        ) from error


def largest_batch(problem: Problem) -> int:
    """The batch with the most elements."""
    return max(range(len(problem.batches)), key=lambda b: elements(problem.batches[b]))


def elements(batch: Any) -> int:
    """The numbers in a batch."""
    return sum(x.numel() for x in tree_leaves(batch) if isinstance(x, Tensor))
