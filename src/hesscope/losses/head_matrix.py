"""A matrix on the logits, taken through an output projection: T^T M T u for the projection's own derivative T, in chunks.

With a = W h + b, z = f(a) and u = (u_h, u_W, u_b),

    q = f'(a) (u_h W^T + h u_W^T + u_b),    r = f'(a) M q,    T^T M T u = (r W, r^T h, sum over t of r_t)

for any M that treats tokens one by one. Where a is not kept, it is computed anew for every chunk: five products of matrices
in place of four.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hesscope.losses.chunked_head import ChunkedHead, Parts, scaled

#: (which tokens, their logits, q) to M q; q may be overwritten.
TokenMatrix = Callable[[slice, Tensor, Tensor], Tensor]


def through_projection(head: ChunkedHead, u: Parts, matrix: TokenMatrix, wanted: tuple[bool, ...]) -> Parts:
    """T^T M T u: its parts in h, W and b that are wanted. Not differentiable itself."""
    into = head.zeros(wanted)
    for rows in head.slices:
        q_TV = head.tangent(rows, *u)
        z_TV, slope, _ = head.form.map.expanded(head.projected(rows), order=1)
        r_TV = scaled(matrix(rows, z_TV, scaled(q_TV, slope)), slope)
        head.add_transposed(into, rows, r_TV, head.h_Td[rows], head.W_Vd)
    return list(head.narrowed(into))
