"""Sums of squared entries by row, layer and block, in one pass over a matrix.

Legend: n coordinates, c of them in one chunk, R rows, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesscope.algorithms.membership import Membership

_CHUNK_BYTES = 64 * 2**20


def energies(A: Tensor, members: Membership) -> tuple[Tensor, Tensor]:
    """Energy of the diagonal, of the rest of the rows and of the rest of the layers [3], and the map [L, L].

    By chunks of rows, in float64. What is counted is set to zero before the next sum, so that no class is a difference
    of two others: a diagonal matrix has exactly nothing beside its diagonal.
    """
    n, L = len(A), len(members.layers)
    row, layer_of_row = members.row.to(A.device), members.layer_of_row.to(A.device)
    total = torch.zeros(3, dtype=torch.float64, device=A.device)
    layer_energy = torch.zeros(L, L, dtype=torch.float64, device=A.device)
    step = max(1, _CHUNK_BYTES // (8 * n))
    for start in range(0, n, step):
        i = torch.arange(start, min(start + step, n), device=A.device)
        here = i - start
        A_cn = A[start : start + step].double().square()
        on_diagonal = _take(A_cn, here, i)
        A_cR = _summed(A_cn, row, len(layer_of_row))
        in_row = _take(A_cR, here, row[i])
        A_cL = _summed(A_cR, layer_of_row, L)
        layer = layer_of_row[row[i]]
        in_layer = A_cL[here, layer]
        total += torch.stack([on_diagonal.sum(), in_row.sum(), in_layer.sum()])
        A_cL[here, layer] += on_diagonal + in_row
        layer_energy.index_add_(0, layer, A_cL)
    return total.cpu(), layer_energy.cpu()


def _take(squares: Tensor, here: Tensor, columns: Tensor) -> Tensor:
    """Read one column of every row and leave zero there."""
    taken = squares[here, columns]
    squares[here, columns] = 0.0
    return taken


def _summed(squares: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums of columns by group, [c, groups]."""
    return squares.new_zeros(len(squares), groups).index_add_(1, group, squares)
