"""The output Hessian's product as a Triton kernel: one program a row and vector, the probabilities never written.

The first pass over a row keeps the running maximum m, s = sum exp(z - m) and d = sum exp(z - m) u, rescaled whenever m grows
(Milakov and Gimelshein, 2018); the second writes exp(z - m) / s * (u - d / s). Offsets are 64-bit: a vocabulary of 2^17 and
2^14 tokens already exceed 2^31 entries. Imported only where triton is installed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _row(
    z_ptr: Any,
    valid_ptr: Any,
    u_ptr: Any,
    out_ptr: Any,
    V: Any,
    T: Any,
    z_row: Any,
    u_vector: Any,
    u_row: Any,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1).to(tl.int64)
    z_ptr += t * z_row
    u_ptr += k * u_vector + t * u_row
    out_ptr += (k * T + t) * V
    valid = tl.load(valid_ptr + t) != 0

    m = tl.full((), float("-inf"), WIDE)
    s = tl.full((), 0.0, WIDE)
    d = tl.full((), 0.0, WIDE)
    if valid:
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + at, mask=at < V, other=float("-inf")).to(WIDE)
            u = tl.load(u_ptr + at, mask=at < V, other=0.0).to(WIDE)
            grown = tl.maximum(m, tl.max(z, 0))
            # A block of nothing but minus infinities has no weight; its maximum must not be subtracted from itself.
            base = tl.where(grown == float("-inf"), 0.0, grown)
            shrink = tl.exp(m - base)
            e = tl.exp(z - base)
            s = s * shrink + tl.sum(e, 0)
            d = d * shrink + tl.sum(e * u, 0)
            m = grown
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        product = tl.zeros((BLOCK,), WIDE)
        if valid:
            z = tl.load(z_ptr + at, mask=at < V, other=float("-inf")).to(WIDE)
            u = tl.load(u_ptr + at, mask=at < V, other=0.0).to(WIDE)
            product = tl.exp(z - m) / s * (u - d / s)
        tl.store(out_ptr + at, product.to(out_ptr.dtype.element_ty), mask=at < V)


def output_hessian_product(z_TV: Tensor, valid_T: Tensor, u_KTV: Tensor, wide: torch.dtype) -> Tensor:
    """p * (u - <p, u>) for every row that is valid and every vector, zero elsewhere; like u, in contiguous memory."""
    K, T, V = u_KTV.shape
    z_TV = z_TV if z_TV.stride(1) == 1 else z_TV.contiguous()
    u_KTV = u_KTV if u_KTV.stride(2) == 1 else u_KTV.contiguous()
    out_KTV = torch.empty((K, T, V), dtype=u_KTV.dtype, device=u_KTV.device)
    block = min(triton.next_power_of_2(V), _LARGEST_BLOCK)
    strides = (z_TV.stride(0), u_KTV.stride(0), u_KTV.stride(1))
    accumulate = tl.float64 if wide == torch.float64 else tl.float32
    _row[(T, K)](z_TV, valid_T.to(torch.int8), u_KTV, out_KTV, V, T, *strides, WIDE=accumulate, BLOCK=block)
    return out_KTV
