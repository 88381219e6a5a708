"""Operations whose forward derivative torch gets wrong or refuses, written out in operations that it gets right.

Under reverse-over-forward torch 2.13 differentiates the forward derivative of a normalisation as if the mean and the deviation
were constants, and that of attention to NaN where a position sees nothing. Neither raises. `tests/engines` holds every
operation of this table, and many more, to reverse-over-reverse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hesscope.losses.cross_entropy import IGNORED, summed_cross_entropy

Replacements = dict[Callable[..., Any], Callable[..., Any]]


class Replacing(TorchFunctionMode):
    """Calls other functions in place of torch's own while it is active."""

    def __init__(self, replacements: Replacements) -> None:
        super().__init__()
        self._replacements = replacements

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._replacements.get(func, func)(*args, **(kwargs or {}))


def _normalised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """`torch.nn.functional.layer_norm`, composed; half precision is normalised in float32, as torch does."""
    axes = tuple(range(-len(normalized_shape), 0))
    wide = input if input.dtype == torch.float64 else input.float()
    return _scaled(_normalised(wide, axes, eps), weight, bias).to(input.dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, composed where it takes the batch's own statistics and keeps none."""
    if not training or running_mean is not None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _per_channel(input, (0, *range(2, input.dim())), weight, bias, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.instance_norm`, composed where it takes the input's own statistics and keeps none."""
    if not use_input_stats or running_mean is not None:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _per_channel(input, tuple(range(2, input.dim())), weight, bias, eps)


def _per_channel(x: Tensor, axes: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise over `axes`, and scale along axis 1."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    scale, shift = (None if part is None else part.reshape(shape) for part in (weight, bias))
    return _scaled(_normalised(x, axes, eps), scale, shift)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, composed; a position that sees nothing gets zeros, as there."""
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = _masked(scores, attn_mask)
    weights = scores.softmax(-1)
    if attn_mask is not None:
        weights = weights.masked_fill(_blind(attn_mask), 0.0)
    return (F.dropout(weights, dropout_p) @ value).to(dtype)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores with what is hidden at minus infinity, except in rows where everything is."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~(mask | _blind(mask)), -math.inf)
    return scores + mask.masked_fill(_blind(mask), 0.0)


def _blind(mask: Tensor) -> Tensor:
    """[..., queries, 1]: which positions see nothing."""
    hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
    return hidden.all(-1, keepdim=True)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.mse_loss`, composed where nothing deprecated is asked for."""
    if size_average is not None or reduce is not None or reduction not in ("none", "mean", "sum"):
        return F.mse_loss(input, target, size_average, reduce, reduction)
    if weight is not None or input.shape != target.shape:
        return F.mse_loss(input, target, reduction=reduction, weight=weight)  # type: ignore[call-arg]
    squares = (input - target).square()
    return squares if reduction == "none" else squares.mean() if reduction == "mean" else squares.sum()


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """`summed_cross_entropy` in torch's own operations, which have a forward mode."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


#: What forward-over-reverse needs: custom functions have no forward rule, and mse_loss's is refused by torch 2.13.
FORWARD_OVER_REVERSE: Replacements = {summed_cross_entropy: cross_entropy_sum, F.mse_loss: mse_loss}

#: What reverse-over-forward needs besides.
REVERSE_OVER_FORWARD: Replacements = {
    **FORWARD_OVER_REVERSE,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.scaled_dot_product_attention: attention,
}
