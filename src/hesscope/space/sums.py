"""Inner products and squared norms of long vectors: pieces in the vectors' own dtype, summed in float64.

A float32 sum over some million entries has lost four digits, and over a billion it has stopped growing. Squares of entries below
1e-19 or above 1e19 are no float32 numbers: where that may have counted, rows are scaled by a power of two and summed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Entries that are summed in the vectors' own dtype. Some matrix multiplications sum one by one, as torch's norms do.
_PIECE = 2**11


def products(u_Kn: Tensor, v_Ln: Tensor) -> Tensor:
    """All inner products of rows, [K, L] float64."""
    found = _products(u_Kn, v_Ln)
    if not found.numel() or not _out_of_range(found.abs().amax(), u_Kn):
        return found
    (u_Kn, of_u), (v_Ln, of_v) = _scaled(u_Kn), _scaled(v_Ln)
    return _products(u_Kn, v_Ln) * of_u[:, None] * of_v


def squares(v_Kn: Tensor) -> Tensor:
    """Squared norms of rows, [K] float64."""
    found = _squares(v_Kn)
    if not _out_of_range(found, v_Kn):
        return found
    v_Kn, scale = _scaled(v_Kn)
    return _squares(v_Kn) * scale.square()


def _products(u_Kn: Tensor, v_Ln: Tensor) -> Tensor:
    n = u_Kn.shape[1]
    whole = n - n % _PIECE
    u_PKc = u_Kn[:, :whole].reshape(len(u_Kn), whole // _PIECE, _PIECE).transpose(0, 1)
    v_PcL = v_Ln[:, :whole].reshape(len(v_Ln), whole // _PIECE, _PIECE).permute(1, 2, 0)
    rest = u_Kn[:, whole:] @ v_Ln[:, whole:].T
    return torch.bmm(u_PKc, v_PcL).double().sum(0) + rest.double()


def _squares(v_Kn: Tensor) -> Tensor:
    n = v_Kn.shape[1]
    whole = n - n % _PIECE
    pieces_KP = torch.linalg.vector_norm(v_Kn[:, :whole].reshape(len(v_Kn), whole // _PIECE, _PIECE), dim=2)
    rest_K = torch.linalg.vector_norm(v_Kn[:, whole:], dim=1)
    total: Tensor = pieces_KP.double().square().sum(1) + rest_K.double().square()
    return total


def _out_of_range(found: Tensor, x: Tensor) -> bool:
    """Whether what was lost below the smallest number of the dtype, or above the largest, may be seen in the sums."""
    limits = torch.finfo(x.dtype if x.dtype == torch.float64 else torch.float32)
    return bool(((found < x.shape[1] * limits.tiny / limits.eps) | ~found.isfinite()).any())


def _scaled(x_Kn: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of largest entry near one, and by how much they were larger, [K] float64."""
    largest = x_Kn.abs().amax(1, keepdim=True) if x_Kn.shape[1] else x_Kn.new_zeros(len(x_Kn), 1)
    exponent = torch.frexp(largest.float() if x_Kn.itemsize < 4 else largest).exponent
    usable = largest.isfinite() & (largest > 0)
    exponent = torch.where(usable, exponent, 0).clamp(-126, 126)
    return torch.ldexp(x_Kn, -exponent), torch.ldexp(torch.ones_like(largest, dtype=torch.float64), exponent)[:, 0]
