"""A symmetric linear map on a space, and what algorithms may ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hesscope.communicator import ALONE, Communicator
from hesscope.errors import HesscopeError
from hesscope.operators.free import free_on
from hesscope.space import Space, Vectors, vectors

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

    from hesscope.operators.product_error import ProductError

#: What the columns of a dense form take at once.
_COLUMN_BYTES = 64 * 2**20


class Operator(ABC):
    """A symmetric linear map A on R^n; `positive_semidefinite` says whether it is known to have no negative eigenvalue.

    `A @ v` takes a flat tensor [n] or [n, K], or one vector as {name: tensor shaped like the selected part}, and returns
    its like. Algorithms use `matmat` on vectors kept per parameter. `products` and `units` (forward passes over the
    data) count what has been spent since construction.
    """

    def __init__(self, space: Space, positive_semidefinite: bool = False) -> None:
        self.space = space
        self.positive_semidefinite = positive_semidefinite
        self.products = 0

    # ---- what a subclass supplies

    @abstractmethod
    def _matmat(self, V: Vectors) -> Vectors:
        """A times every vector of V, as new tensors."""

    @property
    @abstractmethod
    def units(self) -> float:
        """Forward passes over the data spent so far."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a result keeps about its operator, as JSON."""

    @abstractmethod
    def origin(self) -> dict[str, Any] | None:
        """What a result keeps about the problem behind the operator, as JSON; None where there is none."""

    # ---- what everyone uses

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {str(self.dtype).removeprefix('torch.')})"

    @property
    def shape(self) -> tuple[int, int]:
        return self.space.size, self.space.size

    @property
    def dtype(self) -> torch.dtype:
        return self.space.dtype

    @property
    def tolerance(self) -> float:
        """The largest relative discrepancy of a product that may pass for rounding."""
        return self.space.tolerance

    @property
    def sum_dtype(self) -> torch.dtype:
        """In what parts of its matrix are to be summed."""
        return self.dtype

    def product_error(self, seed: int = 0) -> ProductError:
        """How far a product is from one of the next higher precision, measured on a few tokens; counted in what it returns.

        Results that are computed from now on say it, as long as the weights stay.
        """
        raise HesscopeError(
            f"Expected the Hessian, Gauss-Newton or Fisher matrix of a problem, whose products have an error that can be measured, "
            f"got {type(self).__name__}; ask its parts."
        )

    @property
    def known_error(self) -> ProductError | None:
        """What `product_error` has found; inside `stated_errors` what it finds."""
        return None

    def matmat(self, V: Vectors) -> Vectors:
        """A times every vector of V; counted."""
        self.products += vectors.count(V)
        return self._matmat(V)

    def __matmul__(self, v: Tensor | dict[str, Tensor]) -> Any:
        if isinstance(v, dict):
            with self.comm.connected():
                found = self.matmat(self.space.from_dict(v))
                if any(hasattr(part, "to_local") for part in v.values()):
                    return self.space.like(v, found)
                return {name: part[0] for name, part in self.space.gathered(found).items()}
        if not isinstance(v, Tensor):
            raise HesscopeError(
                f"Expected a tensor or a dictionary of tensors, got {type(v).__name__}; to_scipy() takes NumPy arrays."
            )
        if v.dim() not in (1, 2) or v.shape[0] != self.space.size:
            raise HesscopeError(
                f"Expected a tensor of shape [{self.space.size}] or [{self.space.size}, k], got {list(v.shape)}."
            )
        if v.numel() == 0:
            return v.new_zeros(v.shape, dtype=self.dtype)
        flat = self.space.flatten(self.matmat(self.space.unflatten(v if v.dim() == 2 else v[:, None])), give_up=True)
        return flat if v.dim() == 2 else flat[:, 0]

    def to_scipy(self) -> LinearOperator:
        """The operator for SciPy's `eigsh` and friends."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        def matmat(X: Any) -> Any:
            # A copy: SciPy hands over read-only and reversed arrays.
            return (self @ torch.from_numpy(np.array(X)).to(self.space.device, self.dtype)).cpu().numpy()

        def matvec(x: Any) -> Any:
            return matmat(x.reshape(-1))

        empty = torch.empty(0, dtype=self.dtype).numpy()
        return LinearOperator(
            self.shape, matvec=matvec, rmatvec=matvec, matmat=matmat, rmatmat=matmat, dtype=empty.dtype
        )

    @property
    def comm(self) -> Communicator:
        """The processes that make its products together, each with the same vectors."""
        return ALONE

    @property
    def draws_diagonal(self) -> bool:
        """Whether `draw_diagonal` can be called."""
        return False

    def draw_diagonal(self, seed: int, number: int) -> Vectors:
        """An unbiased draw of the diagonal that costs less than a product, as one vector; counted as a product."""
        raise HesscopeError(f"{type(self).__name__} draws no diagonals; use products.")

    @property
    def knows_diagonal(self) -> bool:
        """Whether `known_diagonal` can be called."""
        return False

    def known_diagonal(self) -> Vectors:
        """The exact diagonal as one vector, where the operator has it without products."""
        raise HesscopeError(f"{type(self).__name__} does not know its diagonal; use products.")

    @property
    def probed_groups(self) -> int:
        """How many sequences `probe_diagonal` gives a probe of their own; 0 where it cannot be called."""
        return 0

    def probe_diagonal(self, seed: int, number: int) -> Vectors:
        """An unbiased draw of the diagonal from a probe for each sequence, as one vector; counted as a product."""
        raise HesscopeError(f"{type(self).__name__} has no probes for single sequences; use products.")

    @property
    def has_gauss_newton(self) -> bool:
        """Whether `gauss_newton_product` and `draw_gauss_newton` can be called."""
        return False

    def gauss_newton_product(self, V: Vectors) -> Vectors:
        """G times every vector of V, for the Gauss-Newton matrix G beside a Hessian; counted like products of this operator."""
        raise HesscopeError(f"{type(self).__name__} has no Gauss-Newton matrix beside it; make one with hs.ggn.")

    def draw_gauss_newton(self, seed: int, number: int) -> Vectors:
        """An unbiased draw of diag(G) that costs less than a product, as one vector; counted as a product."""
        raise HesscopeError(f"{type(self).__name__} has no Gauss-Newton matrix beside it; make one with hs.ggn.")

    def to_dense(self) -> Tensor:
        """The matrix [n, n], by n products; `hesscope.block` gives it labels, symmetry and cost as well.

        Raises HesscopeError where it would not fit in memory.
        """
        n = self.space.size
        needed = 2 * n * n * self.dtype.itemsize
        available, _ = free_on(self.comm, [self.space.device])
        if needed > available:
            raise HesscopeError(
                f"Expected a matrix of {n} x {n} to fit in memory: it takes {needed / 1e9:.1f} GB on the way, and "
                f"{available / 1e9:.1f} GB are free; restrict the selection."
            )
        chunk = max(1, _COLUMN_BYTES // (n * self.dtype.itemsize))
        columns = [
            self.space.flatten(self.matmat(self.space.basis(start, min(start + chunk, n))))
            for start in range(0, n, chunk)
        ]
        return torch.cat(columns, 1)

    def undivided(self) -> Operator:
        """The same on vectors that every process has whole; itself where they are not divided."""
        from hesscope.operators.undivided import Undivided

        return self if self.space.divided is None else Undivided(self)

    def shifted(self, shift: float) -> Operator:
        """A + shift * I."""
        from hesscope.operators.composed import Identity

        return self + float(shift) * Identity(self.space)

    def updated(self, g: Tensor | dict[str, Tensor], weight: float = 1.0) -> Operator:
        """A + weight * g g^T, for one vector g: a flat tensor [n] or {name: tensor shaped like the selected part}."""
        from hesscope.operators.composed import RankOne

        return self + RankOne(self.space, self.space.one(g), float(weight))

    def restricted_to(self, part: Space) -> Operator:
        """P A P^T: the rows and columns of some of the coordinates, given as a selection of the same parameters.

        Raises HesscopeError where `part` has coordinates that this operator has not.
        """
        from hesscope.operators.composed import Restriction

        if isinstance(part, Space) and part.is_of(self.space):
            return Restriction(self, part)
        return Restriction(self.undivided(), part.whole if isinstance(part, Space) else part)

    def narrowed(self, part: Space) -> Operator | None:
        """The same as an operator of its own, whose products cost what `part` alone needs; None where there is none.

        What it spends is counted by itself and not by this operator.
        """
        return None

    def sampled(self, batches: int, seed: int, draw: int) -> Operator:
        """An unbiased operator over so many batches, drawn at random for this seed and draw.

        Raises HesscopeError for an operator that is not a sum over batches.
        """
        raise HesscopeError(
            "Expected an operator that is a sum over batches, such as a Hessian, to resample; this one cannot be, so leave "
            "batches out."
        )

    def __add__(self, other: Operator) -> Operator:
        from hesscope.operators.composed import Sum

        return Sum(self, other)

    def __mul__(self, factor: float) -> Operator:
        from hesscope.operators.composed import Multiple

        return Multiple(self, float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> Operator:
        return self * -1.0

    def __sub__(self, other: Operator) -> Operator:
        return self + (-other)
