"""The exact matrix of an operator."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hesscope.algorithms.checkpoint import Checkpoint, opened
from hesscope.algorithms.driver import drive
from hesscope.algorithms.filling import ROWS, Filling
from hesscope.errors import HesscopeError
from hesscope.memory import free_disk_bytes
from hesscope.operators import Operator
from hesscope.operators.free import free_on
from hesscope.results import Block

#: The matrix, and two more while it is written to a file.
COPIES = 3
#: A checkpoint, the next one while it is written, and the result.
FILES = 3


def block(H: Operator, route: str = "auto", checkpoint: str | Path | Checkpoint | None = None) -> Block:
    """The exact matrix of an operator over its whole space: A_ij = <e_i, A e_j>.

    A Hessian's columns are found batch by batch, each batch on one graph that is kept for all of them. A column through
    weights costs one product. Rows of a linear layer y = x W^T may instead go through positions, with T products a row of
    any width on sequences of T tokens (see docs/mathematics.md); "auto" counts and takes the fewer. Other operators are
    multiplied by the unit vectors.

    The matrix is returned symmetrised, (A + A^T)/2, with `asymmetry`, the largest |A - A^T| relative to the largest |A|,
    measured before. It takes three times n^2 numbers of memory.

    Args:
        route: "auto", "weights" or "positions" (where it is possible at all; refused for a model that mixes the sequences of a
            batch, or works on them along another axis than the first).
        checkpoint: a folder to keep the state of a long run in; the same call resumes there, and removes it at the end.

    Raises:
        HesscopeError: the matrix would not fit in memory or on the disk (names the largest n that does), a product is not finite, or an
            unknown route.

    Example:
        >>> import torch, hesscope as hs
        >>> hs.block(hs.operator(torch.eye(2))).matrix
        tensor([[1., 0.],
                [0., 1.]])
    """
    _require_room(H, checkpoint)
    columns = Filling(H, "block", axes=2, route=route)
    spent = drive(H, columns, {"route": route}, checkpoint)
    spent["provenance"]["matrix"] = columns.run.describe()
    asymmetry = symmetrize_(columns.found)
    return Block(**spent, matrix=columns.found, labels=H.space.labels, asymmetry=asymmetry)


def symmetrize_(A_nn: Tensor) -> float:
    """Replace A by (A + A^T)/2 in place, and return max |A - A^T| / max |A| from before."""
    gap, scale = A_nn.new_zeros(()), A_nn.new_zeros(())
    for start in range(0, len(A_nn), ROWS):
        rows = slice(start, start + ROWS)
        upper, lower = A_nn[rows, start:], A_nn[start:, rows]
        gap = torch.maximum(gap, (upper - lower.T).abs().max())
        scale = torch.maximum(scale, torch.maximum(upper.abs().max(), lower.abs().max()))
        mean = (0.5 * (upper + lower.T)).clone()
        A_nn[rows, start:] = mean
        A_nn[start:, rows] = mean.T
    return float(gap / scale) if scale > 0 else 0.0


def _require_room(H: Operator, checkpoint: str | Path | Checkpoint | None) -> None:
    """Raise HesscopeError where memory or, for a run with a checkpoint, the disk is too small."""
    _require(H, "memory", COPIES, free_on(H.comm, [H.space.device])[0])
    if checkpoint is not None:
        folder = opened(checkpoint).folder.absolute()
        _require(H, "the disk", FILES, H.comm.on_first(lambda: free_disk_bytes(folder)))


def _require(H: Operator, place: str, copies: int, free: int) -> None:
    n, size = H.space.size, H.dtype.itemsize
    if copies * n * n * size > free:
        fits = int((free / (copies * size)) ** 0.5)
        raise HesscopeError(
            f"Expected a block that fits in {place}: {n} x {n} needs {copies * n * n * size / 2**30:.1f} GiB, of which "
            f"{free / 2**30:.1f} are free; select at most {fits} coordinates."
        )
