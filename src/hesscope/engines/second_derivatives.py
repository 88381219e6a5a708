"""Operations that keep more tensors in torch than they have to when their backward pass is to be differentiated again.

What a model writes as several operations is seen as one by what their results remember: silu(x), and the product of that with a
gate; the root mean square, and the product of that with x. A result that is used otherwise is what it is in torch. The references
go with the results. A mean's backward pass spreads the cotangent over a tensor of the input's size before it divides; a square's
keeps 2 x beside x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hesscope.engines.forward_rules import Replacements
from hesscope.engines.gated_silu import gated_silu
from hesscope.engines.gated_silu import silu as written_silu
from hesscope.engines.gelu import gelu
from hesscope.engines.root_mean_square import normalised


@dataclass(frozen=True)
class _Made:
    """What a result was made of: the operation, its input, and the versions that both have."""

    by: str
    x: Tensor
    versions: tuple[int, int]


def _remember(result: Tensor, by: str, x: Tensor) -> Tensor:
    result.made_of = _Made(by, x, (x._version, result._version))  # type: ignore[attr-defined]
    return result


def _input(y: Any, by: str) -> Tensor | None:
    """The x that y was made of by this operation, if both are as they were."""
    made: _Made | None = getattr(y, "made_of", None) if isinstance(y, Tensor) else None
    if made is None or made.by != by or made.versions != (made.x._version, y._version):
        return None
    return made.x


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.silu`."""
    if inplace or not input.is_floating_point():
        return F.silu(input, inplace)
    return _remember(written_silu(input), "silu", input)


def product(input: Tensor, other: Any) -> Tensor:
    """`input * other`; as one operation if one is silu(x) and the other of its shape, or the root mean square of the other."""
    for y, other_one in ((input, other), (other, input)):
        if not isinstance(other_one, Tensor):
            continue
        x = _input(y, "silu")
        if x is not None and other_one.shape == y.shape and other_one.dtype == y.dtype:
            return gated_silu(x, other_one, y)
        if _input(y, "reciprocal root") is other_one:
            return normalised(other_one, y)
    return Tensor.mul(input, other)


def power(input: Tensor, exponent: Any, **kwargs: Any) -> Tensor:
    """`Tensor.pow`; a floating square as a product."""
    if kwargs or type(exponent) not in (int, float) or exponent != 2 or not input.is_floating_point():
        return Tensor.pow(input, exponent, **kwargs)
    return _remember(input * input, "square", input)


def mean(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.mean`; over axes of a floating tensor as a sum that is divided."""
    over = args[0] if args else kwargs.get("dim")
    if over is None or kwargs.get("dtype") is not None or not input.is_floating_point() or input.numel() == 0:
        return Tensor.mean(input, *args, **kwargs)
    total = Tensor.sum(input, *args, **kwargs)
    result = total / (input.numel() // total.numel())
    x = _input(input, "square")
    last = over in (-1, [-1], (-1,)) and result.shape == (*input.shape[:-1], 1)
    return result if x is None or not last else _remember(result, "mean square", x)


def added(input: Any, other: Any, **kwargs: Any) -> Tensor:
    """`input + other`; a number beside a mean square is remembered."""
    result = Tensor.add(input, other, **kwargs)
    x = _input(input, "mean square") if type(other) in (int, float) and not kwargs else None
    return result if x is None else _remember(result, "shifted", x)


def reciprocal_root(input: Tensor) -> Tensor:
    """`Tensor.rsqrt`."""
    x = _input(input, "shifted")
    return Tensor.rsqrt(input) if x is None else _remember(Tensor.rsqrt(input), "reciprocal root", x)


#: What reverse-over-reverse runs in place of torch's own.
WRITTEN_OUT: Replacements = {
    F.silu: silu,
    F.gelu: gelu,
    Tensor.mul: product,
    Tensor.__mul__: product,
    torch.mul: product,
    Tensor.mean: mean,
    torch.mean: mean,
    Tensor.pow: power,
    torch.pow: power,
    Tensor.add: added,
    Tensor.__add__: added,
    Tensor.rsqrt: reciprocal_root,
    torch.rsqrt: reciprocal_root,
}
