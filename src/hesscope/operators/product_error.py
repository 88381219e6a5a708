"""How far products are from those of the next higher precision: measured, on one vector and a few tokens.

    |A v - A' v| / |A' v|     for a sign vector v over the whole selection

A' is the same matrix from the same weights, by double backward: in float32 for products in TF32 or bfloat16 and for weights in
half precision, in float64 for float32. Casts to float32 that a model makes inside are left out of a float64 reference. Above
float64 there is only that: a float64 model that casts is held to itself without its casts, another to double backward, and that
to its own symmetry.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hesscope.arithmetic import in_words
from hesscope.communicator import ALONE
from hesscope.engines.checking import short_slice
from hesscope.errors import HesscopeError, UnusedParameters
from hesscope.memory import available_together, is_unlimited
from hesscope.models import elsewhere
from hesscope.operators.room import rough_bytes
from hesscope.problem import Problem
from hesscope.problem.precision import WithoutCasts, in_dtype
from hesscope.space import Space, Vectors, vectors

#: Tokens of the one sequence that it is measured on.
TOKENS = 32
_STATED: ContextVar[bool] = ContextVar("stated", default=False)


@dataclass(frozen=True)
class ProductError:
    """`relative` is the error of products in `of` against those in `against`, on what `on` says; None where it is not known.

    It cost `products` products and `units` forward passes over all the data.
    """

    relative: float | None
    of: str
    against: str
    on: str
    products: int = 0
    units: float = 0.0
    note: str = ""

    def describe(self) -> dict[str, Any]:
        """For the record of a result, as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.relative is None:
            return f"product error not measured: {self.note}"
        note = f" ({self.note})" if self.note else ""
        return f"product error {self.relative:.1e}: {self.of} against {self.against}, on {self.on}{note}"


@contextmanager
def stated_errors(wanted: bool = True) -> Iterator[None]:
    """Inside, every result of a problem's operator says its products' error."""
    token = _STATED.set(wanted)
    try:
        yield
    finally:
        _STATED.reset(token)


def are_stated() -> bool:
    """Whether results are to say it unasked."""
    return _STATED.get()


class Source(Protocol):
    """An operator that can be made of another problem too."""

    problem: Problem
    space: Space
    precision: str | None

    def of_small(self, small: Problem) -> Any:
        """The operator of a few tokens, by the engine that runs."""

    def reference(self, run: Any, twin: Problem, space: Space, precision: str | None, engine: Any = None) -> Any:
        """The same as `run` of a twin of its problem, by double backward or another engine."""


def measure_product_error(A: Source, seed: int) -> ProductError:
    """The error of A's products; one with a note instead of a number where it cannot be measured."""
    plan = _planned(A)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnusedParameters)  # a few tokens use fewer experts
            return _measured(A, plan, seed)
    except (ValueError, RuntimeError, TypeError) as error:  # no reason to lose a result that is there
        lines = str(error).strip().splitlines()
        return replace(plan, note=lines[0] if lines else type(error).__name__)


def _planned(A: Source) -> ProductError:
    """What is to be held to what."""
    weights = {p.dtype for p in A.problem.model.parameters() if p.is_floating_point()}
    least = min(weights, key=lambda dtype: dtype.itemsize, default=torch.float64)
    name = str(least).removeprefix("torch.")
    if A.precision in ("tf32", "bfloat16"):
        return ProductError(None, A.precision, "float32", "")
    if least == torch.float32:
        name = in_words(A.precision, A.problem.device) or name
    return ProductError(None, name, "float32" if least.itemsize < 4 else "float64", "")


def _measured(A: Source, plan: ProductError, seed: int) -> ProductError:
    if any(hasattr(p, "to_local") for p in A.problem.model.parameters()):
        raise HesscopeError("the weights are divided among processes")
    small = short_slice(A.problem, TOKENS).related()
    small.comm = ALONE
    converts = A.precision not in ("tf32", "bfloat16") and plan.of != "float64"
    _require_possible(A, small, converts, plan.against)
    run = A.of_small(small)
    u, v = (A.space.rademacher(seed, [f"product-error/{i}"]) for i in range(2))
    Av = run.matmat(v)
    twin, space = in_dtype(small, A.space, getattr(torch, plan.against)) if converts else (small, A.space)
    expected, mattered, note, spent = _reference(A, run, twin, space, v, plan.against)
    plan = replace(plan, on=_words(small), note=note)
    share = small.N / A.problem.N
    found, products = _relative(space, Av, expected), 2
    if plan.of == "float64" and found == 0.0:  # it was computed twice
        found, products = asymmetry(A.space, u, v, run.matmat(u), Av), 3
        plan = replace(plan, against="its own symmetry, <u, Av> = <v, Au>")
    elif plan.of == "float64":
        plan = replace(plan, against=_UNCAST if mattered else "double backward")
    return replace(plan, relative=found, products=products, units=share * (run.units + spent))


def _require_possible(A: Source, small: Problem, converts: bool, against: str) -> None:
    if not converts:
        return
    if elsewhere(A.problem.model) is not None:
        raise HesscopeError(f"weights that rest elsewhere have no copy in {against}")
    if A.problem.dropout == "frozen":
        raise HesscopeError("a frozen dropout mask depends on the dtype that it is drawn in")
    wide = getattr(torch, against).itemsize
    needed = sum(p.numel() * (p.itemsize + wide) for p in A.problem.model.parameters()) + 3 * rough_bytes(
        small, A.space
    )
    available = available_together(A.problem.devices)
    if needed > available and not is_unlimited():
        raise HesscopeError(
            f"a copy of the weights in {against} takes {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free"
        )


def _reference(
    A: Source, run: Any, twin: Problem, space: Space, v: Vectors, against: str
) -> tuple[Vectors, bool, str, float]:
    """A' v, whether casts that were left out mattered, what there is to say, and the cost."""
    wide = {c.name: v[c.name].to(space.dtype) for c in space.coordinates}
    precision = "float32" if against == "float32" else None
    for engine, note in ((None, ""), (run.engine.for_part(), f"by {run.engine.name} there as well")):
        B = A.reference(run, twin, space, precision, engine)
        try:
            if against == "float32":
                return B.matmat(wide), False, note, B.units
            product, mattered = _without_casts(B, wide)
            return product, mattered is True, note if mattered is not None else _CASTS_STAND, B.units
        except HesscopeError:
            if engine is not None:
                raise
    raise AssertionError


def _without_casts(B: Any, v: Vectors) -> tuple[Vectors, bool | None]:
    """The product and whether casts mattered; with them, and None, where the model does not run without."""
    try:
        with WithoutCasts() as casts:
            return B.matmat(v), casts.mattered
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # of two dtypes that meet
        return B.matmat(v), None


_UNCAST = "itself without the model's casts to float32"
_CASTS_STAND = "the reference casts to float32 where the model does"


def _relative(space: Space, found: Vectors, expected: Vectors) -> float:
    exact = {c.name: expected[c.name].double() for c in space.coordinates}
    gap = float(space.norms(vectors.add(exact, {name: part.double() for name, part in found.items()}, -1.0)))
    scale = float(space.norms(exact))
    if not math.isfinite(scale):
        raise HesscopeError("the product that it would be held to is not finite")
    if not math.isfinite(gap):
        return math.inf
    return gap / scale if scale > 0 else (0.0 if gap == 0 else math.inf)


def asymmetry(space: Space, u: Vectors, v: Vectors, Au: Vectors, Av: Vectors) -> float:
    """|<u, Av> - <v, Au>| / ((|u| |Av| + |v| |Au|) / (2 sqrt(n))).

    For independent sign vectors <u, Av> is of the size |Av| = |u| |Av| / sqrt(n). Relative to |u| |Av| itself, a map
    without any symmetry would come out as sqrt(2 / n), which for large n passes for rounding.
    """
    scale = 0.5 * float(space.norms(u) * space.norms(Av) + space.norms(v) * space.norms(Au)) / math.sqrt(space.size)
    gap = abs(float(space.inner(u, Av)) - float(space.inner(v, Au)))
    return gap / scale if scale > 0 else 0.0


def _words(small: Problem) -> str:
    batch = small.batches[0]
    ids = batch.get("input_ids") if isinstance(batch, dict) else None
    if isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) == 1:
        return f"one sequence of {ids.shape[1]} tokens"
    return f"one batch of {small.N} terms"
