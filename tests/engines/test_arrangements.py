"""The arrangements of two derivatives agree op by op; where torch is silently wrong, these tests tell when it is mended.

For s(x) a scalar made of one op, H v is found four ways: reverse over reverse, forward over reverse, reverse over
forward, and as a central difference of gradients, which knows nothing of second derivatives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from operations import (
    EXACT,
    HEADS,
    OPS,
    Scalar,
    batch_norm_written_out,
    layer_norm_written_out,
    numbers,
    reverse_over_reverse,
    scalar,
)
from oracles import relative

# torch's own forward mode compiles its decompositions so, when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

DIFFERENCE = 1e-7
STEP = 1e-5

Arrangement = Callable[[Scalar, Tensor, Tensor], Tensor]


def forward_over_reverse(s: Scalar, x: Tensor, v: Tensor) -> Tensor:
    return jvp(grad(s), (x,), (v,))[1]


def reverse_over_forward(s: Scalar, x: Tensor, v: Tensor) -> Tensor:
    return grad(lambda y: jvp(s, (y,), (v,))[1])(x)


def central_difference(s: Scalar, x: Tensor, v: Tensor) -> Tensor:
    def gradient(y: Tensor) -> Tensor:
        y = y.detach().requires_grad_()
        return torch.autograd.grad(s(y), y)[0]

    return (gradient(x + STEP * v) - gradient(x - STEP * v)) / (2 * STEP)


ARRANGEMENTS: tuple[Arrangement, ...] = (reverse_over_reverse, forward_over_reverse, reverse_over_forward)

#: torch 2.13: the forward derivative takes the batch's mean and deviation for constants when it is differentiated again.
WRONG = {
    ("layer_norm", reverse_over_forward),
    ("layer_norm without weights", reverse_over_forward),
    ("batch_norm, training", reverse_over_forward),
}

#: torch 2.13: its backward pass fills a tangent in place that is a symbolic zero.
REFUSED = {("mse_loss", forward_over_reverse)}

silently_wrong = pytest.mark.xfail(strict=True, raises=AssertionError, reason="torch 2.13 is silently wrong here")
refused = pytest.mark.xfail(strict=True, raises=RuntimeError, reason="torch 2.13 refuses here")


def marks(case: tuple[str, Arrangement]) -> list[pytest.MarkDecorator]:
    return [silently_wrong] * (case in WRONG) + [refused] * (case in REFUSED)


CASES = [pytest.param(*case, marks=marks(case)) for case in itertools.product(OPS, ARRANGEMENTS)]


@pytest.mark.parametrize(("name", "arrangement"), CASES)
def test_arrangements_agree(name: str, arrangement: Arrangement) -> None:
    op, shape = OPS[name]
    s, x, v = scalar(op), numbers(*shape), numbers(*shape, seed=9)
    with sdpa_kernel(SDPBackend.MATH):
        product = arrangement(s, x, v)
        assert relative(product, central_difference(s, x, v)) < DIFFERENCE
        assert relative(product, reverse_over_reverse(s, x, v)) < EXACT
    assert product.norm() > 1e-3


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm, training"])
def test_how_wrong_the_known_traps_are(name: str) -> None:
    """Several per cent: far too much for rounding, far too little to be noticed."""
    op, shape = OPS[name]
    s, x, v = scalar(op), numbers(*shape), numbers(*shape, seed=9)
    wrong, right = reverse_over_forward(s, x, v), reverse_over_reverse(s, x, v)
    if relative(wrong, right) < EXACT:
        pytest.skip("this torch has mended it")
    assert relative(wrong, right) > 1e-2
    mended = scalar(layer_norm_written_out if name == "layer_norm" else batch_norm_written_out)
    assert relative(reverse_over_forward(mended, x, v), right) < EXACT


def test_fused_attention_has_no_second_derivative() -> None:
    """Why attention is exchanged: the kernel that a CPU picks by itself refuses, it does not answer wrongly."""
    x, v = numbers(*HEADS), numbers(*HEADS, seed=9)
    s = scalar(lambda q: F.scaled_dot_product_attention(q, 1.1 * q, q.sin(), is_causal=True))
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward"):
        reverse_over_reverse(s, x, v)
