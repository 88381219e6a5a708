"""Which form of the four routines runs: PyTorch's everywhere, Triton's on a GPU where it agrees and is clearly faster."""

from __future__ import annotations

import importlib.util
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscope.errors import HesscopeWarning
from hesscope.models.attention import first, second
from hesscope.models.attention.scores import Inputs, Shape, Tangents
from hesscope.models.attention.second import Second
from hesscope.models.attention.visibility import causal

#: Kernels take over where they need at most this share of the time.
CLEARLY_FASTER = 0.75
#: Lengths on which kernels are held to PyTorch's form, and timed.
_CHECKED, _TIMED = 70, 2048  # a whole tile and a part of one
#: A head wider than this needs more of a GPU's fast memory than there is.
_WIDEST = 256


@dataclass(frozen=True)
class Form:
    """The routines of one form; arguments as in `first` and `second`."""

    name: str
    output: Callable[[Inputs, Shape], tuple[Tensor, Tensor]]
    reverse: Callable[[Inputs, Tensor, Tensor, Tensor, Shape], tuple[Tensor, Tensor, Tensor, Tensor | None]]
    forward: Callable[[Inputs, Tensor, Tensor, Tangents, Shape], Tensor]
    second: Callable[[Inputs, Tensor, Tensor, Tensor, Tangents, Tensor | None, Shape], Second]


PYTORCH = Form("pytorch", first.output, first.reverse, first.forward, second.second)

_chosen: dict[tuple[object, ...], Form] = {}


def form_for(q: Tensor, v: Tensor, shape: Shape) -> Form:
    """The form for inputs like these; found out once for every device, dtype, head size and kind of score."""
    if q.dtype == torch.float64 or not _has_triton(q.device) or max(q.shape[-1], v.shape[-1]) > _WIDEST:
        return PYTORCH
    kind = (q.device, q.dtype, q.shape[-1], v.shape[-1], shape.cap is not None)
    if kind not in _chosen:
        _chosen[kind] = _choose(q, v, shape)
    return _chosen[kind]


def _has_triton(device: torch.device) -> bool:
    """Whether kernels can run there: on a GPU, or on a CPU by Triton's interpreter."""
    there = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return there and importlib.util.find_spec("triton") is not None


def triton_form() -> Form:
    """The kernels."""
    from hesscope.models.attention import triton_form as kernels

    return Form("triton", kernels.output, kernels.reverse, kernels.forward, kernels.second)


def _choose(q: Tensor, v: Tensor, shape: Shape) -> Form:
    try:
        kernels = triton_form()
        gap = _disagreement(kernels, q, v, shape)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        lines = str(error).strip().splitlines()
        return _warned(f"they do not run here ({type(error).__name__}: {lines[0][:160] if lines else ''})")
    # Half precision is rounded at the borders alone; float32 all along.
    if not gap <= (100 if q.dtype == torch.float32 else 4) * torch.finfo(q.dtype).eps:
        return _warned(f"they differ by {gap:.1e}")
    if q.device.type != "cuda":
        return kernels
    return kernels if _seconds(kernels, q, v, shape) <= CLEARLY_FASTER * _seconds(PYTORCH, q, v, shape) else PYTORCH


def _warned(reason: str) -> Form:
    warnings.warn(f"Tiled attention runs without its Triton kernels, for {reason}.", HesscopeWarning, stacklevel=2)
    return PYTORCH


def _disagreement(form: Form, q: Tensor, v: Tensor, shape: Shape) -> float:
    """The largest relative difference between a form's results and PyTorch's, on a small problem with the same heads."""
    case = _case(q, v, shape, heads=2, length=_CHECKED)
    gaps = [
        float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))
        for a, b in zip(_results(form, *case), _results(PYTORCH, *case), strict=True)
    ]
    return max(gaps)


def _seconds(form: Form, q: Tensor, v: Tensor, shape: Shape) -> float:
    case = _case(q, v, shape, heads=8, length=_TIMED)
    _results(form, *case)
    torch.cuda.synchronize(q.device)
    began = time.perf_counter()
    _results(form, *case)
    torch.cuda.synchronize(q.device)
    return time.perf_counter() - began


def _results(form: Form, x: Inputs, w: Tensor, dot: Tangents, shape: Shape) -> list[Tensor]:
    o, L = form.output(x, shape)
    twice = form.second(x, o, L, w, dot, w, shape)
    return [o, *form.reverse(x, o, L, w, shape)[:3], form.forward(x, o, L, dot, shape), twice.q, twice.k, twice.v]


def _case(q: Tensor, v: Tensor, shape: Shape, heads: int, length: int) -> tuple[Inputs, Tensor, Tangents, Shape]:
    """Random inputs and tangents of a causal layer of one key head for two query heads."""
    generator = torch.Generator(q.device).manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=q.device).to(q.dtype)

    D, E = q.shape[-1], v.shape[-1]
    sizes = ((1, heads // 2, 2, length, D), (1, heads // 2, length, D), (1, heads // 2, length, E))
    (x, y, z), (dx, dy, dz) = ([numbers(*n) for n in sizes] for _ in range(2))
    return (
        Inputs(x, y, z, None),
        numbers(*sizes[0][:4], E),
        Tangents(dx, dy, dz, None),
        Shape(causal(length, length, q.device), D**-0.5, shape.cap),
    )
