"""The interface of an engine. It knows one batch; the operator above it knows the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy

import torch
from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.models import named_parameters
from hesscope.problem import Problem
from hesscope.space import Space, Vectors


class Linearization(ABC):
    """One batch's loss, differentiated once and ready to be differentiated again along any vectors.

    All quantities belong to the batch's summed loss; nothing is divided by a count here.
    """

    #: Bytes held for later products, beyond the parameters.
    bytes: int
    #: The summed loss.
    total: float
    #: An estimate of the products' relative error, the largest so far; zero for an engine that is exact up to rounding.
    error: float = 0.0
    #: Selected parameters on which this batch's loss does not depend.
    unused: list[str]
    #: Passes over the parameters that products have made so far, where an engine shares them between a call's vectors.
    passes: int = 0
    #: What the gradient would cost now, in forward passes of the batch.
    gradient_units: float = 0.0

    @abstractmethod
    def gradient(self) -> Vectors:
        """The gradient of the sum, one vector."""

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


def parameter_values(problem: Problem, space: Space) -> dict[str, Tensor]:
    """The selected parameters' values, sharing storage with the model and detached from any graph."""
    if torch.is_inference_mode_enabled():
        raise HesscopeError(
            "Expected to be able to differentiate, but torch.inference_mode() is on, under which nothing is recorded; "
            "leave it (torch.no_grad() does no harm)."
        )
    parameters = named_parameters(problem.model)
    return {name: parameters[name].detach() for name in space.names}


def gradient_parts(problem: Problem, b: int, values: dict[str, Tensor]) -> tuple[float, dict[str, Tensor | None]]:
    """The loss of batch b and its gradient at these values; None for a parameter that the loss does not use."""
    leaves = {name: p.detach().requires_grad_() for name, p in values.items()}
    with torch.enable_grad():
        total, _ = problem.total(b, leaves)
        if not total.requires_grad:
            return float(total), dict.fromkeys(leaves)
        parts = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return float(total.detach()), dict(zip(leaves, parts, strict=True))
