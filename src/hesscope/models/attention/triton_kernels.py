"""The routines of `first` and `second` as Triton kernels, in float32: one program a range of queries, or of keys.

A program loops over what its range sees or is seen by, so that nothing is written but results. Kernels over queries find the
output, dq, o. and dq.; kernels over keys find dk, dv, dk. and dv., summed over the query heads of a key head. Sums of products
are IEEE float32, not TF32. Symbols as in `first` and `second`; `q` comes with the scale. Imported only where triton is installed.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# ---- inside a program


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rows(ptr: Any, stride: Any, r: Any, R: Any, D: Any, BD: tl.constexpr) -> Any:
    """Rows r of a matrix [R, D], padded with zeros, in float32."""
    d = tl.arange(0, BD)
    inside = (r[:, None] < R) & (d[None, :] < D)
    return tl.load(ptr + r[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store(ptr: Any, r: Any, R: Any, D: Any, x: Any, BD: tl.constexpr) -> None:
    """Rows r of a contiguous matrix [R, D]."""
    d = tl.arange(0, BD)
    inside = (r[:, None] < R) & (d[None, :] < D)
    tl.store(ptr + r[:, None] * D + d[None, :], x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _product(x: Any, y: Any) -> Any:
    return tl.dot(x, y, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _interval(first_ptr: Any, end_ptr: Any, i: Any, Q: Any, K: Any) -> Any:
    """The interval of every query i, empty beyond the last, and the range that holds them all."""
    first = tl.load(first_ptr + i, mask=i < Q, other=0)
    end = tl.load(end_ptr + i, mask=i < Q, other=0)
    low = tl.min(tl.where(first < end, first, K), 0)
    high = tl.max(tl.where(first < end, end, 0), 0)
    return first, end, low, high


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _seen(first: Any, end: Any, kept_ptr: Any, j: Any, K: Any, KEPT: tl.constexpr) -> Any:
    seen = (j[None, :] >= first[:, None]) & (j[None, :] < end[:, None])
    if KEPT:
        kept = tl.load(kept_ptr + j, mask=j < K, other=0) != 0
        seen = seen & kept[None, :]
    return seen


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _capped(x: Any, cap: Any, CAP: tl.constexpr) -> Any:
    """c, c' and c'' of scores x."""
    if CAP:
        t = 1.0 - 2.0 / (tl.exp(2.0 * x / cap) + 1.0)
        slope = 1.0 - t * t
        return cap * t, slope, -2.0 / cap * t * slope
    return x, tl.full(x.shape, 1.0, tl.float32), tl.zeros(x.shape, tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _probabilities(c: Any, L: Any, seen: Any) -> Any:
    # What is hidden is left out before the exponential, for it may be anything; L is infinite where nothing is seen.
    return tl.where(seen, tl.exp(tl.where(seen, c - L[:, None], 0.0)), 0.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _second_tile(
    q: Any, k: Any, v: Any, w: Any, dq: Any, dk: Any, dv: Any, dw: Any, L: Any, m: Any, D: Any, dD: Any, seen: Any, cap: Any,
    CAP: tl.constexpr,
) -> Any:  # fmt: skip
    """p, p., E and E."""
    kT, vT = tl.trans(k), tl.trans(v)
    c, slope, bend = _capped(_product(q, kT), cap, CAP)
    p = _probabilities(c, L, seen)
    dx = _product(dq, kT) + _product(q, tl.trans(dk))
    dp = p * (slope * dx - m[:, None])
    a = _product(w, vT) - D[:, None]
    da = _product(dw, vT) + _product(w, tl.trans(dv)) - dD[:, None]
    e, de = p * a, dp * a + p * da
    return p, dp, slope * e, slope * de + bend * dx * e


# ---- over queries


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _output(
    q_ptr: Any, k_ptr: Any, v_ptr: Any, z_ptr: Any, first_ptr: Any, end_ptr: Any, kept_ptr: Any, o_ptr: Any, L_ptr: Any,
    scale: Any, cap: Any, Q: Any, K: Any, D: Any, E: Any, heads: Any, groups: Any, sequence: Any,
    KEPT: tl.constexpr, SINK: tl.constexpr, CAP: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr,
) -> None:  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    b, head, key_head = n // heads, n % heads, n // groups
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    q = _rows(q_ptr + n * Q * D, D, i, Q, D, BD) * scale
    first, end, low, high = _interval(first_ptr + b * sequence, end_ptr + b * sequence, i, Q, K)
    m = tl.full((BI,), float("-inf"), tl.float32)
    s = tl.zeros((BI,), tl.float32)
    total = tl.zeros((BI, BE), tl.float32)
    if SINK:
        m = tl.zeros((BI,), tl.float32) + tl.load(z_ptr + head).to(tl.float32)
        s += 1.0
    for start in range(low, high, BJ):
        j = start + tl.arange(0, BJ)
        k = _rows(k_ptr + key_head * K * D, D, j, K, D, BD)
        v = _rows(v_ptr + key_head * K * E, E, j, K, E, BE)
        c, _slope, _bend = _capped(_product(q, tl.trans(k)), cap, CAP)
        c = tl.where(_seen(first, end, kept_ptr + b * K, j, K, KEPT), c, float("-inf"))
        grown = tl.maximum(m, tl.max(c, 1))
        base = tl.where(grown == float("-inf"), 0.0, grown)
        e, shrink = tl.exp(c - base[:, None]), tl.exp(m - base)
        s = s * shrink + tl.sum(e, 1)
        total = total * shrink[:, None] + _product(e, v)
        m = grown
    some = s > 0
    o = tl.where(some[:, None], total / tl.where(some, s, 1.0)[:, None], 0.0)
    _store(o_ptr + n * Q * E, i, Q, E, o, BE)
    tl.store(L_ptr + n * Q + i, tl.where(some, m + tl.log(tl.where(some, s, 1.0)), float("inf")), mask=i < Q)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _reverse_queries(
    q_ptr: Any, k_ptr: Any, v_ptr: Any, w_ptr: Any, L_ptr: Any, D_ptr: Any, first_ptr: Any, end_ptr: Any, kept_ptr: Any,
    dq_ptr: Any, scale: Any, cap: Any, Q: Any, K: Any, D: Any, E: Any, heads: Any, groups: Any, sequence: Any,
    KEPT: tl.constexpr, CAP: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
) -> None:  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    b, key_head = n // heads, n // groups
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    q = _rows(q_ptr + n * Q * D, D, i, Q, D, BD) * scale
    w = _rows(w_ptr + n * Q * E, E, i, Q, E, BE)
    L = tl.load(L_ptr + n * Q + i, mask=i < Q, other=0.0)
    along = tl.load(D_ptr + n * Q + i, mask=i < Q, other=0.0)
    first, end, low, high = _interval(first_ptr + b * sequence, end_ptr + b * sequence, i, Q, K)
    total = tl.zeros((BI, BD), tl.float32)
    for start in range(low, high, BJ):
        j = start + tl.arange(0, BJ)
        k = _rows(k_ptr + key_head * K * D, D, j, K, D, BD)
        v = _rows(v_ptr + key_head * K * E, E, j, K, E, BE)
        c, slope, _bend = _capped(_product(q, tl.trans(k)), cap, CAP)
        p = _probabilities(c, L, _seen(first, end, kept_ptr + b * K, j, K, KEPT))
        total += _product(slope * p * (_product(w, tl.trans(v)) - along[:, None]), k)
    _store(dq_ptr + n * Q * D, i, Q, D, total * scale, BD)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _forward(
    q_ptr: Any, k_ptr: Any, v_ptr: Any, tq_ptr: Any, tk_ptr: Any, tv_ptr: Any, o_ptr: Any, L_ptr: Any, first_ptr: Any,
    end_ptr: Any, kept_ptr: Any, m_ptr: Any, do_ptr: Any, scale: Any, cap: Any, Q: Any, K: Any, D: Any, E: Any, heads: Any,
    groups: Any, sequence: Any, KEPT: tl.constexpr, CAP: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr,
) -> None:  # fmt: skip
    """m comes with the sinks' part, and leaves whole."""
    n = tl.program_id(1).to(tl.int64)
    b, key_head = n // heads, n // groups
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    q = _rows(q_ptr + n * Q * D, D, i, Q, D, BD) * scale
    dq = _rows(tq_ptr + n * Q * D, D, i, Q, D, BD) * scale
    o = _rows(o_ptr + n * Q * E, E, i, Q, E, BE)
    L = tl.load(L_ptr + n * Q + i, mask=i < Q, other=0.0)
    m = tl.load(m_ptr + n * Q + i, mask=i < Q, other=0.0)
    first, end, low, high = _interval(first_ptr + b * sequence, end_ptr + b * sequence, i, Q, K)
    total = tl.zeros((BI, BE), tl.float32)
    for start in range(low, high, BJ):
        j = start + tl.arange(0, BJ)
        k, dk = _rows(k_ptr + key_head * K * D, D, j, K, D, BD), _rows(tk_ptr + key_head * K * D, D, j, K, D, BD)
        v, dv = _rows(v_ptr + key_head * K * E, E, j, K, E, BE), _rows(tv_ptr + key_head * K * E, E, j, K, E, BE)
        c, slope, _bend = _capped(_product(q, tl.trans(k)), cap, CAP)
        p = _probabilities(c, L, _seen(first, end, kept_ptr + b * K, j, K, KEPT))
        pc = p * slope * (_product(dq, tl.trans(k)) + _product(q, tl.trans(dk)))
        m += tl.sum(pc, 1)
        total += _product(pc, v) + _product(p, dv)
    tl.store(m_ptr + n * Q + i, m, mask=i < Q)
    _store(do_ptr + n * Q * E, i, Q, E, total - m[:, None] * o, BE)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _second_queries(
    q_ptr: Any, k_ptr: Any, v_ptr: Any, w_ptr: Any, tq_ptr: Any, tk_ptr: Any, tv_ptr: Any, tw_ptr: Any, L_ptr: Any, m_ptr: Any,
    D_ptr: Any, tD_ptr: Any, first_ptr: Any, end_ptr: Any, kept_ptr: Any, dq_ptr: Any, scale: Any, cap: Any, Q: Any, K: Any,
    D: Any, E: Any, heads: Any, groups: Any, sequence: Any, KEPT: tl.constexpr, CAP: tl.constexpr, BI: tl.constexpr,
    BJ: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
) -> None:  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    b, key_head = n // heads, n // groups
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    q, dq = _rows(q_ptr + n * Q * D, D, i, Q, D, BD) * scale, _rows(tq_ptr + n * Q * D, D, i, Q, D, BD) * scale
    w, dw = _rows(w_ptr + n * Q * E, E, i, Q, E, BE), _rows(tw_ptr + n * Q * E, E, i, Q, E, BE)
    L, m = tl.load(L_ptr + n * Q + i, mask=i < Q, other=0.0), tl.load(m_ptr + n * Q + i, mask=i < Q, other=0.0)
    along = tl.load(D_ptr + n * Q + i, mask=i < Q, other=0.0)
    moved = tl.load(tD_ptr + n * Q + i, mask=i < Q, other=0.0)
    first, end, low, high = _interval(first_ptr + b * sequence, end_ptr + b * sequence, i, Q, K)
    total = tl.zeros((BI, BD), tl.float32)
    for start in range(low, high, BJ):
        j = start + tl.arange(0, BJ)
        k, dk = _rows(k_ptr + key_head * K * D, D, j, K, D, BD), _rows(tk_ptr + key_head * K * D, D, j, K, D, BD)
        v, dv = _rows(v_ptr + key_head * K * E, E, j, K, E, BE), _rows(tv_ptr + key_head * K * E, E, j, K, E, BE)
        seen = _seen(first, end, kept_ptr + b * K, j, K, KEPT)
        _p, _dp, e, de = _second_tile(q, k, v, w, dq, dk, dv, dw, L, m, along, moved, seen, cap, CAP)
        total += _product(de, k) + _product(e, dk)
    _store(dq_ptr + n * Q * D, i, Q, D, total * scale, BD)


# ---- over keys


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _reverse_keys(
    q_ptr: Any, k_ptr: Any, v_ptr: Any, w_ptr: Any, L_ptr: Any, D_ptr: Any, first_ptr: Any, end_ptr: Any, kept_ptr: Any,
    dk_ptr: Any, dv_ptr: Any, scale: Any, cap: Any, Q: Any, K: Any, D: Any, E: Any, heads: Any, groups: Any, sequence: Any,
    KEPT: tl.constexpr, CAP: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
) -> None:  # fmt: skip
    key_head = tl.program_id(1).to(tl.int64)
    b = key_head * groups // heads
    start = tl.program_id(0) * BJ
    j = start + tl.arange(0, BJ)
    k = _rows(k_ptr + key_head * K * D, D, j, K, D, BD)
    v = _rows(v_ptr + key_head * K * E, E, j, K, E, BE)
    total_k = tl.zeros((BJ, BD), tl.float32)
    total_v = tl.zeros((BJ, BE), tl.float32)
    for at in range(0, Q, BI):
        i = at + tl.arange(0, BI)
        first, end, low, high = _interval(first_ptr + b * sequence, end_ptr + b * sequence, i, Q, K)
        if (low < start + BJ) & (high > start):
            seen = _seen(first, end, kept_ptr + b * K, j, K, KEPT)
            for g in range(groups):
                n = key_head * groups + g
                q = _rows(q_ptr + n * Q * D, D, i, Q, D, BD) * scale
                w = _rows(w_ptr + n * Q * E, E, i, Q, E, BE)
                L = tl.load(L_ptr + n * Q + i, mask=i < Q, other=0.0)
                along = tl.load(D_ptr + n * Q + i, mask=i < Q, other=0.0)
                c, slope, _bend = _capped(_product(q, tl.trans(k)), cap, CAP)
                p = _probabilities(c, L, seen)
                e = slope * p * (_product(w, tl.trans(v)) - along[:, None])
                total_k += _product(tl.trans(e), q)
                total_v += _product(tl.trans(p), w)
    _store(dk_ptr + key_head * K * D, j, K, D, total_k, BD)
    _store(dv_ptr + key_head * K * E, j, K, E, total_v, BE)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _second_keys(
    q_ptr: Any, k_ptr: Any, v_ptr: Any, w_ptr: Any, tq_ptr: Any, tk_ptr: Any, tv_ptr: Any, tw_ptr: Any, L_ptr: Any, m_ptr: Any,
    D_ptr: Any, tD_ptr: Any, first_ptr: Any, end_ptr: Any, kept_ptr: Any, dk_ptr: Any, dv_ptr: Any, scale: Any, cap: Any,
    Q: Any, K: Any, D: Any, E: Any, heads: Any, groups: Any, sequence: Any, KEPT: tl.constexpr, CAP: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
) -> None:  # fmt: skip
    key_head = tl.program_id(1).to(tl.int64)
    b = key_head * groups // heads
    start = tl.program_id(0) * BJ
    j = start + tl.arange(0, BJ)
    k, dk = _rows(k_ptr + key_head * K * D, D, j, K, D, BD), _rows(tk_ptr + key_head * K * D, D, j, K, D, BD)
    v, dv = _rows(v_ptr + key_head * K * E, E, j, K, E, BE), _rows(tv_ptr + key_head * K * E, E, j, K, E, BE)
    total_k = tl.zeros((BJ, BD), tl.float32)
    total_v = tl.zeros((BJ, BE), tl.float32)
    for at in range(0, Q, BI):
        i = at + tl.arange(0, BI)
        first, end, low, high = _interval(first_ptr + b * sequence, end_ptr + b * sequence, i, Q, K)
        if (low < start + BJ) & (high > start):
            seen = _seen(first, end, kept_ptr + b * K, j, K, KEPT)
            for g in range(groups):
                n = key_head * groups + g
                q = _rows(q_ptr + n * Q * D, D, i, Q, D, BD) * scale
                dq = _rows(tq_ptr + n * Q * D, D, i, Q, D, BD) * scale
                w, dw = _rows(w_ptr + n * Q * E, E, i, Q, E, BE), _rows(tw_ptr + n * Q * E, E, i, Q, E, BE)
                L = tl.load(L_ptr + n * Q + i, mask=i < Q, other=0.0)
                m = tl.load(m_ptr + n * Q + i, mask=i < Q, other=0.0)
                along = tl.load(D_ptr + n * Q + i, mask=i < Q, other=0.0)
                moved = tl.load(tD_ptr + n * Q + i, mask=i < Q, other=0.0)
                p, dp, e, de = _second_tile(q, k, v, w, dq, dk, dv, dw, L, m, along, moved, seen, cap, CAP)
                total_k += _product(tl.trans(de), q) + _product(tl.trans(e), dq)
                total_v += _product(tl.trans(dp), w) + _product(tl.trans(p), dw)
    _store(dk_ptr + key_head * K * D, j, K, D, total_k, BD)
    _store(dv_ptr + key_head * K * E, j, K, E, total_v, BE)
