"""What reverse-over-reverse runs in place of torch's own operations is the same to second order, and keeps less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hesscope.engines.forward_rules import Replacing
from hesscope.engines.reverse_over_reverse import SavedBytes
from hesscope.engines.second_derivatives import WRITTEN_OUT

CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda x, g: F.silu(x) + g,
    "gated": lambda x, g: F.silu(x) * g,
    "gated from the left": lambda x, g: g * F.silu(x),
    "gated by itself": lambda x, g: F.silu(x) * x + g,
    "gated by another": lambda x, g: F.silu(x) * F.silu(g),
    "gated, and used again": lambda x, g: (y := F.silu(x)) * g + y.square(),
    "by a row": lambda x, g: F.silu(x) * g[:1],
    "by a number": lambda x, g: F.silu(x) * 2.0 + g,
    "mean": lambda x, g: (x * g).mean(-1, keepdim=True) * x,
    "mean over two axes": lambda x, g: (x * g * g).mean(dim=(0, 1)) * x,
    "mean of all": lambda x, g: torch.mean(x * g * g) * x,
    "square": lambda x, g: x.pow(2) * g,
    "cube": lambda x, g: x.pow(3) * g,
    "root mean square": lambda x, g: g * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "root mean square, x on the right": lambda x, g: torch.rsqrt(x.pow(2).mean((-1,), True) + 0.1) * x * g,
    "of another": lambda x, g: g * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1),
    "of the first axis": lambda x, g: g * x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 0.1),
    "without what keeps it from zero": lambda x, g: g * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    "its root used again": lambda x, g: x * (r := torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1)) + g * r,
    "changed in between": lambda x, g: F.silu(x).add_(g) * g,
}


def example() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, z = (torch.randn(3, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    return x, z


@pytest.mark.parametrize("name", CASES)
def test_two_derivatives(name: str) -> None:
    def f(x: Tensor, g: Tensor) -> Tensor:
        with Replacing(WRITTEN_OUT):
            return CASES[name](x, g)

    x, g = example()
    torch.testing.assert_close(f(x, g), CASES[name](x, g), rtol=1e-14, atol=1e-15)
    assert torch.autograd.gradcheck(f, (x, g))
    assert torch.autograd.gradgradcheck(f, (x, g))


@pytest.mark.parametrize(("name", "ratio"), [("silu", 0.4), ("gated", 0.5), ("root mean square", 0.65)])
def test_less_is_kept(name: str, ratio: float) -> None:
    kept = []
    for replacements in ({}, WRITTEN_OUT):
        x, g = example()
        meter = SavedBytes([x, g])
        hooks = torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack)
        with Replacing(replacements), hooks:
            torch.autograd.grad(CASES[name](x, g).square().sum(), (x, g), create_graph=True)
        kept.append(meter.bytes)
    assert kept[1] <= ratio * kept[0]


def test_integers_and_dtypes_are_left_to_torch() -> None:
    with Replacing(WRITTEN_OUT):
        assert torch.arange(4).pow(2).tolist() == [0, 1, 4, 9]
        assert torch.arange(4).mean(0, dtype=torch.float64) == 1.5
        assert torch.ones(2, 0).mean(1).isnan().all()
        assert torch.full((2,), 2.0).pow(torch.tensor([2.0, 3.0])).tolist() == [4.0, 8.0]
