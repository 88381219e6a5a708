"""Operators given as a matrix or as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.operators.base import Operator
from hesscope.space import Vectors
from hesscope.space.digests import Digest
from hesscope.space.space import flat_space


class FlatOperator(Operator):
    """A function from [n, K] to [n, K], taken at its word to be linear and symmetric; its record has a digest of its matrix, if known."""

    def __init__(
        self,
        matmat: Callable[[Tensor], Tensor],
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        kind: str,
        positive_semidefinite: bool,
        matrix: Tensor | None = None,
    ) -> None:
        super().__init__(flat_space(size, dtype, device), positive_semidefinite)
        self._function = matmat
        self._kind = kind
        self._digest = None if matrix is None else Digest(self.space, {"x": matrix})

    def _matmat(self, V: Vectors) -> Vectors:
        X_nK = V["x"].T
        Y_nK = self._function(X_nK)
        if Y_nK.shape != X_nK.shape:
            raise HesscopeError(
                f"Expected matmat to map [n, k] to [n, k], here {list(X_nK.shape)}, got {list(Y_nK.shape)}."
            )
        return {"x": Y_nK.T.to(self.dtype, copy=True)}

    @property
    def units(self) -> float:
        return 0.0

    def describe(self) -> dict[str, Any]:
        return {"operator": self._kind} | ({} if self._digest is None else {"sha256": str(self._digest)})

    def origin(self) -> dict[str, Any] | None:
        return None


def operator(
    matrix: Any,
    size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    positive_semidefinite: bool = False,
) -> Operator:
    """Any symmetric matrix, or function `matmat` from [n, k] to [n, k], as an operator.

    Args:
        matrix: a square symmetric tensor or array; a function, for which give `size` and, unless float32, `dtype`; or
            SciPy's: a sparse matrix or a `LinearOperator`, the way back from `to_scipy()`. A function and SciPy's are
            taken at their word to be symmetric (`hesscope.eigs` and other long runs probe it).
        size, dtype, device: of a function; `dtype` and `device` convert a matrix.
        positive_semidefinite: that it is known to have no negative eigenvalue, taken at your word; XNysTrace is for
            such alone.

    Raises:
        HesscopeError: the matrix is not square or not symmetric (relative asymmetry above 1e-3), a function without size.

    Example:
        >>> import torch, hesscope as hs
        >>> hs.operator(torch.diag(torch.tensor([2.0, 1.0]))) @ torch.ones(2)
        tensor([2., 1.])
    """
    if any(kind.__module__.startswith("scipy.") for kind in type(matrix).__mro__):
        return _of_scipy(matrix, dtype, device, positive_semidefinite)
    if callable(matrix) and not isinstance(matrix, Tensor):
        if size is None:
            raise HesscopeError("Expected size= with a function: the number of coordinates it works on.")
        where = torch.device(device or "cpu")
        return FlatOperator(matrix, size, dtype or torch.float32, where, "function", positive_semidefinite)
    A = _symmetric(torch.as_tensor(matrix), dtype, device)
    return FlatOperator(lambda X: A @ X, A.shape[0], A.dtype, A.device, "matrix", positive_semidefinite, A)


def _of_scipy(
    matrix: Any, dtype: torch.dtype | None, device: torch.device | str | None, positive_semidefinite: bool
) -> Operator:
    """A `LinearOperator` or sparse matrix; its products are NumPy's, on the CPU."""
    from scipy.sparse.linalg import aslinearoperator

    L = aslinearoperator(matrix)
    if L.shape[0] != L.shape[1] or L.shape[0] == 0:
        raise HesscopeError(f"Expected a square matrix, got shape {list(L.shape)}.")
    given = torch.as_tensor(np.zeros(0, dtype=L.dtype)).dtype
    if given.is_complex:
        raise HesscopeError(f"Expected a real matrix, got {L.dtype}.")
    wide = torch.promote_types(dtype or (given if given.is_floating_point else torch.float64), torch.float32)

    def matmat(X_nK: Tensor) -> Tensor:
        return torch.from_numpy(np.array(L.matmat(X_nK.cpu().numpy()))).to(X_nK.device)

    return FlatOperator(matmat, L.shape[0], wide, torch.device(device or "cpu"), "scipy", positive_semidefinite)


def _symmetric(matrix: Tensor, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.numel() == 0:
        raise HesscopeError(f"Expected a square matrix, got shape {list(matrix.shape)}.")
    A = matrix.detach().to(device=device, dtype=torch.promote_types(dtype or matrix.dtype, torch.float32))
    gap, scale = float((A - A.T).abs().max()), float(A.abs().max())
    if not gap <= 1e-3 * scale:
        raise HesscopeError(
            f"Expected a symmetric matrix; the largest |A - A^T| is {gap:.3g} against entries up to {scale:.3g}."
        )
    return A
