"""In which format matrices are multiplied while a product is made, and never longer.

| precision | multiplications | sums over batches |
|---|---|---|
| None      | as the weights are and torch is set                                     | in the vectors' dtype |
| float32   | IEEE float32, whatever torch is set to                                  | float64 |
| tf32      | NVIDIA's 19-bit format: 10 bits of mantissa, sums in float32            | in the vectors' dtype |
| bfloat16  | of what is linear in the vectors: bfloat16 (7 bits); the rest as None   | in the vectors' dtype |

A product H v is linear in v. Under bfloat16 loss, activations and gradient are those of the model as it is, and only the maps
that v goes through are rounded: the point at which the curvature is taken stays where it was.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hesscope.errors import HesscopeError

PRECISIONS = ("float32", "tf32", "bfloat16")
#: The unit roundings of what is less precise than the weights.
_ROUNDING = {"tf32": 2.0**-11, "bfloat16": 2.0**-8}

_DEFAULT: ContextVar[str | None] = ContextVar("precision", default=None)
_NARROW: ContextVar[bool] = ContextVar("narrow", default=False)


@contextmanager
def precision(name: str | None) -> Iterator[None]:
    """Inside, operators are made with this `precision`, where they are not given another.

    Args:
        name: "float32", "tf32", "bfloat16", or None: as the weights are and torch is set.

    Raises:
        HesscopeError: another name.

    Example:
        >>> import torch, hesscope as hs
        >>> problem = hs.supervised(torch.nn.Linear(2, 1), [(torch.ones(3, 2), torch.zeros(3, 1))], loss="mse")
        >>> with hs.precision("bfloat16"):
        ...     H = hs.hessian(problem)
        >>> H.describe()["precision"]
        'bfloat16'
    """
    token = _DEFAULT.set(_known(name))
    try:
        yield
    finally:
        _DEFAULT.reset(token)


def resolve_precision(name: str | None, weights: set[torch.dtype], device: torch.device) -> str | None:
    """The precision that was asked for, by argument or by context, known to mean something for such weights, there."""
    name = _known(name) or _DEFAULT.get()
    if name is None:
        return None
    if torch.float32 not in weights:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in weights))
        raise HesscopeError(
            f"Expected weights in float32 for precision={name!r}, got {found}; load the model with dtype='float32', or leave "
            "precision out."
        )
    if name == "tf32" and device.type not in ("cuda", "meta"):
        raise HesscopeError(
            f"Expected a CUDA device for precision='tf32', a format of its matrix units, got {device.type}, where it would "
            "change nothing; leave it out, or use 'bfloat16'."
        )
    return name


def _known(name: str | None) -> str | None:
    if name is not None and name not in PRECISIONS:
        raise HesscopeError(f"Expected precision to be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, got {name!r}.")
    return name


def in_words(name: str | None, device: torch.device) -> str | None:
    """The precision for the record of a result: what torch is set to where nothing was asked for and it is not float32."""
    if name is None and device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32, as torch is set"
    return name


def tolerance(name: str | None) -> float:
    """The largest relative discrepancy of a product that may pass for rounding, for the precision alone."""
    return min(1000 * _ROUNDING.get(name or "", 0.0), 0.2)


@contextmanager
def multiplying(name: str | None) -> Iterator[None]:
    """The state in which products of this precision are made."""
    if name == "bfloat16":
        token = _NARROW.set(True)
        try:
            yield
        finally:
            _NARROW.reset(token)
    elif name is not None:
        with _float32_multiplications(tf32=name == "tf32"):
            yield
    else:
        yield


def linear_passes() -> AbstractContextManager[Any]:
    """To be entered around passes that are linear in the vectors: their matrices are multiplied in bfloat16 if that is asked."""
    return _Narrow() if _NARROW.get() else nullcontext()  # type: ignore[no-untyped-call]


@contextmanager
def unrounded() -> Iterator[None]:
    """To be entered in such a pass where something that does not depend on the vectors is computed anew, such as logits."""
    _exact.depth += 1
    try:
        yield
    finally:
        _exact.depth -= 1


class _Exact(threading.local):
    """How many `unrounded` are open; backward passes on a GPU run in a thread of their own."""

    depth = 0


_exact = _Exact()


class _Narrow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products of float32 matrices from factors rounded to bfloat16; their results are float32 tensors."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _exact.depth:
            return func(*args, **kwargs)
        if func in _PLAIN and _all_float32(args[:2]):
            return _rounded(_PLAIN[func], *args[:2])
        if func in _INTO and _all_float32((*args[:2], kwargs["out"])):
            return kwargs["out"].copy_(_rounded(_INTO[func], *args[:2]))
        if func in _ADDED and _all_float32(args[:3]):
            product = _rounded(_ADDED[func][0], *args[1:3]).mul_(kwargs.get("alpha", 1))
            beta = kwargs.get("beta", 1)
            if _ADDED[func][1]:
                return args[0].mul_(beta).add_(product)
            return product.add_(args[0] if beta == 1 else args[0] * beta)
        return func(*args, **kwargs)


_aten = torch.ops.aten
_PLAIN = {_aten.mm.default: torch.mm, _aten.bmm.default: torch.bmm}
#: Those that write to a tensor that is given as `out`.
_INTO = {_aten.mm.out: torch.mm, _aten.bmm.out: torch.bmm}
#: {operation: the product in it, and whether it adds to its first argument in place}
_ADDED = {
    _aten.addmm.default: (torch.mm, False),
    _aten.addmm_.default: (torch.mm, True),
    _aten.baddbmm.default: (torch.bmm, False),
    _aten.baddbmm_.default: (torch.bmm, True),
}


def _all_float32(tensors: tuple[Any, ...]) -> bool:
    return all(isinstance(x, Tensor) and x.dtype == torch.float32 for x in tensors)


def _rounded(product: Any, x: Tensor, y: Tensor) -> Tensor:
    result: Tensor = product(x.bfloat16(), y.bfloat16()).float()
    return result


@contextmanager
def _float32_multiplications(tf32: bool) -> Iterator[None]:
    """Torch's settings for products of float32 matrices, and convolutions, on GPU and CPU; as they were afterwards.

    Torch has two interfaces to the first and refuses to be asked through one what was set by the other alone, so both are set.
    """
    backends: Any = torch.backends
    places: list[Any] = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul]
    before, older = [place.fp32_precision for place in places], _older()
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        for place in places:
            place.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def _older() -> str | None:
    """What the older interface says; None where it refuses to."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
