"""The summed cross-entropy of an output projection as one function of its input and its weight, in chunks of tokens.

With a_t = W h_t + b the projection's output, z = f(a) the logits (f is the identity, a scale or a soft cap), p = softmax(z),

    l = sum over t of  logsumexp(z_t) - z_t[y_t],      A = (p - e_y) f'(a)  is dl/da
    dl/dh = A W,    dl/dW = A^T h,    dl/db = sum over t of A_t

and along u = (u_h, u_W, u_b), where the gradient's inner product with u is <A, q> with q = u_h W^T + h u_W^T + u_b,

    r = f' (diag p - p p^T) f' q + (p - e_y) f'' q
    (H u)_h = r W + A u_W,    (H u)_W = r^T h + A^T u_h,    (H u)_b = sum over t of r_t

The logits of a chunk are computed from h and W whenever they are wanted and go with the chunk: what a graph keeps is h, W and
logsumexp. Along a vector that is one product of matrices more, beside the six that there are; where a is small it is kept instead. Legend: T tokens that count, V classes, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hesscope.losses.chunked_head import ChunkedHead, HeadForm, Parts, scaled


def projected_cross_entropy(
    h_Td: Tensor, W_Vd: Tensor, b_V: Tensor | None, y_T: Tensor, form: HeadForm | None = None
) -> Tensor:
    """The sum over rows of -log softmax(f(W h + b))[y], in nats, at least in float32. Twice differentiable in h, W and b.

    Every row counts. Half-precision products W h are raised to float32, as logits are.
    """
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (h_Td, W_Vd, b_V))
    total: Tensor = _Sum.apply(h_Td, W_Vd, b_V, y_T, form or HeadForm(), wanted)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    """The value; where a gradient will be asked for, it is made from the same logits."""

    @staticmethod
    def forward(
        ctx: Any, h_Td: Tensor, W_Vd: Tensor, b_V: Tensor | None, y_T: Tensor, form: HeadForm, wanted: bool
    ) -> Tensor:
        head = ChunkedHead(h_Td, W_Vd, b_V, y_T, form)
        normaliser_T = torch.empty(len(h_Td), dtype=head.wide, device=h_Td.device)
        total = torch.zeros((), dtype=torch.float64, device=h_Td.device)
        ready = head.zeros(ctx.needs_input_grad[:3]) if wanted else None
        kept_TV = normaliser_T.new_empty(len(h_Td), len(W_Vd)) if wanted and form.keeps(len(h_Td), W_Vd) else None
        for rows in head.slices:
            a_TV = head.projected(rows)
            if kept_TV is not None:
                kept_TV[rows] = a_TV
            z_TV, slope, _ = form.map.expanded(a_TV, order=1) if ready else (form.map.value(a_TV), None, None)
            chosen_T = z_TV.gather(1, y_T[rows, None])[:, 0]
            normaliser_T[rows] = torch.logsumexp(z_TV, -1)
            total += (normaliser_T[rows] - chosen_T).sum(dtype=torch.float64)
            if ready is not None:
                A_TV = scaled(head.residual(z_TV, normaliser_T, rows), slope)
                head.add_transposed(ready, rows, A_TV, h_Td[rows], W_Vd)
        if wanted:
            ctx.save_for_backward(h_Td, W_Vd, b_V, y_T, normaliser_T, kept_TV)
            ctx.form, ctx.ready = form, ready
        return total.to(head.wide)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        h_Td, W_Vd, b_V, y_T, normaliser_T, kept_TV = ctx.saved_tensors
        ready, ctx.ready = ctx.ready, None
        constants = (y_T, normaliser_T.detach(), None if kept_TV is None else kept_TV.detach(), ctx.form)
        wanted = tuple(ctx.needs_input_grad[:3])
        found = _Gradient.apply(h_Td, W_Vd, b_V, cotangent, *constants, ready, wanted)  # type: ignore[no-untyped-call]
        return (*found, None, None, None)


class _Gradient(torch.autograd.Function):
    """cotangent * (dl/dh, dl/dW, dl/db), as a function of h, W, b and the cotangent; `ready` is it for a cotangent of one."""

    @staticmethod
    def forward(
        ctx: Any,
        h_Td: Tensor,
        W_Vd: Tensor,
        b_V: Tensor | None,
        cotangent: Tensor,
        y_T: Tensor,
        normaliser_T: Tensor,
        kept_TV: Tensor | None,
        form: HeadForm,
        ready: Parts | None,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(h_Td, W_Vd, b_V, cotangent, y_T, normaliser_T, kept_TV)
        ctx.set_materialize_grads(False)
        ctx.form = form
        head = ChunkedHead(h_Td, W_Vd, b_V, y_T, form, kept_TV)
        if ready is None:
            ready = head.zeros(wanted)
            for rows in head.slices:
                z_TV, slope, _ = form.map.expanded(head.projected(rows), order=1)
                head.add_transposed(
                    ready, rows, scaled(head.residual(z_TV, normaliser_T, rows), slope), h_Td[rows], W_Vd
                )
        return head.narrowed([None if x is None else x.mul_(cotangent) for x in ready])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u_h: Tensor | None, u_W: Tensor | None, u_b: Tensor | None) -> tuple[Any, ...]:
        h_Td, W_Vd, b_V, cotangent, y_T, normaliser_T, kept_TV = ctx.saved_tensors
        head = ChunkedHead(h_Td, W_Vd, b_V, y_T, ctx.form, kept_TV)
        into = head.zeros(ctx.needs_input_grad[:3])
        along = torch.zeros((), dtype=torch.float64, device=h_Td.device) if ctx.needs_input_grad[3] else None
        if u_h is not None or u_W is not None or u_b is not None:
            for rows in head.slices:
                _add_second_order(head, rows, normaliser_T, (u_h, u_W, u_b), into, along)
        found = head.narrowed([None if x is None else x.mul_(cotangent) for x in into])
        return (*found, None if along is None else along.to(cotangent.dtype), *[None] * 6)


def _add_second_order(
    head: ChunkedHead,
    rows: slice,
    normaliser_T: Tensor,
    u: tuple[Tensor | None, ...],
    into: Parts,
    along: Tensor | None,
) -> None:
    """Add a chunk's part of H u to `into`, and of <A, q> to `along`."""
    u_h, u_W, _ = u
    q_TV = head.tangent(rows, *u)
    z_TV, first, second = head.form.map.expanded(head.projected(rows))
    p_TV = z_TV.sub_(normaliser_T[rows, None]).exp_()
    r_TV = scaled(q_TV.clone() if along is not None or second is not None else q_TV, first)
    r_TV = scaled(r_TV.sub_(head.dot(p_TV, r_TV, rows)[:, None]).mul_(p_TV), first)
    residual_TV = head.less_target(p_TV, rows)
    if second is not None:
        r_TV += second * residual_TV * q_TV
    A_TV = scaled(residual_TV, first)
    if along is not None:
        along += head.dot(A_TV, q_TV, rows).sum(dtype=torch.float64)
    head.add_transposed(into, rows, r_TV, head.h_Td[rows], head.W_Vd)
    # A u_W and A^T u_h
    parts = [into[0] if u_W is not None else None, into[1] if u_h is not None else None, None]
    head.add_transposed(parts, rows, A_TV, head.h_Td if u_h is None else u_h[rows], head.W_Vd if u_W is None else u_W)
