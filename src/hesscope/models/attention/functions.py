"""Tiled attention with its derivatives in every arrangement of two of them.

Four functions close under differentiation, for the derivative of the reverse derivative along a tangent and the reverse
derivative of the forward one are the same sums (`tiles`):

    Attention       reverse: Reverse            forward: Forward
    Reverse         reverse: Second, Forward    forward: Second
    Forward         reverse: Second, Reverse
    Second          (third derivatives: none)

Each runs outside autograd, so that a graph keeps its arguments alone: tensors of the inputs' sizes. A batch of tangents goes
through one after the other. The arguments `o` and `L` of the last three belong to q, k, v, and are no variables of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hesscope.models.attention.forms import form_for
from hesscope.models.attention.scores import Inputs, Shape, Tangents

Maybe = Tensor | None


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, shape: Shape, sinks: Maybe = None) -> Tensor:
    """softmax(scores) v of queries [B, heads, Q, D], keys [B, key heads, K, D] and values [B, key heads, K, E].

    Every key head serves heads / key heads consecutive query heads; `sinks` [heads] are scores that take a share of the softmax
    and have no value. A query that sees nothing gets zeros.
    """
    groups = q.shape[1] // k.shape[1]
    z = None if sinks is None else sinks.reshape(k.shape[1], groups)
    o: Tensor = _apply(Attention, q.reshape(q.shape[0], k.shape[1], groups, *q.shape[2:]), k, v, z, shape)[0]
    return o.flatten(1, 2)


def _apply(function: type[Function], *args: Any) -> Any:
    return function.apply(*args)  # type: ignore[no-untyped-call]


class Attention(Function):
    """(q, k, v, sinks, shape) to o and L."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, z: Maybe, shape: Shape) -> tuple[Tensor, Tensor]:
        return form_for(q, v, shape).output(Inputs(q, k, v, z), shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.shape = inputs
        ctx.mark_non_differentiable(output[1])
        _save(ctx, *tensors, *output)

    @staticmethod
    def backward(ctx: Any, w: Maybe, _: Maybe) -> tuple[Maybe, ...]:
        if w is None:
            return (None,) * 5
        return (*_apply(Reverse, *ctx.saved_tensors, w, ctx.shape), None)

    @staticmethod
    def jvp(ctx: Any, dq: Maybe, dk: Maybe, dv: Maybe, dz: Maybe, _: None) -> tuple[Maybe, None]:
        return _apply(Forward, *ctx.saved_tensors, dq, dk, dv, dz, ctx.shape), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _one_by_one(Attention, info, in_dims, args)


class Reverse(Function):
    """(q, k, v, sinks, o, L, w, shape) to the derivatives of <w, o> in q, k, v and the sinks."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, z: Maybe, o: Tensor, L: Tensor, w: Tensor, shape: Shape
    ) -> tuple[Maybe, ...]:
        return form_for(q, v, shape).reverse(Inputs(q, k, v, z), o, L, w, shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Maybe, ...]) -> None:
        *tensors, ctx.shape = inputs
        _save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, uq: Maybe, uk: Maybe, uv: Maybe, uz: Maybe) -> tuple[Maybe, ...]:
        q, k, v, z, o, L, w = ctx.saved_tensors
        u = (uq, uk, uv, uz)
        if all(x is None for x in u):
            return (None,) * 8
        if not any(ctx.needs_input_grad[:4]) or _is_one_zero(w):
            return (None,) * 6 + (_apply(Forward, q, k, v, z, o, L, *u, ctx.shape), None)
        do, *found = _apply(Second, q, k, v, z, o, L, w, *u, None, ctx.shape)
        return (*found, None, None, do, None)

    @staticmethod
    def jvp(
        ctx: Any, dq: Maybe, dk: Maybe, dv: Maybe, dz: Maybe, _: Maybe, __: Maybe, dw: Maybe, ___: None
    ) -> tuple[Maybe, ...]:
        return tuple(_apply(Second, *ctx.saved_tensors, dq, dk, dv, dz, dw, ctx.shape)[1:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _one_by_one(Reverse, info, in_dims, args)


class Forward(Function):
    """(q, k, v, sinks, o, L, tangents of q, k, v and the sinks, shape) to the tangent of o."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, z: Maybe, o: Tensor, L: Tensor, dq: Maybe, dk: Maybe, dv: Maybe, dz: Maybe,
        shape: Shape,
    ) -> Tensor:  # fmt: skip
        return form_for(q, v, shape).forward(Inputs(q, k, v, z), o, L, Tangents(dq, dk, dv, dz), shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.shape = inputs
        _save(ctx, *tensors)

    @staticmethod
    def backward(ctx: Any, w: Maybe) -> tuple[Maybe, ...]:
        q, k, v, z, o, L, *dots = ctx.saved_tensors
        if w is None:
            return (None,) * 11
        curved: tuple[Maybe, ...] = (None,) * 4
        linear: tuple[Maybe, ...] = (None,) * 4
        if any(ctx.needs_input_grad[:4]):
            curved = tuple(_apply(Second, q, k, v, z, o, L, w, *dots, None, ctx.shape)[1:])
        if any(ctx.needs_input_grad[6:10]):
            found = _apply(Reverse, q, k, v, z, o, L, w, ctx.shape)
            linear = tuple(x if dot is not None else None for x, dot in zip(found, dots, strict=True))
        return (*curved, None, None, *linear, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _one_by_one(Forward, info, in_dims, args)


class Second(Function):
    """(q, k, v, sinks, o, L, w, tangents of q, k, v, the sinks and w, shape) to the tangents of o and of `Reverse`."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, z: Maybe, o: Tensor, L: Tensor, w: Tensor, dq: Maybe, dk: Maybe, dv: Maybe,
        dz: Maybe, dw: Maybe, shape: Shape,
    ) -> tuple[Maybe, ...]:  # fmt: skip
        found = form_for(q, v, shape).second(Inputs(q, k, v, z), o, L, w, Tangents(dq, dk, dv, dz), dw, shape)
        return found.o, found.q, found.k, found.v, found.sinks

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Maybe, ...]) -> None:
        """Nothing is kept, for there are no further derivatives."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _one_by_one(Second, info, in_dims, args)


def _save(ctx: Any, *tensors: Maybe) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    # A derivative that is not there costs nothing; zeros would.
    ctx.set_materialize_grads(False)


def _is_one_zero(w: Tensor) -> bool:
    """Whether a tensor is a single zero in memory, seen at every place: products through the outputs differentiate there."""
    if torch._C._functorch.is_functorch_wrapped_tensor(w):
        return False
    return w.untyped_storage().nbytes() == w.element_size() and not bool(w.reshape(-1)[:1].any())


def _one_by_one(
    function: type[Function], info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """The rule for a batch: its members in turn, stacked."""

    def member(n: int) -> Any:
        return _apply(function, *(x if dim is None else x.select(dim, n) for x, dim in zip(args, in_dims, strict=True)))

    found = [member(n) for n in range(info.batch_size)]
    if isinstance(found[0], Tensor):
        return torch.stack(found), 0
    stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True))
    return stacked, tuple(None if x is None else 0 for x in stacked)
