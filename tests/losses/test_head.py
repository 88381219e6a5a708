"""The output projection inside the loss: the same function as that of whole logits, to second order, whatever the model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import hesscope as hs
from architectures import (
    _ROTARY,
    ARCHITECTURES,
    ENCODER_DECODERS,
    STRUCTURES,
    ragged_batches,
    ragged_pairs,
    tiny,
    unused_experts_allowed,
)
from hesscope.engines.forward_context import quietly
from hesscope.losses import CausalLMLoss, HeadForm, HeadLoss, has_plain_head, projected_cross_entropy
from hesscope.losses import head as module
from hesscope.losses.logits_map import LogitsMap
from oracles import relative

MAPS = {"plain": (), "scaled": (0.5,), "capped": (0.5, None, 3.0), "twice capped": (None, 2.0, None)}
TOKENS, CLASSES, WIDTH = 5, 7, 3


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (TOKENS, WIDTH), (CLASSES, WIDTH), (CLASSES,)
    h, W, b = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return h, W, b, torch.randint(CLASSES, (TOKENS,), generator=g)


def by_logits(h: Tensor, W: Tensor, b: Tensor, y: Tensor, steps: tuple[float | None, ...] = ()) -> Tensor:
    z = h @ W.T + b
    for step in steps:
        z = z.tanh() if step is None else z * step
    return nn.functional.cross_entropy(z, y, reduction="sum")


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("rows", "keep"), [(1, False), (3, False), (3, True), (TOKENS + 4, False)])
def test_derivatives(name: str, rows: int, keep: bool) -> None:
    """With a cotangent that moves with the input, as in a larger graph."""
    h, W, b, y = example()
    form = HeadForm(LogitsMap(MAPS[name]), rows, keep)

    def f(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return projected_cross_entropy(h, W, b, y, form) * h[0, 0].square()

    torch.testing.assert_close(projected_cross_entropy(h, W, b, y, form), by_logits(h, W, b, y, MAPS[name]))
    assert torch.autograd.gradcheck(f, (h, W, b))
    assert torch.autograd.gradgradcheck(f, (h, W, b))


@pytest.mark.parametrize("name", MAPS)
def test_forward_mode_of_the_logits_gives_the_same_product(name: str) -> None:
    h, W, b, y = example()
    u = tuple(torch.randn_like(x) for x in (h, W, b))
    gradient_of = torch.func.grad(lambda *x: by_logits(*x, y, MAPS[name]), argnums=(0, 1, 2))
    with quietly():
        expected = torch.func.jvp(gradient_of, tuple(x.detach() for x in (h, W, b)), u)[1]
    total = projected_cross_entropy(h, W, b, y, HeadForm(LogitsMap(MAPS[name]), 2))
    gradient = torch.autograd.grad(total, (h, W, b), create_graph=True)
    for found, other in zip(torch.autograd.grad(gradient, (h, W, b), u), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_constants_among_the_inputs(wanted: tuple[bool, ...]) -> None:
    h, W, b, y = example()
    inputs = [x.requires_grad_(w) for x, w in zip((x.detach() for x in (h, W, b)), wanted, strict=True)]
    moving = [x for x in inputs if x.requires_grad]
    products = []
    for f in (lambda: projected_cross_entropy(*inputs, y, HeadForm(rows=2)), lambda: by_logits(*inputs, y)):
        g = torch.autograd.grad(f(), moving, create_graph=True)
        again = torch.autograd.grad(f(), moving, create_graph=True)  # a graph of its own
        products.append(torch.autograd.grad(again, moving, [x.detach() for x in g]))
    for x, z in zip(*products, strict=True):
        torch.testing.assert_close(x, z, rtol=1e-10, atol=1e-12)


def test_no_tokens_at_all() -> None:
    h, W, b, y = example()
    total = projected_cross_entropy(h[:0], W, b, y[:0])
    g = torch.autograd.grad(total, (W, b), create_graph=True)
    assert float(total.detach()) == 0.0
    assert all(not x.any() for x in g)
    assert all(not x.any() for x in torch.autograd.grad(g, (h, W, b), (W.detach(), b.detach())))


def test_the_gradient_asked_for_twice_is_the_same() -> None:
    h, W, b, y = example()
    total = projected_cross_entropy(h, W, b, y)
    first, second = (torch.autograd.grad(total, (h, W), retain_graph=True) for _ in range(2))
    for x, z in zip(first, second, strict=True):
        torch.testing.assert_close(x, z, rtol=1e-12, atol=1e-14)


def test_half_precision_is_summed_in_float32() -> None:
    h, W, b, y = example(torch.bfloat16)
    total = projected_cross_entropy(h, W, b, y, HeadForm(rows=2))
    assert total.dtype == torch.float32
    logits = nn.functional.linear(h, W, b).float()
    torch.testing.assert_close(total, nn.functional.cross_entropy(logits, y, reduction="sum"), rtol=1e-6, atol=1e-6)
    g = torch.autograd.grad(total, (h, W, b), create_graph=True)
    u = [x.detach() for x in g]
    found = torch.cat([x.double().flatten() for x in torch.autograd.grad(g, (h, W, b), u)])
    wide = [x.detach().double().requires_grad_() for x in (h, W, b)]
    g = torch.autograd.grad(by_logits(*wide, y), wide, create_graph=True)
    expected = torch.cat([x.flatten() for x in torch.autograd.grad(g, wide, [x.double() for x in u])])
    assert relative(found, expected) < 2e-2


def test_nothing_of_the_logits_size_is_kept() -> None:
    h, W, b, y = example()
    shapes: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x.detach()

    def kept(f: Callable[[], Tensor]) -> bool:
        shapes.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            torch.autograd.grad(f(), (h, W, b), create_graph=True)
        return (TOKENS, CLASSES) in shapes or (CLASSES, TOKENS) in shapes

    assert kept(lambda: by_logits(h, W, b, y))
    assert kept(lambda: projected_cross_entropy(h, W, b, y, HeadForm(keep=True)))
    assert not kept(lambda: projected_cross_entropy(h, W, b, y, HeadForm(keep=False)))
    assert kept(lambda: projected_cross_entropy(h, W, b, y))  # for it is small


# ---- models


def product(problem: hs.Problem, loss: Any, v: dict[str, Tensor]) -> Tensor:
    """H v of all batches by double backward through a loss, over all parameters."""
    leaves = {name: p.detach().requires_grad_() for name, p in problem.model.named_parameters()}
    total = sum(problem.total(b, leaves, loss=loss)[0] for b in range(len(problem.batches)))
    assert isinstance(total, Tensor)
    g = torch.autograd.grad(total, list(leaves.values()), create_graph=True, materialize_grads=True)
    slope = sum((x * v[name]).sum() for x, name in zip(g, leaves, strict=True))
    assert isinstance(slope, Tensor)
    found = torch.autograd.grad(slope, list(leaves.values()), materialize_grads=True)
    return torch.cat([x.flatten() for x in found])


def gap(model: nn.Module, pairs: bool = False, rows: int | None = 3, keep: bool = False) -> tuple[float, HeadLoss]:
    """How far the product in chunks is from that of whole logits, and the loss in chunks."""
    problem = hs.seq2seq_lm(model, ragged_pairs()) if pairs else hs.causal_lm(model, ragged_batches())
    g = torch.Generator().manual_seed(1)
    v = {n: torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype) for n, p in model.named_parameters()}
    assert has_plain_head(problem.loss)
    loss = HeadLoss(problem.loss, rows, keep)
    return relative(product(problem, loss, v), product(problem, None, v)), loss


def cohere(**more: Any) -> nn.Module:
    return T.CohereForCausalLM(T.CohereConfig(**_ROTARY | {"logit_scale": 0.3} | more))


def granite(**more: Any) -> nn.Module:
    return T.GraniteForCausalLM(T.GraniteConfig(**_ROTARY | {"logits_scaling": 2.5} | more))


@pytest.mark.parametrize("name", [*ARCHITECTURES, *ENCODER_DECODERS, "phi", "phi3", "falcon"])
def test_every_architecture_in_chunks_of_three_tokens(name: str) -> None:
    """Ragged padded batches with labels of -100; tied and not, with and without a bias."""
    with unused_experts_allowed():
        found, loss = gap(tiny(name), pairs=name in ENCODER_DECODERS)
    known = ARCHITECTURES | ENCODER_DECODERS
    assert loss.chunked
    assert loss.form.endswith("in chunks of at most 3 tokens")
    assert found < (1e-6 if (name in known and known[name].casts) or name in STRUCTURES else 1e-10)


@pytest.mark.parametrize("make", [cohere, granite])
@pytest.mark.parametrize("tied", [True, False])
def test_scaled_logits(make: Callable[..., nn.Module], tied: bool) -> None:
    torch.manual_seed(0)
    found, loss = gap(make(tie_word_embeddings=tied).double().eval())
    assert loss.form == f"logits (times {0.3 if make is cohere else 0.4}) in chunks of at most 3 tokens"
    assert found < 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_tied_or_not(tied: bool) -> None:
    found, loss = gap(tiny("gpt2", tie_word_embeddings=tied))
    assert loss.chunked
    assert found < 1e-10


class Reader(nn.Module):
    """A small model that does to its logits what it is told to."""

    def __init__(self, read: Callable[[Tensor], Any], bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.middle, self.out = nn.Embedding(37, 4), nn.Linear(4, 4), nn.Linear(4, 37, bias=bias)
        self.read = read

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        z: Tensor = self.read(self.out(torch.tanh(self.middle(self.embed(input_ids)))))
        return z


def in_place(z: Tensor) -> Tensor:
    z[..., 3] = -5.0
    return z


def scaled_in_place(z: Tensor) -> Tensor:
    z.mul_(0.5)
    return z


def out_of_place_then_in_place(z: Tensor) -> Tensor:
    y = z * 2.0
    z.zero_()
    return y


def shifted(z: Tensor) -> Tensor:
    return z + torch.linspace(-1, 1, 37, dtype=z.dtype)


SEEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "soft cap": (lambda z: 3.0 * torch.tanh(z / 3.0), "logits (times 0.333333, tanh, times 3)"),
    "contiguous, in float64": (lambda z: z.contiguous().double(), "logits"),
    "moved as accelerate moves them": (lambda z: 2.0 * z.to("cpu", non_blocking=True), "logits (times 2)"),
    "to a dtype by name": (lambda z: z.to(dtype=torch.float64), "logits"),
    "to another layout": (lambda z: z.to(memory_format=torch.contiguous_format), "whole logits: the model does more"),
    "a constant for every class": (shifted, "logits"),
    "scaled from the left": (lambda z: 0.5 * z, "logits (times 0.5)"),
    "questions only": (lambda z: z if z.shape[-1] == 37 and z.dtype == torch.float64 else z * 0, "logits"),
    "clamped": (lambda z: z.clamp(-1, 1), "whole logits: the model does more to them"),
    "normalised": (lambda z: z.log_softmax(-1), "whole logits: the model does more to them"),
    "changed in place": (in_place, "whole logits: the model changes them in place"),
    "scaled in place": (scaled_in_place, "whole logits: the model changes them in place"),
    "a product, and then zeros": (out_of_place_then_in_place, "logits (times 2)"),
    "cut": (lambda z: torch.cat([z[:, :1], z[:, 1:]], 1), "whole logits: the model does more to them"),
    "divided by a tensor": (lambda z: z / (1 + z.detach().abs().max()), "whole logits: the model does more to them"),
}


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("bias", [True, False])
def test_whatever_a_model_does_to_its_logits(name: str, bias: bool) -> None:
    read, form = SEEN[name]
    found, loss = gap(Reader(read, bias).double())
    assert loss.form.startswith(form)
    assert loss.chunked == (not form.startswith("whole"))
    assert found < 1e-10


def test_hooks_see_logits() -> None:
    model, seen = tiny("gpt2"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(float(output.detach().sum())))
    found, loss = gap(model)
    assert found < 1e-10
    assert seen[0] == pytest.approx(seen[-1] if len(seen) == 1 else seen[3], rel=1e-10)
    assert loss.form == "whole logits: the model changes them in place"


def test_hidden_states_changed_after_the_projection() -> None:
    class Overwriting(Reader):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            h = torch.tanh(self.middle(self.embed(input_ids))).detach()
            z: Tensor = self.out(h)
            h.zero_()
            return z

    model = Overwriting(lambda z: z).double()
    problem = hs.causal_lm(model, ragged_batches())
    assert problem.total(0, loss=HeadLoss(CausalLMLoss()))[0] == problem.total(0)[0]


# ---- operators


OPERATORS: dict[str, Callable[..., Any]] = {
    "hessian": hs.hessian,
    "ggn": hs.ggn,
    "fisher": lambda *a: hs.fisher(*a, samples=2),
    "empirical": hs.empirical_fisher,
    "fisher by sequence": lambda *a: hs.fisher(*a, per="sequence"),
}


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt"])
def test_operators_with_the_head_in_chunks_and_whole(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parameters, the last layer alone, and everything but the last layer."""
    problem = hs.causal_lm(tiny(name), ragged_batches())
    last = "lm_head.weight" if name == "opt" else "*embed_tokens*" if name == "gemma2" else "transformer.wte.*"
    for pattern in ("*", last, f"!{last}"):
        space = hs.select(problem, "*", pattern) if pattern.startswith("!") else hs.select(problem, pattern)
        V = torch.randn(space.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with monkeypatch.context() as patch:
            patch.setattr(HeadForm, "most", lambda self, weight: 4)
            A = OPERATORS[kind](problem, space)
            found = A @ V
        note = A.describe()["head"]
        joined = "whole logits: the matrix joins tokens"
        assert note == joined if "sequence" in kind else note.startswith("logits")
        with monkeypatch.context() as patch:
            patch.setattr(module, "_PLAIN", ())
            B = OPERATORS[kind](problem, space)
            expected = B @ V
        assert B.describe()["head"] in ("", joined)
        assert relative(found, expected) < (1e-6 if ARCHITECTURES[name].casts else 1e-10)
