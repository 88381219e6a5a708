"""Kernels against their references on one device: `gpu.py` runs this in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measuring import seconds
from torch import Tensor

from hesscope.losses.output_hessian import cross_entropy_hessian_product
from hesscope.models.attention.forms import PYTORCH, Form, triton_form
from hesscope.models.attention.scores import Inputs, Shape, Tangents
from hesscope.models.attention.visibility import causal

DTYPES = (torch.float32, torch.bfloat16)
#: Tokens and vocabulary; sequences, key heads, query heads on each, length and head size.
LOGITS, ATTENTION = (4096, 32000), ((1, 8, 4, 2048, 64), (1, 8, 4, 2048, 128))
SMALL_LOGITS, SMALL_ATTENTION = (8, 50), ((1, 1, 2, 20, 16),)


def measure(device: str, small: bool) -> list[dict[str, Any]]:
    """A row for every kernel, dtype and shape."""
    rows = []
    for dtype in DTYPES:
        rows.append(output_hessian(device, dtype, SMALL_LOGITS if small else LOGITS, small))
        for shape in SMALL_ATTENTION if small else ATTENTION:
            rows += attention(device, dtype, shape, small)
    return rows


def output_hessian(device: str, dtype: torch.dtype, shape: tuple[int, int], small: bool) -> dict[str, Any]:
    """The cross-entropy's Hessian in its logits, times one vector."""
    generator = torch.Generator(device).manual_seed(0)
    z, u = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    y = torch.zeros(shape[0], dtype=torch.int64, device=device)
    runs = [lambda kernel=kernel: [cross_entropy_hessian_product(z, y, u, kernel)] for kernel in ("eager", "triton")]
    return compared("output Hessian", dtype, shape, device, small, *runs)


def attention(device: str, dtype: torch.dtype, shape: tuple[int, ...], small: bool) -> list[dict[str, Any]]:
    """The four routines of causal attention in tiles."""
    B, H, G, T, D = shape
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    x = Inputs(numbers(B, H, G, T, D), numbers(B, H, T, D), numbers(B, H, T, D), None)
    dot = Tangents(numbers(B, H, G, T, D), numbers(B, H, T, D), numbers(B, H, T, D), None)
    w, how = numbers(B, H, G, T, D), Shape(causal(T, T, device), D**-0.5)
    o, L = PYTORCH.output(x, how)
    routines: dict[str, Callable[[Form], list[Any]]] = {
        "attention": lambda form: [form.output(x, how)[0]],
        "attention, reverse": lambda form: list(form.reverse(x, o, L, w, how)[:3]),
        "attention, forward": lambda form: [form.forward(x, o, L, dot, how)],
        "attention, second": lambda form: _tensors(form.second(x, o, L, w, dot, w, how)),
    }
    kernels = triton_form()
    return [
        compared(name, dtype, shape, device, small, lambda run=run: run(PYTORCH), lambda run=run: run(kernels))
        for name, run in routines.items()
    ]


def _tensors(found: Any) -> list[Tensor]:
    return [found.o, found.q, found.k, found.v]


def compared(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: str,
    small: bool,
    reference: Callable[[], list[Tensor]],
    kernel: Callable[[], list[Tensor]],
) -> dict[str, Any]:
    """The best time of each, and the largest relative difference of what they give."""
    repeats = 1 if small else 5
    gaps = [
        float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(kernel(), reference(), strict=True)
    ]
    return {
        "name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": "x".join(map(str, shape)),
        "reference": min(seconds(reference, repeats, device)),
        "kernel": min(seconds(kernel, repeats, device)),
        "gap": max(gaps),
    }
