"""The kernel of a cross-entropy's output Hessian, chosen for a Gauss-Newton matrix: what runs, what stands in, what is said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.losses import CrossEntropyLoss, output_hessian
from hesscope.losses.output_hessian import Kernel, cross_entropy_hessian_product
from oracles import linearized_lm, relative

F64 = torch.float64
PATTERN = "transformer.h.1.attn.c_attn.bias"


def examples(loss: Any = None, probabilities: bool = False) -> hs.Problem:
    torch.manual_seed(0)
    inputs = [torch.randn(n, 3, dtype=F64) for n in (2, 5)]
    targets = [
        torch.randn(len(x), 4, dtype=F64).softmax(-1) if probabilities else torch.arange(len(x)) % 4 for x in inputs
    ]
    return hs.Problem(nn.Linear(3, 4).double(), loss or CrossEntropyLoss(), list(zip(inputs, targets, strict=True)))


def language_model(**options: Any) -> hs.Problem:
    return hs.causal_lm(tiny("gpt2"), ragged_batches(), **options)


class _Peculiar(nn.Module):
    """A language model whose logits are not one for each row of a projection, so that they stand whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(37, 4), nn.Linear(4, 37)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.embed(input_ids)).sort(-1).values  # type: ignore[no-any-return]


#: Every way from the operator to the kernel.
PROBLEMS: dict[str, Callable[[], hs.Problem]] = {
    "tokens in chunks": language_model,
    "whole logits": lambda: hs.causal_lm(_seeded(_Peculiar()), [torch.arange(3, 12)[None]]),
    "last tokens": lambda: language_model(loss="classification"),
    "examples": examples,
    "probabilities": lambda: examples(probabilities=True),
    "perplexity": lambda: language_model(objective="perplexity"),
}


def _seeded(model: nn.Module) -> nn.Module:
    for i, p in enumerate(model.parameters()):
        nn.init.normal_(p.data, generator=torch.Generator().manual_seed(i))
    return model.double()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """A stand-in for the compiled kernel, which is minutes away; the shapes of what it was given."""
    given: list[torch.Size] = []

    def run(z: Tensor, y: Tensor, u: Tensor) -> Tensor:
        given.append(u.shape)
        return output_hessian._eager(z, y, u)

    monkeypatch.setattr(output_hessian, "_compiled", lambda: run)
    monkeypatch.setattr(output_hessian, "_trusted", {})
    return given


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_kernel_that_is_asked_for_runs(name: str, compiled: list[torch.Size]) -> None:
    problem = PROBLEMS[name]()
    space = hs.select(problem, PATTERN) if "tokens" in name or name == "perplexity" else hs.select(problem)
    v = space.flatten(space.gaussian(0, [0]))
    engines = ("auto", "streamed") if "transformer" in space.names[0] else ("auto",)
    for engine in engines:
        before = len(compiled)
        G = hs.ggn(problem, space, engine, kernel="compile")
        eager = hs.ggn(problem, space, engine, kernel="eager")
        assert relative(G @ v, eager @ v) < 1e-14
        assert len(compiled) > before
        assert (G.describe()["kernel"], eager.describe()["kernel"]) == ("compile: as asked", "eager: as asked")


def test_against_the_jacobian_written_down() -> None:
    problem = language_model()
    space = hs.select(problem, PATTERN)
    expected = linearized_lm(problem.model, ragged_batches(), space).ggn()
    for kernel in ("auto", "eager"):
        G = hs.ggn(problem, space, kernel=kernel)
        assert relative(G.to_dense(), expected) < 1e-12
        assert G.describe()["kernel"].startswith("eager: ")


def test_what_stands_in_is_said_once_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    G = hs.ggn(examples(), kernel="triton")
    assert G.describe()["kernel"] == "triton, not run yet"
    v = torch.ones(G.shape[0], dtype=F64)
    with pytest.warns(hs.HesscopeWarning, match="The eager kernel stands in for triton: triton "):
        G @ v
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hs.trace(G, "hutchinson", budget=4)
    assert found.provenance["operator"]["kernel"].startswith("eager, for triton: triton ")


def test_a_kernel_that_is_wrong_gives_way_in_an_operator_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_hessian, "_compiled", lambda: lambda z, y, u: 1.01 * output_hessian._eager(z, y, u))
    monkeypatch.setattr(output_hessian, "_trusted", {})
    problem = examples()
    G = hs.ggn(problem, kernel="compile")
    with pytest.warns(hs.HesscopeWarning, match="The eager kernel stands in for compile: it differs"):
        dense = G.to_dense()
    assert torch.equal(dense, hs.ggn(problem).to_dense())
    assert "eager, for compile: it differs from the eager kernel by" in G.describe()["kernel"]


def test_the_products_error_is_held_to_the_eager_kernel(compiled: list[torch.Size]) -> None:
    problem = hs.causal_lm(tiny("gpt2", torch.float32), ragged_batches()[2:])
    G = hs.ggn(problem, hs.select(problem, PATTERN), kernel="compile")
    G @ torch.ones(G.shape[0])
    kinds = set(output_hessian._trusted)
    assert G.product_error().relative is not None
    assert set(output_hessian._trusted) == kinds  # no float64 among them


def test_shapes_alone_run_nothing_and_say_nothing() -> None:
    kernel, z = Kernel("triton"), torch.zeros(2, 3, device="meta")
    assert cross_entropy_hessian_product(z, torch.zeros(2, dtype=torch.int64, device="meta"), z, kernel).is_meta
    assert kernel.note == "triton, not run yet"


class _Own(CrossEntropyLoss):
    """A loss of one's own that builds on another and does something else."""

    def output_hessian_product(self, outputs: Tensor, batch: Any, u: Tensor) -> Tensor:  # type: ignore[override]
        return 2.0 * super().output_hessian_product(outputs, batch, u)


def test_a_loss_of_ones_own_without_kernels() -> None:
    G = hs.ggn(examples(_Own()))
    assert relative(G.to_dense(), 2.0 * hs.ggn(examples()).to_dense()) < 1e-14
    assert "kernel" not in G.describe()


@pytest.mark.parametrize(
    ("problem", "kernel", "said"),
    [
        (examples, "cuda", "Expected kernel to be auto, eager, compile or triton, got 'cuda'."),
        (lambda: examples(_Own()), "eager", "Expected kernel='auto' for _Own, got 'eager': only the output Hessian of a cross-"),
        (lambda: language_model(loss="regression"), "triton", "Expected kernel='auto' for OneHotSquaredErrorLoss, got 'triton'"),
    ],
)  # fmt: skip
def test_refusals(problem: Callable[[], hs.Problem], kernel: str, said: str) -> None:
    with pytest.raises(hs.HesscopeError) as error:
        hs.ggn(problem(), kernel=kernel)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)
