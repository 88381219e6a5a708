"""Activation functions with a second derivative of their own against torch's, and what they keep."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hesscope as hs
from hesscope.engines.forward_rules import Replacing
from hesscope.engines.gated_silu import silu
from hesscope.engines.gelu import gelu
from hesscope.engines.second_derivatives import WRITTEN_OUT
from operations import numbers

PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (silu, F.silu),
    "gelu": (gelu, F.gelu),
    "gelu, tanh": (partial(gelu, approximate="tanh"), partial(F.gelu, approximate="tanh")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_first_and_second_derivatives(name: str) -> None:
    ours, _ = PAIRS[name]
    x = (3 * numbers(7, 5)).requires_grad_()
    assert torch.autograd.gradcheck(ours, (x,))
    assert torch.autograd.gradgradcheck(ours, (x,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_as_torch_has_them(name: str, dtype: torch.dtype) -> None:
    """At zero, in both tails, and in between; u comes in any layout."""
    x = torch.cat([torch.linspace(-40, 40, 41), torch.linspace(-4, 4, 39), torch.zeros(1)]).to(dtype).reshape(9, 9)
    g, u = numbers(9, 9, seed=1).to(dtype), numbers(9, 9, seed=2).to(dtype).T
    found = []
    for f in PAIRS[name]:
        leaf, along = x.clone().requires_grad_(), g.clone().requires_grad_()
        y = f(leaf)
        (dx,) = torch.autograd.grad(y, leaf, along, create_graph=True)
        found.append((y, dx, *torch.autograd.grad(dx, (along, leaf), u)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == dtype
        # In float64 torch's composition cancels, too; in half precision it rounds every step.
        atol = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.2}[dtype]
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=atol)


def test_modules_are_reached_and_a_graph_keeps_two_tensors_of_an_activation() -> None:
    x, g = numbers(4, 6).requires_grad_(), numbers(4, 6, seed=1).requires_grad_()
    for module in (nn.SiLU(), nn.GELU(), nn.GELU("tanh")):
        kept: list[Tensor] = []

        def pack(t: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(t)
            return t.detach()

        with Replacing(WRITTEN_OUT), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            torch.autograd.grad(module(x * 1.0), x, g, create_graph=True)
        assert len({t.data_ptr() for t in kept}) == 2


def test_a_hessian_has_them_twice() -> None:
    """Closed form: the loss sum f(w x) has the second derivative x^2 f''(w x)."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.w * x)

    class Sum:
        def total(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
            return model(batch).sum(), len(batch)

    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    H = hs.hessian(hs.Problem(One(), Sum(), [x]), engine="reverse-over-reverse")
    z = 0.7 * x
    s = torch.sigmoid(z)
    expected = (x**2 * s * (1 - s) * (2 + z * (1 - 2 * s))).mean()
    torch.testing.assert_close(H @ torch.ones(1, dtype=torch.float64), expected[None], rtol=1e-14, atol=0)
