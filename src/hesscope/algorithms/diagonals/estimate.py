"""What estimators of a diagonal share: the estimate, and when to stop."""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.budget import FEWEST_PROBES
from hesscope.algorithms.driver import Iteration
from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.space import Space, Vectors, vectors


@dataclass(frozen=True)
class Estimate:
    """Values and standard errors {name: tensor shaped like the selection}, with the errors' degrees of freedom.

    `record` is what a result keeps about how the estimate came about, as JSON.
    """

    method: str
    values: dict[str, Tensor]
    standard_error: dict[str, Tensor]
    degrees_of_freedom: int
    record: dict[str, Any] = field(default_factory=dict)


def relative_error(values: dict[str, Tensor], standard_error: dict[str, Tensor], space: Space | None = None) -> float:
    """An estimate of |d_hat - d| / |d|: E|d_hat|^2 = |d|^2 + E|d_hat - d|^2, and the latter is the summed variance.

    Of parts that are divided among processes over all of them, with their space; all call it then.
    """

    def of(name: str) -> Tensor:
        parts = standard_error[name], values[name]
        return torch.stack([part.double().square().sum() for part in parts])

    if space is None:
        total = sum((of(name).cpu() for name in values), torch.zeros(2, dtype=torch.float64))
    else:
        total = space.total(lambda c: of(c.name), (2,))
    noise, signal = total.tolist()
    if noise == 0:
        return 0.0
    return (noise / (signal - noise)) ** 0.5 if signal > noise else float("inf")


@dataclass(frozen=True)
class Limits:
    """When to stop: a number of products, a relative error, a time in seconds; the latter two may be None."""

    products: int
    target: float | None = None
    seconds: float | None = None

    @property
    def fixed(self) -> bool:
        """Whether the number of products alone decides, so that it is known in advance."""
        return self.target is None and self.seconds is None

    def after(self, products: int) -> Limits:
        """The limits of what follows when so many products are spent; the clock goes on."""
        return Limits(self.products - products, self.target, self.seconds)


class Estimator(Iteration):
    """An estimate under way. A subclass says what a step does, how many probes went into it and what it has found."""

    #: Products of the smallest step.
    least: int = 1

    def __init__(self, H: Operator, limits: Limits, seed: int) -> None:
        self._H, self._limits, self._seed = H, limits, seed
        self.expected = limits.products
        self.at_most = not limits.fixed
        self.spent = 0
        self._earlier, self._began = 0.0, time.perf_counter()

    @property
    @abstractmethod
    def probes(self) -> int:
        """Independent samples so far."""

    @abstractmethod
    def estimate(self) -> Estimate:
        """What has been found so far; needs at least one probe."""

    @property
    def error(self) -> float:
        """The relative error that stopping looks at; an estimator whose estimate is dear looks less often."""
        found = self.estimate()
        return relative_error(found.values, found.standard_error, self._H.space)

    @property
    def done(self) -> bool:
        if self.spent + self.least > self._limits.products:
            return True
        if self._late and self.probes >= 2:
            return True
        target = self._limits.target
        return target is not None and self.probes >= FEWEST_PROBES and self.error <= target

    def state(self) -> dict[str, Any]:
        return {"spent": self.spent, "seconds": self._elapsed} | self.own_state()

    def restore(self, state: dict[str, Any]) -> None:
        self.spent, self._earlier, self._began = state["spent"], state["seconds"], time.perf_counter()
        self.restore_own(state)

    @abstractmethod
    def own_state(self) -> dict[str, Any]:
        """The part of `state` that belongs to the subclass."""

    @abstractmethod
    def restore_own(self, state: dict[str, Any]) -> None:
        """Its counterpart."""

    def note(self) -> str:
        if self.probes < 2:
            return ""
        # Every process shows it when its own clock says so: that of the rows that are here.
        found = self.estimate()
        return f"relative error {relative_error(found.values, found.standard_error):.2g}"

    @property
    def _late(self) -> bool:
        seconds = self._limits.seconds
        return seconds is not None and self._H.comm.on_first(lambda: self._elapsed >= seconds)

    @property
    def _elapsed(self) -> float:
        """Seconds at work, those before a resumption among them."""
        return self._earlier + time.perf_counter() - self._began

    def _multiply(self, V: Vectors) -> Vectors:
        """A V, counted and known to be finite."""
        AV = self._H.matmat(V)
        require_finite(self._H, AV)
        self.spent += vectors.count(V)
        return AV


def only(V: Vectors) -> dict[str, Tensor]:
    """The one vector of V, in the parameters' own shapes."""
    return {name: part[0] for name, part in V.items()}


def plus(U: dict[str, Tensor], V: dict[str, Tensor]) -> dict[str, Tensor]:
    """U + V, in the wider of the dtypes."""
    return {name: U[name] + V[name].to(torch.promote_types(U[name].dtype, V[name].dtype)) for name in U}
