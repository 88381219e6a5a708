"""A language model as a classifier and as a regression: value, gradient and Hessian against plain autograd, ragged."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hesscope as hs
from architectures import VOCABULARY, ragged_batches, tiny
from hesscope.losses import LastTokenCrossEntropyLoss, OneHotSquaredErrorLoss, SplitLoss
from hesscope.problem.causal_lm import with_loss
from hesscope.space.random import normals, stream_key, uniforms
from oracles import (
    derivatives,
    entries_of,
    linearized_lm,
    mean_last_token_nll,
    mean_nll,
    mean_one_hot_error,
    prepared_copy,
    relative,
    selected_parameters,
)

RISKS = {"classification": mean_last_token_nll, "regression": mean_one_hot_error, "next_token": mean_nll}
PICKED = ("*.h.1.attn.c_attn.bias", {"transformer.wte.weight": [0, 77, 5, 200]})


def batches() -> list[dict[str, torch.Tensor]]:
    """Ragged and padded on the right, with ignored labels; one sequence without any target; one padded on the left."""
    found = ragged_batches()
    left = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 9], [4, 8, 3, 7, 11]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    silent = {
        "input_ids": torch.tensor([[5, 6, 9], [4, 8, 3]]),
        "labels": torch.tensor([[5, -100, -100], [4, 8, -100]]),
    }
    return [*found, left, silent]


@pytest.mark.parametrize("loss", RISKS)
def test_risk_gradient_and_hessian(loss: str) -> None:
    model = tiny("gpt2")
    problem = hs.causal_lm(model, batches(), loss=loss)
    space = hs.select(problem, *PICKED)
    copied = prepared_copy(model, torch.float64)
    risk: Callable[..., torch.Tensor] = RISKS[loss]
    with sdpa_kernel(SDPBackend.MATH):
        dense = derivatives(risk(copied, batches()), selected_parameters(copied, space), entries_of(space))
    assert problem.risk() == pytest.approx(dense.risk, rel=1e-12)
    H = hs.hessian(problem, space)
    assert relative(space.flatten(H.risk_and_gradient()[1])[:, 0], dense.gradient) < 1e-10
    assert relative(hs.block(H).matrix, dense.hessian) < 1e-10


@pytest.mark.parametrize(("loss", "N"), [("classification", 3 + 2 + 1 + 2 + 1), ("regression", None)])
def test_terms_are_counted_over_all_batches(loss: str, N: int | None) -> None:
    tokens, found = hs.causal_lm(tiny("gpt2"), batches()).N, hs.causal_lm(tiny("gpt2"), batches(), loss=loss).N
    assert found == (N or tokens * VOCABULARY)


@pytest.mark.parametrize("loss", ["classification", "regression"])
def test_batching_does_not_matter(loss: str) -> None:
    model, sequences = tiny("llama"), [list(range(3, 3 + length)) for length in (7, 4, 9, 2)]
    one, all_ = (hs.causal_lm(model, sequences, batch_size=b, loss=loss) for b in (1, 4))
    assert one.risk() == pytest.approx(all_.risk(), rel=1e-6)  # RMSNorm casts to float32
    assert one.N == all_.N


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [LastTokenCrossEntropyLoss, OneHotSquaredErrorLoss])
def test_half_precision_logits_are_raised_first(make: Callable[[], SplitLoss], dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5, VOCABULARY, generator=torch.Generator().manual_seed(0)).to(dtype)
    batch = {"labels": torch.tensor([[1, 2, -100, 3, -100], [-100] * 5])}
    total, count = make().total_of_outputs(logits, batch)
    exact, expected = make().total_of_outputs(logits.double(), batch)
    assert total.dtype == torch.float32
    assert count == expected
    assert float(total) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("make", [LastTokenCrossEntropyLoss, OneHotSquaredErrorLoss])
def test_logits_of_positions_that_do_not_count_have_no_gradient_even_where_infinite(
    make: Callable[[], SplitLoss],
) -> None:
    logits = torch.randn(1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[0, 2:] = torch.inf
    logits.requires_grad_()
    total, _ = make().total_of_outputs(logits, {"labels": torch.tensor([[0, 1, 2, -100]])})
    (gradient,) = torch.autograd.grad(total, logits)
    assert torch.isfinite(total)
    assert gradient[0, 2:].abs().max() == 0
    assert gradient[0, 1].abs().max() > 0
    assert isinstance(make(), SplitLoss)


def test_another_loss_of_the_same_problem() -> None:
    problem = hs.causal_lm(tiny("gpt2"), batches())
    for loss, objective in (("classification", "nll"), ("regression", "nll"), ("next_token", "perplexity")):
        other, fresh = with_loss(problem, loss, objective), hs.causal_lm(tiny("gpt2"), batches(), loss=loss,
                                                                          objective=objective)  # fmt: skip
        assert other.model is problem.model
        assert other.fingerprint == fresh.fingerprint != problem.fingerprint
        assert other.risk() == fresh.risk()


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(hs.HesscopeError, match="next_token, classification, regression"):
        hs.causal_lm(tiny("gpt2"), batches(), loss="hinge")


# ---- GGN and Fisher matrices, against the Jacobian written down whole

#: Llama's RMSNorm casts to float32.
EXACT = {"gpt2": 1e-10, "llama": 1e-6}
F64 = torch.float64


def outer(g: torch.Tensor) -> torch.Tensor:
    """sum over rows of g g^T."""
    return g.T @ g


@cache
def expected(name: str, loss: str) -> tuple[hs.Problem, hs.Space, dict[str, torch.Tensor]]:
    """A problem, a selection, and the matrices: J the logits' Jacobian at the targets that count, r the loss's derivatives."""
    model = tiny(name)
    problem = hs.causal_lm(model, batches(), loss=loss)
    space = hs.select(problem, "*.h.1.ln_1.bias" if name == "gpt2" else "model.layers.1.input_layernorm.weight")
    of = linearized_lm(model, batches(), space)
    z, J, y, sequence = of.logits, of.jacobian, of.targets, of.sequences
    if loss == "classification":
        last = torch.tensor([int((sequence == s).nonzero()[-1]) for s in sequence.unique()])
        z, J, y, sequence = z[last], J[last], y[last], sequence[last]
    N = len(z) if loss == "classification" else z.numel()
    key, first = stream_key(3, "fisher/0"), torch.arange(z.numel())
    if loss == "classification":
        p = z.softmax(-1)
        H_out = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        drawn = (p.cumsum(-1) < uniforms(key, first[: len(z)])[:, None]).sum(-1)
        own, sampled = (p - F.one_hot(t, VOCABULARY) for t in (y, drawn))
    else:
        H_out = 2 * torch.eye(VOCABULARY, dtype=F64).expand(len(z), -1, -1)
        own = 2 * (z - F.one_hot(y, VOCABULARY))
        sampled = -2 * 0.5**0.5 * normals(key, first).reshape(z.shape)
    found = {"ggn": torch.einsum("mvi,mvw,mwj->ij", J, H_out, J) / N}
    for kind, r in {"empirical": own, "sampled": sampled}.items():
        g = torch.einsum("mvi,mv->mi", J, r)
        each = g if loss == "classification" else (J * r[..., None]).flatten(0, 1)
        found[f"{kind}, token"] = outer(each) / N
        found[f"{kind}, sequence"] = outer(torch.stack([g[sequence == s].sum(0) for s in sequence.unique()])) / N
    return problem, space, found


@pytest.mark.parametrize("loss", ["classification", "regression"])
@pytest.mark.parametrize("name", EXACT)
def test_matrices_through_the_outputs(name: str, loss: str) -> None:
    problem, space, dense = expected(name, loss)
    for engine in ("auto", "streamed"):
        assert relative(hs.ggn(problem, space, engine).to_dense(), dense["ggn"]) < EXACT[name]
    for per in ("token", "sequence"):
        E, S = hs.empirical_fisher(problem, space, per), hs.fisher(problem, space, 1, per, 3)
        assert relative(E.to_dense(), dense[f"empirical, {per}"]) < EXACT[name]
        assert relative(S.to_dense(), dense[f"sampled, {per}"]) < EXACT[name]
    assert hs.ggn(problem, space).positive_semidefinite


@pytest.mark.parametrize("make", [LastTokenCrossEntropyLoss, OneHotSquaredErrorLoss])
def test_derivatives_in_the_logits_are_autograds_and_the_mean_over_drawn_labels(make: Callable[[], Any]) -> None:
    """E[r] = 0 and E[<r, u>^2] = <u, H_out u>, to four standard errors of 1000 draws."""
    loss, g = make(), torch.Generator().manual_seed(0)
    z, u = torch.randn(2, 3, 5, 7, generator=g, dtype=F64)
    batch = {"labels": torch.tensor([[0, 1, -100, 3, -100], [-100] * 5, [2, -100, -100, 6, 5]])}
    z.requires_grad_()
    (first,) = torch.autograd.grad(loss.total_of_outputs(z, batch)[0], z, create_graph=True)
    (second,) = torch.autograd.grad(first, z, u)
    z = z.detach()
    torch.testing.assert_close(loss.residual(z, batch), first.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(loss.output_hessian_product(z, batch, u), second, rtol=1e-12, atol=1e-14)
    batches = [loss.sample(z, batch, stream_key(0, f"{i}"), 0) for i in range(1000)]
    along = torch.stack([(loss.residual(z, drawn) * u).sum() for drawn in batches])
    for draws, mean in ((along, 0.0), (along.square(), float((u * second).sum()))):
        assert abs(float(draws.mean()) - mean) < 4 * float(draws.std()) / 1000**0.5
    assert not torch.stack([loss.residual(z, drawn) for drawn in batches[:9]])[:, 1].any()
    assert [loss.total_of_outputs(z, drawn)[1] for drawn in batches[:2]] == [loss.total_of_outputs(z, batch)[1]] * 2


def test_kronecker_factors_of_the_output_projection() -> None:
    """One position a sequence: G and A are means over the sequences' last valid targets."""
    model, key = tiny("qwen2"), stream_key(3, "fisher/0")
    problem = hs.causal_lm(model, ragged_batches(), loss="classification")
    a, z = [], []
    for batch, own in zip(ragged_batches(), problem.batches, strict=True):
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            found = model(**inputs, use_cache=False, output_hidden_states=True)
        for s, labels in enumerate(own["labels"]):
            if len(last := (labels[1:] != -100).nonzero()):
                a.append(found.hidden_states[-1][s, last[-1, 0]])
                z.append(found.logits[s, last[-1, 0]])
    p, N = torch.stack(z).double().softmax(-1), len(z)
    drawn = (p.cumsum(-1) < uniforms(key, torch.arange(N))[:, None]).sum(-1)
    G, A = outer(p - F.one_hot(drawn, VOCABULARY)) / N, outer(torch.stack(a)) / N
    K = hs.kfac(problem, hs.select(problem, "lm_head.weight[:6, :5]"), seed=3)
    assert relative(K.to_dense(), torch.kron(G[:6, :6], A[:5, :5])) < EXACT["llama"]


@pytest.mark.parametrize("loss", ["classification", "regression"])
def test_diagonals_of_a_ggn_from_drawn_labels(loss: str) -> None:
    problem, space, dense = expected("gpt2", loss)
    found = hs.diagonal(hs.ggn(problem, space), "sampled", budget=40)
    t = (found.flat() - dense["ggn"].diag()) / found.standard_error[space.names[0]].flatten()
    assert float(t.square().mean()) < 3
    H = hs.hessian(problem, space)
    assert H.has_gauss_newton
    v = space.gaussian(0, [0])
    assert relative(space.flatten(H.gauss_newton_product(v)), dense["ggn"] @ space.flatten(v)) < EXACT["gpt2"]
