"""The projected cross-entropy is the same function as that of the logits, to second order, contracted or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hesscope.losses import projected as module
from hesscope.losses.projected import Head, contraction_pays
from oracles import relative

T, V, d = 5, 11, 3


def example(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    W = scale * torch.randn(V, d, generator=g, dtype=torch.float64)
    return W, torch.randn(T, d, generator=g, dtype=torch.float64), torch.randint(V, (T,), generator=g)


def plain(W: Tensor, h: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(h @ W.T, y, reduction="sum")


@pytest.mark.parametrize("products", [0, 100])
@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0])
def test_value_gradient_and_hessian(products: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 2 * V * 8)
    W, h, y = example(scale)
    head = Head(W, h @ W.T, y, products)
    assert head.contracted == (products > 0)
    x = h.clone().requires_grad_()
    total = head(x)
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    torch.testing.assert_close(total, plain(W, h, y), rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(plain(W, z := h.clone().requires_grad_(), y), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    u = torch.randn(T, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(gradient, x, u)
    H = torch.autograd.functional.hessian(lambda x: plain(W, x, y), h).reshape(T * d, T * d)
    torch.testing.assert_close(found.flatten(), H @ u.flatten(), rtol=1e-9, atol=1e-12 * max(scale, 1) ** 2)


def test_a_peaked_row_keeps_its_relative_accuracy_in_float32() -> None:
    W, h, y = example(4.0)
    u = torch.ones(T, d, dtype=torch.float64)
    exact = Head(W, h @ W.T, y).product(u)
    W, h, u = W.float(), h.float(), u.float()
    for products in (0, 100):
        assert relative(Head(W, h @ W.T, y, products).product(u), exact) < 1e-4


@pytest.mark.parametrize("products", [0, 100])
def test_copies_share_the_expansion(products: int) -> None:
    W, h, y = example()
    head = Head(W, h @ W.T, y, products)
    x = h.repeat(2, 1).requires_grad_()
    total = head(x)
    torch.testing.assert_close(total, 2 * plain(W, h, y))
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    u = torch.randn(2 * T, d, dtype=torch.float64)
    (found,) = torch.autograd.grad(gradient, x, u)
    for part, v in zip(found.view(2, T, d), u.view(2, T, d), strict=True):
        torch.testing.assert_close(part, head.product(v))


def test_contraction_pays_from_as_many_products_as_the_width() -> None:
    assert not contraction_pays(100, 50272, 768, 768, 4)
    assert contraction_pays(100, 50272, 768, 769, 4)
    assert not contraction_pays(10**6, 50272, 768, 10**6, 4)  # the matrices would be too large
