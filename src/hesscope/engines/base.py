"""The interface of an engine. It knows one batch; the operator above it knows the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.losses import Loss
from hesscope.models import elsewhere, named_parameters, values_of
from hesscope.problem import Problem
from hesscope.space import Space, Vectors


class Differential(ABC):
    """One batch's summed loss and its gradient; nothing is divided by a count here."""

    #: The summed loss.
    total: float
    #: Selected parameters on which this batch's loss does not depend.
    unused: list[str]
    #: What the gradient would cost now, in forward passes of the batch.
    gradient_units: float = 0.0

    @abstractmethod
    def gradient(self) -> Vectors:
        """The gradient of the sum, one vector."""


class Linearization(Differential):
    """One batch's summed loss, differentiated once and ready to be differentiated again along any vectors."""

    #: Bytes held for later products, beyond the parameters.
    bytes: int
    #: Whether `bytes` are known before the first product; asking for them earlier costs a forward pass.
    settled: bool = True
    #: An estimate of the products' error, the largest so far, relative to the largest product, both of unit vectors; zero for
    #: an engine that is exact up to rounding.
    error: float = 0.0
    #: Passes over the parameters that products have made so far, where an engine shares them between a call's vectors.
    passes: int = 0
    #: How the loss takes the model's output projection, in words; empty where there is nothing to say.
    head: str = ""

    @abstractmethod
    def add_product(self, V: Vectors, into: Vectors, last: bool = False) -> None:
        """Add the Hessian of the sum times every vector of V to `into`; with `last` nothing is kept for further calls.

        A vector is as large as the model; adding in place spares the batches' loop one of them.
        """


class Engine(ABC):
    """Makes linearizations. Costs are in forward passes of the batch."""

    name: str
    #: Cost of a linearization, of a pass that a product's vectors share, and of each vector's product.
    build_units: float
    pass_units: float = 0.0
    product_units: float
    #: What the engine has to say about itself, for the record of a result.
    note: str = ""
    #: Whether somebody asked for it by name; one that nobody asked for may give way to another.
    asked: bool = True

    def units(self, built: int, passes: int, products: int) -> float:
        """The cost of so many linearizations, passes and products."""
        return self.build_units * built + self.pass_units * passes + self.product_units * products

    def prepare(self, problem: Problem, space: Space) -> float:
        """Look at the problem before the first product; returns what that cost, in passes over all the data."""
        return 0.0

    def for_part(self) -> Engine:
        """The same engine for a part of the selection; what it has found out stays."""
        return copy(self)

    @abstractmethod
    def linearize(self, problem: Problem, b: int, space: Space) -> Linearization:
        """Prepare batch b."""

    def gradient_alone(self, problem: Problem, b: int, space: Space) -> Differential | None:
        """Batch b where no product is wanted, if that is cheaper than a linearization; None if it is not."""
        return None


def parameter_values(problem: Problem, space: Space) -> dict[str, Tensor]:
    """The selected parameters' values, sharing storage with the model and detached from any graph."""
    require_recording()
    parameters = named_parameters(problem.model)
    return {name: values_of(problem.model, name, parameters[name]) for name in space.names}


def require_recording() -> None:
    """Raise HesscopeError in inference mode."""
    if torch.is_inference_mode_enabled():
        raise HesscopeError(
            "Expected to be able to differentiate, but torch.inference_mode() is on, under which nothing is recorded; "
            "leave it (torch.no_grad() does no harm)."
        )


class ValuesOnDemand(Mapping[str, Tensor]):
    """`parameter_values` of which an offloaded one is brought whenever it is asked for, in the middle of a run too, and not kept."""

    def __init__(self, problem: Problem, space: Space) -> None:
        named = named_parameters(problem.model)
        self._store = elsewhere(problem.model)
        self._parameters = {name: named[name] for name in space.names}

    def __getitem__(self, name: str) -> Tensor:
        return self.several([name])[name]

    def several(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some of them, brought together."""
        brought = [name for name in names if self._elsewhere(name)]
        found = self._store.load_several(brought) if self._store is not None and brought else {}
        return {name: found[name] if name in found else self._parameters[name].detach() for name in names}

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def device(self, name: str) -> torch.device:
        """Where a parameter's values come to."""
        return self._store.device(name) if self._elsewhere(name) else self._parameters[name].device  # type: ignore[union-attr]

    def _elsewhere(self, name: str) -> bool:
        return self._store is not None and name in self._store


def gradient_parts(
    problem: Problem, b: int, values: dict[str, Tensor], loss: Loss | None = None
) -> tuple[float, dict[str, Tensor | None]]:
    """The loss of batch b and its gradient at these values; None for a parameter that the loss does not use.

    `loss` stands in for the problem's own.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in values.items()}
    with torch.enable_grad():
        total, _ = problem.total(b, leaves, loss=loss)
        if not total.requires_grad:
            return float(total), dict.fromkeys(leaves)
        parts = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return float(total.detach()), dict(zip(leaves, parts, strict=True))
