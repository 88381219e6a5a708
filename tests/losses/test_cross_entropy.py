"""The written-out cross-entropy against autograd's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hesscope.losses.cross_entropy import summed_cross_entropy

TARGETS = {
    "ordinary": [0, 3, 6, 2],
    "some ignored": [-100, 3, -100, 2],
    "one valid": [-100, -100, 5, -100],
    "all ignored": [-100, -100, -100, -100],
}


def logits(scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(4, 7, dtype=torch.float64, generator=generator)).requires_grad_()


@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
@pytest.mark.parametrize("name", TARGETS)
def test_value_gradient_and_second_derivative(name: str, scale: float) -> None:
    z, y = logits(scale), torch.tensor(TARGETS[name])
    u = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for total in (summed_cross_entropy(z, y), F.cross_entropy(z, y, ignore_index=-100, reduction="sum")):
        (gradient,) = torch.autograd.grad(total, z, create_graph=True)
        (product,) = torch.autograd.grad(gradient, z, u)
        found.append((total.detach(), gradient.detach(), product))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", TARGETS)
def test_gradients_numerically(name: str) -> None:
    z, y = logits(1.0), torch.tensor(TARGETS[name])

    def curved(z: Tensor) -> Tensor:
        # A nonlinear function of the sum, so that the cotangent itself is differentiated too.
        return summed_cross_entropy(torch.tanh(z), y).square()

    assert torch.autograd.gradcheck(curved, z)
    assert torch.autograd.gradgradcheck(curved, z)
