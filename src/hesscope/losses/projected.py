"""The summed cross-entropy of an output projection, with its Hessian in the projection's input written out.

    l(h) = sum over rows t of  logsumexp(W h_t) - <w_(y_t), h_t>,     dl/dh_t = W^T (p_t - e_(y_t)),
    d2l/dh_t^2 = C_t = W^T (diag(p_t) - p_t p_t^T) W = sum over classes v of p_tv (w_v - m_t)(w_v - m_t)^T,   m_t = W^T p_t

A product C_t u takes two passes through W, or one small matrix product where C_t, [d, d], is formed once. Forming it costs
T d^2 V multiplications and saves nearly 2 T d V in every product, so that it pays from about d / 2 products on. The centred form
keeps its relative accuracy where one class has almost all of the probability. Legend: T rows, d width, V classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hesscope.losses.causal_lm import CausalLMLoss
from hesscope.losses.head import counted, projection_of
from hesscope.losses.standing_logits import output_weight

#: Temporaries of [rows, V] or [rows, V, d] stay below so many bytes.
_CHUNK_BYTES = 64 * 2**20
#: The matrices C_t are formed only below so many bytes.
_CONTRACTED_BYTES = 2 * 2**30


class ProjectedCausalLMLoss:
    """A `CausalLMLoss` for one fixed point and many second derivatives: the last linear layer is part of the loss.

    It is the same function. Where the model's logits are not a plain linear map of its last hidden states (soft caps), the
    loss falls back to the logits. The output projection must be a constant.

    Args:
        products: how many second-order products are to be expected; decides whether the C_t are formed.
        copies: how many times the batch repeats the same sequences; they share the C_t.
    """

    def __init__(self, base: CausalLMLoss, products: int, copies: int = 1) -> None:
        self._base, self._products, self._copies = base, products, copies
        #: What the last call of `total` did, in words, what it keeps, and what it took beyond that for a moment.
        self.form, self.bytes, self.transient_bytes = "logits", 0, 0

    def count(self, batch: dict[str, Any]) -> int:
        """The number of valid targets, without running the model."""
        return self._base.count(batch)

    def total(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum and count of one batch."""
        self.form = "logits"
        weight = output_weight(model)
        if weight is None or weight.requires_grad:
            return self._base.total(model, batch)
        projection, logits, _ = projection_of(self._base, model, batch)
        if projection is None:
            return self._base.total_of_outputs(logits, batch)
        bias, wide = projection.bias, projection.dtype in (torch.float32, torch.float64)
        if projection.map.steps or (bias is not None and bias.requires_grad) or not wide:
            return self._base.total_of_outputs(projection.form(), batch)
        h_KTd, y_KT = counted(projection.hidden, self._base.targets(batch))
        T = len(y_KT) // self._copies
        logits_TV = F.linear(h_KTd[:T].detach(), weight.detach(), None if bias is None else bias.detach())
        head = Head(weight.detach(), logits_TV, y_KT[:T], self._products)
        self.form = "contracted" if head.contracted else "projected"
        # While the graph is built: logits, their softmax and what it is made from; chunks of W.
        chunks = 3 if head.contracted else 1
        self.bytes, self.transient_bytes = head.bytes, 3 * logits_TV.nbytes + chunks * _CHUNK_BYTES
        return head(h_KTd), len(y_KT)


class Head:
    """The loss of fixed targets as a function of the projection's input, expanded to second order at one point."""

    def __init__(self, W_Vd: Tensor, logits_TV: Tensor, y_T: Tensor, products: int = 0) -> None:
        self._W_Vd, self._p_TV = W_Vd, torch.softmax(logits_TV, -1)
        chosen_T = logits_TV.gather(1, y_T[:, None])[:, 0]
        self.total = (torch.logsumexp(logits_TV, -1) - chosen_T).sum()
        mean_Td = self._p_TV @ W_Vd
        self.gradient_Td = mean_Td - W_Vd[y_T]
        V, d = W_Vd.shape
        pays = contraction_pays(len(y_T), V, d, products, W_Vd.itemsize)
        self._C_Tdd = self._contract(mean_Td) if pays else None
        if self._C_Tdd is not None:
            del self._p_TV

    @property
    def bytes(self) -> int:
        """What is kept for products, beyond the weight."""
        held = self._p_TV if self._C_Tdd is None else self._C_Tdd
        return held.nbytes + self.gradient_Td.nbytes

    @property
    def contracted(self) -> bool:
        """Whether the C_t were formed."""
        return self._C_Tdd is not None

    def __call__(self, h_KTd: Tensor) -> Tensor:
        """The sum over rows, twice differentiable in h at the point that was expanded; h may repeat the rows K times."""
        total: Tensor = _Sum.apply(h_KTd, self)  # type: ignore[no-untyped-call]
        return total

    def product(self, u_KTd: Tensor) -> Tensor:
        """C_t u_t for every row, K times."""
        if len(u_KTd) == 0:
            return torch.zeros_like(u_KTd)
        copies_KTd = u_KTd.view(-1, *self.gradient_Td.shape)
        if self._C_Tdd is not None:
            return (self._C_Tdd @ copies_KTd.permute(1, 2, 0)).permute(2, 0, 1).reshape(u_KTd.shape)
        return torch.cat([self._product(u_Td) for u_Td in copies_KTd])

    def _product(self, u_Td: Tensor) -> Tensor:
        result = torch.empty_like(u_Td)
        for rows in _chunks(len(u_Td), self._W_Vd.shape[0] * u_Td.itemsize):
            p_TV, q_TV = self._p_TV[rows], u_Td[rows] @ self._W_Vd.T
            q_TV.sub_(torch.linalg.vecdot(p_TV, q_TV)[:, None]).mul_(p_TV)
            torch.mm(q_TV, self._W_Vd, out=result[rows])
        return result

    def _contract(self, mean_Td: Tensor) -> Tensor:
        V, d = self._W_Vd.shape
        C_Tdd = self._W_Vd.new_empty(len(self._p_TV), d, d)
        for rows in _chunks(len(C_Tdd), V * d * C_Tdd.itemsize):
            A_TVd = self._W_Vd - mean_Td[rows, None, :]
            A_TVd *= self._p_TV[rows, :, None].sqrt()
            torch.bmm(A_TVd.mT, A_TVd, out=C_Tdd[rows])
        return C_Tdd


def contraction_pays(T: int, V: int, d: int, products: int, itemsize: int) -> bool:
    """Whether forming every C_t costs less than it saves: twice the break-even of d / 2 products, and not too large."""
    return products > d and d < V and T * d * d * itemsize <= _CONTRACTED_BYTES


def _chunks(rows: int, bytes_a_row: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // bytes_a_row)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_Td: Tensor, head: Head) -> Tensor:
        ctx.save_for_backward(h_Td)
        ctx.head = head
        return head.total * (len(h_Td) // len(head.gradient_Td)) if len(h_Td) else head.total.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (h_Td,) = ctx.saved_tensors
        gradient: Tensor = _Gradient.apply(h_Td, cotangent, ctx.head)  # type: ignore[no-untyped-call]
        return gradient, None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_Td: Tensor, cotangent: Tensor, head: Head) -> Tensor:
        ctx.save_for_backward(cotangent)
        ctx.head, ctx.copies = head, len(h_Td) // max(len(head.gradient_Td), 1)
        return head.gradient_Td.repeat(ctx.copies, 1) * cotangent

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u_Td: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (cotangent,) = ctx.saved_tensors
        along = None
        if ctx.needs_input_grad[1]:
            along = (u_Td * ctx.head.gradient_Td.repeat(ctx.copies, 1)).sum()
        return ctx.head.product(u_Td) * cotangent, along, None
