"""Splitting batches changes memory, never the answer; what cannot be split is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.operators.fisher import SampledBatches
from hesscope.operators.matrix_run import matrix_run
from hesscope.problem.microbatches import microbatched, split
from oracles import relative


def product(problem: hs.Problem, **options: Any) -> Tensor:
    H = hs.hessian(problem, **options)
    result: Tensor = H @ H.space.flatten(H.space.gaussian(0, [0, 1]))
    return result


@pytest.mark.parametrize(
    "engine", ["auto", "forward-over-reverse", "reverse-over-forward", "streamed", "finite-difference"]
)
@pytest.mark.parametrize("objective", ["nll", "perplexity"])
def test_the_answer_is_the_same(objective: str, engine: str) -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches(), objective=objective)
    space = hs.select(problem, "transformer.h.1.*")
    expected = product(problem, space=space)
    for microbatch in (1, 2, 8) if engine == "auto" else (2,):
        found = product(problem, space=space, engine=engine, microbatch=microbatch)
        assert relative(found, expected) < (1e-8 if engine == "finite-difference" else 1e-12)


#: Matrices through the outputs, by functions of a problem, a selection and the rest.
THROUGH_OUTPUTS: dict[str, Callable[..., hs.Operator]] = {
    "ggn": hs.ggn,
    "fisher": partial(hs.fisher, samples=2, seed=5),
    "fisher of sequences": partial(hs.fisher, per="sequence", seed=5),
    "empirical fisher": hs.empirical_fisher,
    "empirical fisher of sequences": partial(hs.empirical_fisher, per="sequence"),
}


@pytest.mark.parametrize("engine", ["auto", "streamed"])
@pytest.mark.parametrize("name", THROUGH_OUTPUTS)
def test_matrices_through_the_outputs_are_the_same(name: str, engine: str) -> None:
    """Ragged batches with padding and labels of -100; a label drawn for another place would change the answer by a lot."""
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    space = hs.select(problem, "transformer.h.1.*", "transformer.wte.weight")
    V = space.flatten(space.gaussian(0, [0, 1]))
    expected = THROUGH_OUTPUTS[name](problem, space) @ V
    for microbatch in (1, 2, 8) if engine == "auto" else (2,):
        A = THROUGH_OUTPUTS[name](problem, space, engine=engine, microbatch=microbatch)
        assert relative(A @ V, expected) < 1e-12
        assert (A.describe()["microbatch"], A.origin()) == (microbatch, problem.describe())


@pytest.mark.parametrize("loss", ["classification", "regression"])
def test_those_of_a_language_models_other_losses_too(loss: str) -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches(), loss=loss)
    space = hs.select(problem, "transformer.h.1.*")
    v = space.flatten(space.gaussian(0, [0]))
    for make in THROUGH_OUTPUTS.values():
        assert relative(make(problem, space, microbatch=1) @ v, make(problem, space) @ v) < 1e-12


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_sampled_labels_belong_to_places_in_the_data(loss: str) -> None:
    """The very labels, also for a part of the selection and beside other operators."""
    torch.manual_seed(0)
    inputs = [torch.randn(n, 3).double() for n in (5, 1, 2)]
    targets = [
        torch.randint(4, (len(x),)) if loss == "cross_entropy" else torch.randn(len(x), 4).double() for x in inputs
    ]
    problem = hs.supervised(nn.Linear(3, 4).double(), list(zip(inputs, targets, strict=True)), loss=loss)
    drawn = [_drawn(problem), _drawn(microbatched(problem, 2))]
    assert [len(labels) for labels in drawn] == [3, 5]
    torch.testing.assert_close(torch.cat(drawn[0]), torch.cat(drawn[1]), rtol=1e-14, atol=0)
    whole, parts = (hs.fisher(problem, seed=3, microbatch=size) for size in (None, 2))
    assert relative(parts.to_dense(), whole.to_dense()) < 1e-12
    bias = hs.select(problem, "bias")
    narrowed = parts.narrowed(bias)
    assert narrowed is not None
    assert relative(narrowed.to_dense(), whole.restricted_to(bias).to_dense()) < 1e-12


def _drawn(problem: hs.Problem) -> list[Tensor]:
    """The labels of every batch."""
    batches = SampledBatches(problem, problem.loss, 1, 3)  # type: ignore[arg-type]
    return [batches(b, problem.outputs(b))[0][1] for b in range(len(problem.batches))]


@pytest.mark.parametrize("corrected", [False, True])
def test_kronecker_factors_are_the_same(corrected: bool) -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    space = hs.select(problem, "transformer.h.1.mlp.*.weight")
    v = space.flatten(space.gaussian(0, [0]))
    more = {"corrected": corrected, "samples": 2, "per": "sequence" if corrected else "token"}
    whole, parts = (hs.kfac(problem, space, microbatch=size, **more) for size in (None, 1))  # type: ignore[arg-type]
    assert relative(parts @ v, whole @ v) < (1e-9 if corrected else 1e-12)  # eigenvectors of close eigenvalues
    assert parts.units == pytest.approx(whole.units)
    assert parts.describe() == whole.describe() | {"microbatch": 1}


def test_diagonals_and_blocks_of_a_ggn_go_over_the_parts() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    space = hs.select(problem, "transformer.h.1.attn.c_proj.weight[:3, :3]")
    G, whole = (hs.ggn(problem, space, microbatch=size) for size in (1, None))
    assert relative(hs.block(G).matrix, hs.block(whole).matrix) < 1e-12
    draws = [hs.diagonal(A, "sampled", budget=2, seed=1).flat() for A in (G, whole)]
    assert relative(*draws) < 1e-12


def test_graphs_are_those_of_the_parts() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    H = hs.hessian(problem, microbatch=1)
    whole = hs.hessian(problem)
    for A in (H, whole):
        A @ torch.ones(A.shape[0], dtype=torch.float64)
    assert (H.describe()["graphs_kept"], whole.describe()["graphs_kept"]) == (6, 3)
    assert (H.describe()["microbatch"], whole.describe()["microbatch"]) == (1, None)
    assert H.units == pytest.approx(whole.units)
    # The result is still one of the caller's problem.
    assert H.origin() == whole.origin()


@pytest.mark.parametrize("engine", ["auto", "reverse-over-reverse"])
def test_a_block_goes_over_the_parts(engine: str) -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    space = hs.select(problem, "transformer.h.1.attn.c_proj.weight[:3, :3]")
    H, whole = (hs.hessian(problem, space, engine, microbatch=size) for size in (1, None))
    assert (matrix_run(H, "weights").tasks, matrix_run(whole, "weights").tasks) == (6, 3)
    found, expected = hs.block(H).matrix, hs.block(whole).matrix
    assert relative(torch.as_tensor(found), torch.as_tensor(expected)) < 1e-12


def test_examples_of_other_losses_are_split_too() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    batches = [(torch.randn(n, 3).double(), torch.randint(4, (n,))) for n in (5, 1, 2)]
    problem = hs.supervised(model, batches)
    assert relative(product(problem, microbatch=2), product(problem)) < 1e-12


def test_what_belongs_to_the_whole_batch_stays_whole() -> None:
    batch = {"input_ids": torch.arange(12).reshape(3, 4), "position_ids": torch.arange(4)[None], "scale": 2.0}
    parts = split(batch, 2)
    assert [len(part["input_ids"]) for part in parts] == [2, 1]
    assert all(part["position_ids"].shape == (1, 4) and part["scale"] == 2.0 for part in parts)


def supervised(model: nn.Module, **options: Any) -> hs.Problem:
    torch.manual_seed(0)
    batches = [(torch.randn(n, 3), torch.randn(n, 3)) for n in (4, 2)]
    return hs.supervised(model, batches, loss="mse", **options)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_size_that_is_none(size: Any) -> None:
    for make in (hs.hessian, *THROUGH_OUTPUTS.values(), partial(hs.kfac, space=None)):
        with pytest.raises(
            hs.HesscopeError, match="Expected microbatch to be a whole number of sequences, 1 or more, got"
        ):
            make(supervised(nn.Linear(3, 3)), microbatch=size)


def test_frozen_masks_belong_to_whole_batches() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches(), dropout="frozen")
    with pytest.raises(hs.HesscopeError, match="Expected dropout='off' with microbatch"):
        hs.hessian(problem, microbatch=1)


def test_a_model_that_mixes_a_batchs_examples() -> None:
    """Statistics of the batch are others for its parts."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    for make in (hs.hessian, *THROUGH_OUTPUTS.values()):
        with pytest.raises(
            hs.HesscopeError, match="Expected the loss to be a sum over sequences, but the first ones of batch 0"
        ):
            make(supervised(model), microbatch=2)


def test_a_loss_that_counts_batches() -> None:
    batches = [torch.randn(4, 3)]
    problem = hs.Problem(nn.Linear(3, 3), lambda m, x: m(x).square().mean(), batches, count=lambda x: 1)
    with pytest.raises(hs.HesscopeError, match=r"over 1 terms together and .* over 2 apart"):
        hs.hessian(problem, microbatch=2)


def test_tensors_without_an_axis_in_common() -> None:
    batches = [(torch.randn(4, 3), torch.randn(2, 3))]
    problem = hs.Problem(
        nn.Linear(3, 3), lambda m, b: F.mse_loss(m(b[0]).mean(0), b[1].mean(0)), batches, count=lambda b: 1
    )
    with pytest.raises(hs.HesscopeError, match=r"Expected the tensors of batch 0 .* got shapes \[4, 3\], \[2, 3\]"):
        hs.hessian(problem, microbatch=2)
