"""Inner products and squared norms of long vectors: pieces in the vectors' own dtype, summed in float64.

A float32 sum over some million entries has lost four digits, and over a billion it has stopped growing.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Entries that are summed in the vectors' own dtype. Some matrix multiplications sum one by one, as torch's norms do.
_PIECE = 2**11


def products(u_Kn: Tensor, v_Ln: Tensor) -> Tensor:
    """All inner products of rows, [K, L] float64."""
    n = u_Kn.shape[1]
    whole = n - n % _PIECE
    u_PKc = u_Kn[:, :whole].reshape(len(u_Kn), whole // _PIECE, _PIECE).transpose(0, 1)
    v_PcL = v_Ln[:, :whole].reshape(len(v_Ln), whole // _PIECE, _PIECE).permute(1, 2, 0)
    rest = u_Kn[:, whole:] @ v_Ln[:, whole:].T
    return torch.bmm(u_PKc, v_PcL).double().sum(0) + rest.double()


def squares(v_Kn: Tensor) -> Tensor:
    """Squared norms of rows, [K] float64."""
    n = v_Kn.shape[1]
    whole = n - n % _PIECE
    pieces_KP = torch.linalg.vector_norm(v_Kn[:, :whole].reshape(len(v_Kn), whole // _PIECE, _PIECE), dim=2)
    rest_K = torch.linalg.vector_norm(v_Kn[:, whole:], dim=1)
    total: Tensor = pieces_KP.double().square().sum(1) + rest_K.double().square()
    return total
