"""Triton kernels on a device against their references."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as masks

from hesscope.losses.output_hessian import cross_entropy_hessian_product
from hesscope.models.attention.forms import PYTORCH, Form, triton_form
from hesscope.models.attention.scores import Inputs, Shape, Tangents
from hesscope.models.attention.visibility import Visible, causal, of_transformers
from oracles import relative

launching = pytest.importorskip(
    "hesscope.models.attention.triton_form", reason="triton is not installed", exc_type=ImportError
)
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]
ROUNDING = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2}


def numbers(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (7, 37), (5, 5000)])
def test_output_hessian(dtype: torch.dtype, rows: int, classes: int, device: torch.device) -> None:
    z, u = (
        (4.0 * numbers(rows, classes, device=device)).to(dtype),
        numbers(2, rows, classes, device=device, seed=1).to(dtype),
    )
    y = torch.zeros(rows, dtype=torch.int64, device=device)
    y[::3] = -100
    p = torch.softmax(z.double(), -1)
    exact = p * (u.double() - (p * u.double()).sum(-1, keepdim=True))
    exact[:, ::3] = 0.0
    found = cross_entropy_hessian_product(z, y, u, kernel="triton")
    assert found.dtype == dtype
    assert float((found.double() - exact).norm()) <= ROUNDING[dtype] * float((p * u.double()).norm())


def visible(kind: str, length: int, device: torch.device) -> Visible:
    if kind == "causal":
        return causal(length, length, device)
    kept = torch.ones(2, length, dtype=torch.bool, device=device)
    kept[0, :3], kept[1, length - 4 :] = False, False
    window = masks.sliding_window_causal_mask_function(6) if kind == "window" else None
    more = {} if window is None else {"mask_function": window}
    return of_transformers(2, length, length, attention_mask=kept, device=device, **more)


def everything(form: Form, x: Inputs, w: Tensor, dot: Tangents, shape: Shape) -> list[Tensor]:
    o, L = form.output(x, shape)
    twice = form.second(x, o, L, w, dot, w, shape)
    found = [o, *form.reverse(x, o, L, w, shape)[:3], form.forward(x, o, L, dot, shape)]
    return found + [getattr(twice, f.name) for f in fields(twice) if getattr(twice, f.name) is not None]


@pytest.mark.parametrize(
    ("kind", "width", "length", "cap", "dtype"),
    [
        ("causal", 16, 70, None, torch.float32),
        ("padded", 16, 70, 3.0, torch.float32),
        ("window", 20, 33, None, torch.float32),
        ("causal", 128, 70, None, torch.float32),
        ("padded", 64, 70, None, torch.bfloat16),
        ("causal", 128, 70, 3.0, torch.bfloat16),
    ],
)
def test_attention(
    kind: str,
    width: int,
    length: int,
    cap: float | None,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device.type != "cuda":  # the interpreter takes seconds for a tile
        monkeypatch.setattr(launching, "_SIDES", (16, 16))
        width, length = min(width, 20), 19
    B, G = (1, 2) if kind == "causal" else (2, 1)
    q, dq, w = (numbers(B, 2, G, length, width, device=device, seed=s).to(dtype) for s in (1, 2, 3))
    k, v, dk, dv = (numbers(B, 2, length, width, device=device, seed=s).to(dtype) for s in (4, 5, 6, 7))
    shape = Shape(visible(kind, length, device), width**-0.5, cap)
    wide = [x.double() for x in (q, k, v, w, dq, dk, dv)]
    expected = everything(PYTORCH, Inputs(*wide[:3], None), wide[3], Tangents(*wide[4:], None), shape)
    found = everything(triton_form(), Inputs(q, k, v, None), w, Tangents(dq, dk, dv, None), shape)
    assert max(map(relative, found, expected)) < (1e-4 if dtype == torch.float32 else 3e-2)
