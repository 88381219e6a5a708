"""With the package's rules both forward arrangements agree with reverse-over-reverse, operation by operation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesscope.engines.forward_mode import ForwardMode, ForwardOverReverse, ReverseOverForward
from hesscope.engines.forward_rules import REVERSE_OVER_FORWARD, Replacing
from hesscope.losses.cross_entropy import summed_cross_entropy
from operations import EXACT, HEADS, LABELS, MASK, MATRIX, OPS, B, Op, W, numbers, reverse_over_reverse, scalar
from oracles import relative

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

BLIND = MASK.clone()
BLIND[2:4] = False
SMALLEST = torch.zeros(5, 5).double().masked_fill(~BLIND, -torch.inf)
IMAGES = (2, 3, 5)


def sdpa(x: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(x, x[:, :1].cos(), x[:, :1].sin(), enable_gqa=True, **options)


MORE: dict[str, tuple[Op, tuple[int, ...]]] = {
    "layer_norm over two axes": (lambda x: F.layer_norm(x, (3, 6), numbers(3, 6, seed=1)), MATRIX),
    "torch.layer_norm": (lambda x: torch.layer_norm(x, (6,), W, B, 1e-3), MATRIX),
    "nn.LayerNorm": (lambda x: torch.nn.LayerNorm(6, elementwise_affine=False)(x), MATRIX),
    "batch_norm, training, with positions": (
        lambda x: F.batch_norm(x, None, None, W[:3], B[:3], training=True),
        IMAGES,
    ),
    "instance_norm": (lambda x: F.instance_norm(x, weight=W[:3], bias=B[:3]), IMAGES),
    "mse_loss, mean": (lambda x: F.mse_loss(x, x.sin()), MATRIX),
    "mse_loss, none": (lambda x: F.mse_loss(x, x.sin(), reduction="none"), MATRIX),
    "mse_loss, sum": (lambda x: F.mse_loss(x, numbers(*MATRIX, seed=8), reduction="sum"), MATRIX),
    "summed_cross_entropy": (lambda x: summed_cross_entropy(x, LABELS), MATRIX),
    "sdpa, grouped queries, scaled": (lambda x: sdpa(x, scale=0.3, is_causal=True), HEADS),
    "sdpa, blind rows": (lambda x: sdpa(x, attn_mask=BLIND), HEADS),
    "sdpa, blind rows, additive": (lambda x: sdpa(x, attn_mask=SMALLEST), HEADS),
}
CASES = list(itertools.product({**OPS, **MORE}, (ForwardOverReverse, ReverseOverForward)))


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_one_vector_and_several_at_once(name: str, engine: type[ForwardMode]) -> None:
    op, shape = {**OPS, **MORE}[name]
    s, x, V = scalar(op), numbers(*shape), torch.stack([numbers(*shape, seed=seed) for seed in (9, 10)])
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.stack([reverse_over_reverse(s, x, v) for v in V])

        def product(v: Tensor) -> Tensor:
            return engine.product(lambda at: s(at["x"]), {"x": x}, {"x": v})["x"]

        with Replacing(engine.replacements):
            assert relative(product(V[0]), expected[0]) < EXACT
            assert relative(vmap(product, randomness="same")(V), expected) < EXACT
    assert expected.norm() > 1e-3


def test_blind_rows_are_a_trap_without_the_rule() -> None:
    """Torch 2.13's forward derivative of attention, differentiated again, is NaN where a position sees nothing."""
    op, shape = MORE["sdpa, blind rows"]
    s, x, v = scalar(op), numbers(*shape), numbers(*shape, seed=9)
    with sdpa_kernel(SDPBackend.MATH):
        found = ReverseOverForward.product(lambda at: s(at["x"]), {"x": x}, {"x": v})["x"]
    if torch.isfinite(found).all():
        pytest.skip("this torch has mended it")
    assert found.isnan().any()


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, (6,), W.to(x.dtype), B.to(x.dtype)),
    "instance_norm": lambda x: F.instance_norm(x[None], use_input_stats=True),
    "batch_norm with running statistics": lambda x: F.batch_norm(x, B.to(x.dtype), W.to(x.dtype).square()),
    "attention": lambda x: sdpa(x.reshape(1, 2, 5, -1), attn_mask=BLIND),
    "mse_loss": lambda x: F.mse_loss(x, x.cos()),
}
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", VALUES)
def test_the_rules_compute_the_same_function(name: str, dtype: torch.dtype) -> None:
    x = numbers(10, 6).to(dtype)
    with Replacing(REVERSE_OVER_FORWARD):
        found = VALUES[name](x)
    expected = VALUES[name](x)
    assert found.dtype == expected.dtype
    assert relative(found, expected) < ROUNDING[dtype]


def test_dropout_in_attention_draws_the_same_mask() -> None:
    x, found = numbers(*HEADS), []
    for rules in ({}, REVERSE_OVER_FORWARD):
        torch.manual_seed(0)
        with Replacing(rules), sdpa_kernel(SDPBackend.MATH):
            found.append(F.scaled_dot_product_attention(x, x.sin(), x.cos(), dropout_p=0.5))
    assert relative(found[1], found[0]) < EXACT
