"""What of an operation decides how long it takes: the function and the forms of its arguments, without their numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: A number without denormal or infinite products, sums and powers.
_HALF = 0.5


@dataclass(frozen=True, slots=True)
class Form:
    """A tensor's, without its place in its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self, device: torch.device) -> Tensor:
        """A tensor of the form: halves, or zeros where whole numbers may be indices, or true."""
        extent = 1 + sum((length - 1) * step for length, step in zip(self.shape, self.stride, strict=True))
        extent = extent if all(self.shape) else 0
        real = self.dtype.is_floating_point or self.dtype.is_complex
        value: float | bool = _HALF if real else self.dtype == torch.bool
        return torch.full((extent,), value, dtype=self.dtype, device=device).as_strided(self.shape, self.stride)

    @property
    def nbytes(self) -> int:
        """Of the numbers that differ in place; what is only seen many times (an expanded axis) counts once."""
        size = self.dtype.itemsize
        for length, step in zip(self.shape, self.stride, strict=True):
            size *= length if step else 1
        return size


@dataclass(frozen=True)
class Kind:
    """An operation on arguments of certain forms."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    def run(self, device: torch.device) -> Callable[[], Any]:
        """A call that runs the operation on made-up arguments, which it may change."""
        args = tuple(_made(x, device) for x in self.arguments)
        kwargs = {name: _made(x, device) for name, x in self.keywords}
        return lambda: self.function(*args, **kwargs)

    @property
    def mutates(self) -> bool:
        """Whether the operation changes an argument, so that a second run may meet other numbers."""
        return bool(self.function._schema.is_mutable)

    @property
    def nbytes(self) -> int:
        """Of the arguments."""
        return sum(_bytes(x) for x in (*self.arguments, *(x for _, x in self.keywords)))


def kind_of(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind:
    """The kind of a call."""
    return Kind(function, tuple(map(form_of, args)), tuple((name, form_of(x)) for name, x in kwargs.items()))


def form_of(x: Any) -> Any:
    """What of an argument decides the form of the result: of a tensor its Form, of a number itself with its type."""
    if isinstance(x, Tensor):
        return Form(tuple(x.shape), x.stride(), x.dtype)
    if isinstance(x, (list, tuple)):
        return tuple(map(form_of, x))
    return _Constant(type(x), x)


@dataclass(frozen=True, slots=True)
class _Constant:
    """A number, a name, a device; of one type, for 1, 1.0 and True are the same key."""

    type: type
    value: Any


def _made(x: Any, device: torch.device) -> Any:
    if isinstance(x, Form):
        return x.made(device)
    if isinstance(x, tuple):
        return [_made(y, device) for y in x]
    return device if isinstance(x.value, torch.device) else x.value


def _bytes(x: Any) -> int:
    if isinstance(x, Form):
        return x.nbytes
    return sum(map(_bytes, x)) if isinstance(x, tuple) else 0
