"""Logits that are not formed: what a model returns in place of W h + b while its output projection is watched.

Every operation of torch on the stand-in is seen. What is known to act on logits one by one (scales, tanh, casts) or to add a bias
is noted, and to which device they go; before anything else the logits are formed, once and for all, and the operation runs on them. So whatever a model does,
its result is right, and the stand-in comes out whole only where the logits are f(W h + b) with f known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from hesscope.losses.logits_map import AS_THEY_ARE, LogitsMap


@dataclass(frozen=True)
class Projection:
    """f(W h + b), with h [..., d], W [V, d], b [V] and f a `LogitsMap`, in the dtype that the model gives its logits.

    `device` is where the model gives them; None is where h is.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    map: LogitsMap = AS_THEY_ARE
    version: int = 0
    device: torch.device | None = None

    def form(self) -> Tensor:
        """The logits, by the model's own operations."""
        z = F.linear(self.hidden, self.weight, self.bias).to(self.dtype)
        for step in self.map.steps:
            z = torch.tanh(z) if step is None else z * step
        return z if self.device is None else z.to(self.device)

    @property
    def untouched(self) -> bool:
        """Whether the hidden states are still those that the projection was given."""
        return self.hidden._version == self.version


class StandingLogits(Tensor):
    """Has the shape and the dtype of logits, and no entries until something asks for them."""

    projection: Projection
    #: The logits, once they are formed.
    formed: Tensor | None

    @staticmethod
    def of(projection: Projection) -> StandingLogits:
        """The stand-in for a projection's logits."""
        shape = (*projection.hidden.shape[:-1], len(projection.weight))
        made: StandingLogits = Tensor._make_wrapper_subclass(
            StandingLogits, shape, dtype=projection.dtype, device=projection.device or projection.hidden.device
        )
        made.projection, made.formed = projection, None
        return made

    def form(self) -> Tensor:
        """The logits; from now on they, and what is done to them, are all that counts."""
        if self.formed is None:
            self.formed = self.projection.form()
        return self.formed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], StandingLogits) else None
        if func in _FACTS and first is not None and first.formed is None:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.to and first is not None and first.formed is None:
            noted = _moved(first, args[1:], kwargs)
        elif not kwargs and first is not None and first.formed is None:
            noted = _noted(func, first, args[1:])
        elif not kwargs and len(args) == 2 and isinstance(args[1], StandingLogits) and args[1].formed is None:
            noted = _noted(func, args[1], args[:1]) if func in _PRODUCTS or func in _SUMS else None
        else:
            noted = None
        if noted is not None:
            return noted
        args, kwargs = tree_map_only(StandingLogits, StandingLogits.form, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(StandingLogits, StandingLogits.form, (args, kwargs or {}))
        return func(*args, **kwargs)


#: Questions that the stand-in itself answers.
_FACTS = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.is_floating_point,
    torch.is_floating_point,
}
_PRODUCTS = {Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul}
_QUOTIENTS = {Tensor.div, Tensor.__truediv__, torch.div, Tensor.true_divide, torch.true_divide}
_SUMS = {Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add}
_TANH = {Tensor.tanh, torch.tanh}
_CASTS = {Tensor.float: torch.float32, Tensor.double: torch.float64}


def _noted(func: Callable[..., Any], logits: StandingLogits, others: tuple[Any, ...]) -> StandingLogits | None:
    """The stand-in for what comes out of an operation with out-of-place semantics, if it is one that is known."""
    p = logits.projection
    number = float(others[0]) if len(others) == 1 and isinstance(others[0], Real) else None
    if func is Tensor.contiguous and not others:
        return logits
    if func in _TANH and not others:
        return StandingLogits.of(replace(p, map=p.map.then(None)))
    if func in _PRODUCTS and number is not None:
        return StandingLogits.of(replace(p, map=p.map.then(number)))
    if func in _QUOTIENTS and number:
        return StandingLogits.of(replace(p, map=p.map.then(1.0 / number)))
    if func in _CASTS and not others:
        return _placed(logits, _CASTS[func], None)
    if func in _SUMS and len(others) == 1 and isinstance(others[0], Tensor) and not p.map.steps:
        return _with_bias(p, others[0])
    return None


def _moved(logits: StandingLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StandingLogits | None:
    """The stand-in for `logits.to(*args, **kwargs)`, such as accelerate makes of what a spread model returns."""
    try:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError):  # another form of it
        return None
    return _placed(logits, dtype, device) if memory_format is None else None


def _placed(logits: StandingLogits, dtype: torch.dtype | None, device: torch.device | None) -> StandingLogits | None:
    """The stand-in in another dtype, no narrower, and on another device."""
    p = logits.projection
    dtype = dtype or p.dtype
    if not dtype.is_floating_point or dtype.itemsize < p.dtype.itemsize:
        return None
    if dtype == p.dtype and device in (None, logits.device):
        return logits
    return StandingLogits.of(replace(p, dtype=dtype, device=device or p.device))


def _with_bias(p: Projection, added: Tensor) -> StandingLogits | None:
    """A tensor that is the same for every token is a bias."""
    one_a_class = added.shape[-1:] == p.weight.shape[:1] and added.numel() == len(p.weight)
    if not one_a_class or added.dtype != p.weight.dtype or p.dtype != added.dtype or p.device is not None:
        return None
    b = added.reshape(-1)
    return StandingLogits.of(replace(p, bias=b if p.bias is None else p.bias + b))


class WatchProjection(TorchFunctionMode):
    """Puts the stand-in where the linear layer with this weight would return logits, the first time that it is called."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear or len(args) < 2 or args[1] is not self._weight or isinstance(args[0], StandingLogits):
            return func(*args, **kwargs)
        self.calls += 1
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return StandingLogits.of(Projection(args[0], args[1], bias, args[0].dtype, version=args[0]._version))


def output_weight(model: nn.Module) -> Tensor | None:
    """The weight of the model's last linear layer, as it is now; None where the model does not say."""
    get: Any = getattr(model, "get_output_embeddings", None)
    layer = get() if get is not None else None
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) and isinstance(layer, nn.Linear) else None
