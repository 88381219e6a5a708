"""The exact matrix of an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscope.algorithms.budget import chunk_size
from hesscope.algorithms.driver import Iteration, drive
from hesscope.algorithms.probing import require_finite
from hesscope.errors import HesscopeError
from hesscope.memory import available_bytes
from hesscope.operators import Operator
from hesscope.results import Block


def block(H: Operator) -> Block:
    """The exact matrix of an operator over its whole space, column by column: A_ij = <e_i, A e_j>.

    Costs n products and n^2 numbers. The matrix is returned symmetrised, (A + A^T)/2, with `asymmetry`, the largest
    |A - A^T| relative to the largest |A|, measured before.

    Raises:
        HesscopeError: the matrix would not fit in memory (names the largest n that does), or a product is not finite.

    Example:
        >>> import torch, hesscope as hs
        >>> hs.block(hs.operator(torch.eye(2))).matrix
        tensor([[1., 0.],
                [0., 1.]])
    """
    _require_memory(H)
    columns = _Columns(H)
    spent = drive(H, columns, {})
    A, T = columns.matrix, columns.matrix.T
    scale = float(A.abs().max())
    asymmetry = float((A - T).abs().max()) / scale if scale > 0 else 0.0
    return Block(**spent, matrix=0.5 * (A + T), labels=H.space.labels, asymmetry=asymmetry)


class _Columns(Iteration):
    description = "block"

    def __init__(self, H: Operator) -> None:
        self._H = H
        self.expected = n = H.space.size
        self.matrix: Tensor = torch.empty(n, n, dtype=H.dtype, device=H.space.device)
        self._next, self._chunk = 0, chunk_size(H)

    @property
    def done(self) -> bool:
        return self._next == self.expected

    def step(self) -> None:
        stop = min(self._next + self._chunk, self.expected)
        space = self._H.space
        columns = self._H.matmat(space.basis(self._next, stop))
        require_finite(self._H, columns)
        self.matrix[:, self._next : stop] = space.flatten(columns)
        self._next = stop


def _require_memory(H: Operator) -> None:
    # The matrix, its symmetrised copy and a transient difference.
    copies, free = 3, available_bytes(H.space.device)
    n, size = H.space.size, H.dtype.itemsize
    if copies * n * n * size > free:
        fits = int((free / (copies * size)) ** 0.5)
        raise HesscopeError(
            f"Expected a block that fits in memory: {n} x {n} needs {copies * n * n * size / 2**30:.1f} GiB, of which "
            f"{free / 2**30:.1f} are free; select at most {fits} coordinates."
        )
