"""Single operations, as scalars to be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

EXACT = 1e-12

Op = Callable[[Tensor], Tensor]
Scalar = Callable[[Tensor], Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W, B, MEAN = numbers(6, seed=1), numbers(6, seed=2), numbers(6, seed=3)
VARIANCE = MEAN.square() + 0.5
LABELS = torch.tensor([0, 3, -100])
TOKENS = torch.tensor([[0, 2, 2], [1, 0, 2]])
MASK = torch.ones(5, 5, dtype=torch.bool).tril()
EXPERTS = numbers(6, 4, seed=4)


def layer_norm_written_out(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * W + B


def batch_norm_written_out(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred * torch.rsqrt(centred.square().mean(0) + 1e-5) * W + B


def rms_norm_written_out(x: Tensor) -> Tensor:
    return W * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def attention(x: Tensor, **options: object) -> Tensor:
    """Queries, keys and values from one tensor [B, heads, T, width]."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(x, 1.1 * x, x.sin(), **options)  # type: ignore[arg-type]


def attention_written_out(x: Tensor) -> Tensor:
    scores = x @ (1.1 * x).transpose(-1, -2) / x.shape[-1] ** 0.5
    return scores.masked_fill(~MASK, -torch.inf).softmax(-1) @ x.sin()


def rotated(x: Tensor) -> Tensor:
    """Rotary embeddings by complex numbers, as Llama 4 has them."""
    angles = torch.polar(torch.ones(3, 3, dtype=torch.float64), numbers(3, 3, seed=7))
    return torch.view_as_real(torch.view_as_complex(x.reshape(3, 3, 2)) * angles).flatten(1)


def gathered_and_added(x: Tensor) -> Tensor:
    """Tokens sent to experts and added back at their places."""
    rows = torch.tensor([2, 0, 2])
    return torch.zeros_like(x).index_add(0, rows, x[rows].sin() * x)


def routed(x: Tensor) -> Tensor:
    """Top-2 of four experts' scores, normalised over the chosen, as routers do."""
    weights, chosen = (x @ EXPERTS).softmax(-1).topk(2, -1)
    return (weights / weights.sum(-1, keepdim=True))[..., None] * EXPERTS.T[chosen]


MATRIX, HEADS = (3, 6), (1, 2, 5, 6)

OPS: dict[str, tuple[Op, tuple[int, ...]]] = {
    "layer_norm": (lambda x: F.layer_norm(x, (6,), W, B), MATRIX),
    "layer_norm without weights": (lambda x: F.layer_norm(x, (6,)), MATRIX),
    "layer_norm written out": (layer_norm_written_out, MATRIX),
    "rms_norm": (lambda x: F.rms_norm(x, (6,), W, 1e-6), MATRIX),
    "rms_norm written out": (rms_norm_written_out, MATRIX),
    "group_norm": (lambda x: F.group_norm(x, 2, W, B), MATRIX),
    "batch_norm, evaluation": (lambda x: F.batch_norm(x, MEAN, VARIANCE, W, B, training=False), MATRIX),
    "batch_norm, training": (lambda x: F.batch_norm(x, None, None, W, B, training=True), MATRIX),
    "batch_norm, training, written out": (batch_norm_written_out, MATRIX),
    "gelu": (F.gelu, MATRIX),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), MATRIX),
    "silu": (F.silu, MATRIX),
    "gated silu": (lambda x: F.silu(x @ EXPERTS) * (x.sin() @ EXPERTS), MATRIX),
    "relu": (F.relu, MATRIX),
    "squared relu": (lambda x: F.relu(x).square(), MATRIX),
    "softplus": (F.softplus, MATRIX),
    "sigmoid": (torch.sigmoid, MATRIX),
    "mish": (F.mish, MATRIX),
    "elu": (F.elu, MATRIX),
    "softmax": (lambda x: x.softmax(-1), MATRIX),
    "log_softmax": (lambda x: x.log_softmax(-1), MATRIX),
    "logsumexp": (lambda x: x.logsumexp(-1), MATRIX),
    "logsigmoid": (F.logsigmoid, MATRIX),
    "soft cap": (lambda x: 3.0 * torch.tanh(x / 3.0), MATRIX),
    "cross_entropy": (lambda x: F.cross_entropy(x, LABELS, ignore_index=-100, reduction="none"), MATRIX),
    "cross_entropy, sum": (lambda x: F.cross_entropy(x, LABELS, ignore_index=-100, reduction="sum"), MATRIX),
    "mse_loss": (lambda x: F.mse_loss(x.sin(), numbers(3, 6, seed=5)), MATRIX),
    "embedding": (lambda x: F.embedding(TOKENS, x), MATRIX),
    "linear": (lambda x: F.linear(x, x.sin(), numbers(3, seed=6)), MATRIX),
    "conv1d": (lambda x: F.conv1d(x[None], EXPERTS.reshape(4, 3, 2)), MATRIX),
    "std": (lambda x: x.std(-1), MATRIX),
    "norm": (lambda x: x.norm(dim=-1), MATRIX),
    "normalize": (lambda x: F.normalize(x, dim=-1), MATRIX),
    "cosine_similarity": (lambda x: F.cosine_similarity(x, W, dim=-1), MATRIX),
    "cumsum": (lambda x: x.cumsum(-1), MATRIX),
    "logcumsumexp": (lambda x: x.logcumsumexp(-1), MATRIX),
    "prod": (lambda x: x.prod(-1), MATRIX),
    "topk": (lambda x: x.topk(3, -1).values, MATRIX),
    "router": (routed, MATRIX),
    "rotary, complex": (rotated, MATRIX),
    "index_add": (gathered_and_added, MATRIX),
    "amax": (lambda x: x - x.amax(-1, keepdim=True), MATRIX),
    "where": (lambda x: torch.where(x > 0.1, x.sin(), x.exp()), MATRIX),
    "sdpa": (attention, HEADS),
    "sdpa, causal": (lambda x: attention(x, is_causal=True), HEADS),
    "sdpa, boolean mask": (lambda x: attention(x, attn_mask=MASK), HEADS),
    "sdpa, additive mask": (
        lambda x: attention(x, attn_mask=torch.zeros(5, 5).double().masked_fill(~MASK, -1e4)),
        HEADS,
    ),
    "sdpa, grouped queries": (
        lambda x: F.scaled_dot_product_attention(x, x[:, :1].cos(), x[:, :1].sin(), enable_gqa=True),
        HEADS,
    ),
    "attention written out": (attention_written_out, HEADS),
}


def scalar(op: Op) -> Scalar:
    """Curved in the op's output, with a different weight for each entry."""

    def s(x: Tensor) -> Tensor:
        y = op(x)
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).reshape(y.shape)
        return (weights * torch.tanh(y)).square().sum() + (weights * y).sum()

    return s


def reverse_over_reverse(s: Scalar, x: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(s(x), x, create_graph=True)
    return torch.autograd.grad(g, x, v)[0]
