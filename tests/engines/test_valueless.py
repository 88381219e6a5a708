"""Linear layers whose weights' first derivatives have a graph but no values give the same products, for less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hesscope.engines.forward_rules import Replacing
from hesscope.engines.valueless import VALUELESS

Case = Callable[[Tensor, Tensor, Tensor], Tensor]

CASES: dict[str, Case] = {
    "with a bias": lambda x, W, b: F.linear(x.tanh(), W, b),
    "without": lambda x, W, b: F.linear(x.tanh(), W) * b,
    "one position": lambda x, W, b: F.linear(x[0, 0], W, b),
    "spread out": lambda x, W, b: F.linear(x[:, :1].expand(2, 3, 4), W, b),
    "the weight's input is constant": lambda x, W, b: F.linear(x.detach(), W, b) * x.sum(),
    "twice": lambda x, W, b: F.linear(F.linear(x, W, b).tanh(), W, b),
    "used otherwise too": lambda x, W, b: F.linear(x, W, b) @ W.sin(),
    "transposed": lambda x, W, b: torch.addmm(b, x.reshape(-1, 4).tanh(), W),
    "transposed, with a factor": lambda x, W, b: torch.addmm(b, x.reshape(-1, 4), W, beta=2.0, alpha=0.5),
    "made of something": lambda x, W, b: F.linear(x, W * W.sin(), b),
    "a part of something": lambda x, W, b: F.linear(x[..., :2], (W * W)[:, :2], b),
    "constant": lambda x, W, b: F.linear(x.sin(), W.detach(), b),
}


def example() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4), (4, 4), (4,))
    x, W, b = (torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes)
    return x, W, b


def product(f: Case, replacing: bool, chosen: tuple[int, ...]) -> list[Tensor]:
    """The Hessian's product over some of x, W, b, by reverse over reverse: twice on one graph."""
    inputs = example()
    for i in set(range(3)) - set(chosen):
        inputs[i].requires_grad_(False)
    leaves = [inputs[i] for i in chosen]
    with Replacing(VALUELESS if replacing else {}):
        y = f(*inputs)
        if not y.requires_grad:
            return []
        first = torch.autograd.grad((y.square().sum() * 1e-3).exp(), leaves, create_graph=True, allow_unused=True)
    found: list[Tensor] = []
    for seed in (1, 2):
        g = torch.Generator().manual_seed(seed)
        v = [torch.randn(leaf.shape, generator=g, dtype=torch.float64) for leaf in leaves]
        live = [(d, vi) for d, vi in zip(first, v, strict=True) if d is not None and d.requires_grad]
        found += torch.autograd.grad(
            [d for d, _ in live], leaves, [vi for _, vi in live], retain_graph=True, materialize_grads=True
        )
    return found


@pytest.mark.parametrize("chosen", [(0, 1, 2), (1,), (0,), (2,), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_products_are_the_same(name: str, chosen: tuple[int, ...]) -> None:
    ours, theirs = (product(CASES[name], replacing, chosen) for replacing in (True, False))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class Counting(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["with a bias", "transposed"])
def test_the_gradient_of_the_weight_is_not_made(name: str) -> None:
    counts = []
    for replacing in (True, False):
        x, W, b = example()
        with Replacing(VALUELESS if replacing else {}):
            y = CASES[name](x, W, b).square().sum()
        with Counting() as counting:
            _, g, _ = torch.autograd.grad(y, (x, W, b), create_graph=True)
        counts.append(counting.count)
        assert g.requires_grad
        assert g.shape == W.shape
        assert (g.untyped_storage().nbytes() == 8) is replacing
    assert counts == [1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_casts_are_left_to_torch(dtype: torch.dtype) -> None:
    x, W, b = (t.detach().to(dtype).requires_grad_() for t in example())
    with Replacing(VALUELESS), torch.autocast("cpu", torch.bfloat16):
        y = F.linear(x, W, b)
    assert y.dtype == torch.bfloat16
    assert y.grad_fn is not None
    assert "Linear" not in y.grad_fn.name()
