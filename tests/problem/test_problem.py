"""Any model, any loss, any batches: one sum, one count, one division."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from oracles import derivatives, relative


def network(seed: int = 0) -> nn.Sequential:
    """Small and smooth, with curvature between all of its 21 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def points(*counts: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, generator=g, dtype=torch.float64) for n in counts]


class QuarticLoss:
    """A loss of the caller's: the sum of fourth powers."""

    def total(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        return model(batch).pow(4).sum(), len(batch)


def quartic_mean(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).pow(4).mean()


def expected(model: nn.Module, batches: list[Tensor]) -> Any:
    """Over all points at once."""
    return derivatives(model(torch.cat(batches)).pow(4).mean(), list(model.parameters()))


def matrix(problem: hs.Problem) -> Tensor:
    H = hs.hessian(problem)
    return H @ torch.eye(H.shape[0], dtype=H.dtype)


def test_a_loss_object() -> None:
    model, batches = network(), points(2, 5, 1)
    problem = hs.Problem(model, QuarticLoss(), batches)
    dense = expected(model, batches)
    assert problem.N == 8
    assert problem.counts == (2, 5, 1)
    assert problem.risk() == pytest.approx(dense.risk, rel=1e-13)
    assert relative(matrix(problem), dense.hessian) < 1e-10


def test_a_function_that_returns_a_mean_and_its_count() -> None:
    model, batches = network(), points(2, 5, 1)
    problem = hs.Problem(model, quartic_mean, batches, count=len)
    dense = expected(model, batches)
    assert problem.risk() == pytest.approx(dense.risk, rel=1e-13)
    assert relative(matrix(problem), dense.hessian) < 1e-10
    # Averaging the batches' means would be another matrix.
    averaged = sum(expected(model, [b]).hessian for b in batches) / 3
    assert relative(averaged, dense.hessian) > 1e-2


def test_a_mean_without_a_count_is_refused() -> None:
    with pytest.raises(hs.HesscopeError, match="Expected count= with a loss function that returns a mean"):
        hs.Problem(network(), quartic_mean, points(2))


def test_a_loss_that_is_neither() -> None:
    with pytest.raises(hs.HesscopeError, match="a loss with a method total\\(model, batch\\), or a function, got str"):
        hs.Problem(network(), "quartic", points(2))  # type: ignore[arg-type]


def test_a_loss_that_is_not_one_number() -> None:
    problem = hs.Problem(network(), lambda m, b: m(b), points(2), count=len)
    with pytest.raises(hs.HesscopeError, match=r"one number, its sum, got a tensor of shape \[2, 1\]; sum it"):
        problem.risk()


@pytest.mark.parametrize("batches", [[], iter([]), ()])
def test_no_batches(batches: Any) -> None:
    with pytest.raises(hs.HesscopeError, match="Expected at least one batch, got none"):
        hs.Problem(network(), QuarticLoss(), batches)


@pytest.mark.parametrize("batches", [torch.ones(2, 3), "text", 3])
def test_a_single_batch_is_not_a_list_of_batches(batches: Any) -> None:
    with pytest.raises(hs.HesscopeError, match=r"Expected an iterable of batches, got .*; wrap a batch in a list"):
        hs.Problem(network(), QuarticLoss(), batches)


def test_a_model_without_parameters() -> None:
    with pytest.raises(hs.HesscopeError, match="a model with parameters; this one has none"):
        hs.Problem(nn.Tanh(), QuarticLoss(), points(2))


Pair = namedtuple("Pair", "x scale")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (x, 2.0),
        lambda x: [x, 2.0],
        lambda x: Pair(x, 2.0),
        lambda x: {0: x, 1: 2.0},
        lambda x: {0: x, 1: torch.tensor(2.0)},
    ],
    ids=["tuple", "list", "named tuple", "dictionary", "tensors"],
)
def test_batches_of_any_structure_are_read_once_and_copied(wrap: Any) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).pow(4).mean() * batch[1]

    model, batches = network(), points(2, 3)
    problem = hs.Problem(model, loss, (wrap(x) for x in batches), count=lambda b: len(b[0]))
    dense = expected(model, points(2, 3))
    for x in batches:
        x.zero_()
    assert problem.risk() == pytest.approx(2 * dense.risk, rel=1e-13)
    assert problem.data_fingerprint == problem.data_fingerprint
    assert relative(matrix(problem), 2 * dense.hessian) < 1e-10


def test_batches_that_require_gradients_are_constants() -> None:
    x = points(3)[0].requires_grad_()
    problem = hs.Problem(network(), QuarticLoss(), [x])
    matrix(problem)
    assert x.grad is None
    assert not problem.batches[0].requires_grad


def test_parameters_that_are_not_replaced_are_constants() -> None:
    """They cost no gradients, whether the caller's model asks for them or not."""
    model = network()
    problem = hs.Problem(model, QuarticLoss(), points(3))
    assert not problem.total(0)[0].requires_grad
    bias = model[2].bias.detach().requires_grad_()
    total, _ = problem.total(0, {"2.bias": bias})
    assert torch.autograd.grad(total, [bias, model[2].weight], allow_unused=True)[1] is None
    assert all(p.requires_grad for p in model.parameters())


class Explodes(nn.Module):
    """Fine for small inputs, infinite for large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.blow_up = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.blow_up((self.inner(x) * 1e3).exp().to(x.dtype))


def test_a_loss_that_is_not_finite_names_its_batch_and_module() -> None:
    torch.manual_seed(0)
    model = Explodes().double()
    good, bad = torch.zeros(2, 3, dtype=torch.float64), torch.full((1, 3), 1e9, dtype=torch.float64)
    with torch.no_grad():
        model.inner.weight.abs_()
        model.inner.bias.zero_()
        model.blow_up[0].weight[0, 0] = -1.0
    problem = hs.Problem(model, lambda m, b: m(b).sum() / len(b), [good, bad], count=len)
    H = hs.hessian(problem)
    for run in (problem.risk, lambda: H @ torch.ones(H.shape[0], dtype=torch.float64)):
        with pytest.raises(
            hs.HesscopeError, match=r"loss of batch 1 is nan, expected a finite number.* is that of 'blow_up.0'"
        ):
            run()
    assert not any(m._forward_hooks for m in model.modules())


def test_a_loss_whose_own_arithmetic_is_not_finite_names_its_batch() -> None:
    problem = hs.Problem(network(), lambda m, b: m(b).mean() / 0.0, points(2), count=len)
    with pytest.raises(hs.HesscopeError, match=r"loss of batch 0 is -?inf, expected a finite number\.$"):
        problem.risk()


def test_batch_normalisation_in_training_mode_is_refused() -> None:
    """Its output depends on the batch, so the risk would depend on how data is split."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).double()
    with pytest.raises(hs.HesscopeError, match="'1' is in training mode and would drop or depend on the batch"):
        hs.Problem(model, QuarticLoss(), points(4))
    problem = hs.Problem(model.eval(), QuarticLoss(), points(4, 2))
    assert relative(matrix(problem), expected(model, points(4, 2)).hessian) < 1e-10


def test_frozen_dropout_leaves_running_statistics_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 1)).double().eval()
    problem = hs.Problem(model, QuarticLoss(), points(4, 2), dropout="frozen")
    before = {name: b.clone() for name, b in model.named_buffers()}
    matrix(problem)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert not any(m.training for m in model.modules())


def test_mixed_precisions_give_vectors_of_the_widest() -> None:
    model = network()
    model[2] = model[2].float()
    problem = hs.Problem(model, lambda m, b: m[2](m[1](m[0](b)).float()).pow(4).mean(), points(3, 2), count=len)
    H = hs.hessian(problem)
    assert H.dtype == torch.float64
    reference = network()
    reference[2] = reference[2].float().double()
    dense = expected(reference, points(3, 2)).hessian
    assert relative(H @ torch.eye(H.shape[0], dtype=torch.float64), dense) < 1e-6


def test_half_precision_products_are_float32_vectors_near_the_truth() -> None:
    model = network().to(torch.bfloat16)
    H = hs.hessian(hs.Problem(model, QuarticLoss(), [b.to(torch.bfloat16) for b in points(3, 2)]))
    product = H @ torch.ones(H.shape[0])
    assert H.dtype == product.dtype == torch.float32
    rounded = [b.to(torch.bfloat16).double() for b in points(3, 2)]
    dense = expected(network().to(torch.bfloat16).double(), rounded).hessian
    assert relative(product, dense @ torch.ones(len(dense), dtype=torch.float64)) < 0.05  # eight bits of mantissa


def test_a_description_names_everything() -> None:
    described = hs.Problem(network(), QuarticLoss(), points(2, 3)).describe()
    assert described["model"] == "Sequential"
    assert described["loss"] == "QuarticLoss"
    assert (described["batches"], described["terms"]) == (2, 5)
    assert described["attention"] == "the model's own"
    assert len(described["fingerprint"]) == len(described["data_fingerprint"]) == 64


def test_arrays_and_numbers_in_batches_are_copied_and_told_apart() -> None:
    def of(*extra: Any) -> hs.Problem:
        return hs.Problem(network(), QuarticLossOfPairs(), [(points(2)[0], list(extra))])

    long = np.zeros(5000)
    one, other = of(long), of(np.where(np.arange(5000) == 2500, 1.0, 0.0))
    assert one.data_fingerprint == of(np.zeros(5000)).data_fingerprint != other.data_fingerprint
    assert one.data_fingerprint != of(np.zeros(5000, dtype=np.float32)).data_fingerprint
    assert of(1, 23).data_fingerprint != of(12, 3).data_fingerprint
    long += 1.0
    assert one.batches[0][1][0].sum() == 0


class QuarticLossOfPairs(QuarticLoss):
    """Of points that come with something else."""

    def total(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return super().total(model, batch[0])


def test_a_count_that_is_a_tensor_is_its_number() -> None:
    class Weighted(QuarticLoss):
        def total(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Any]:
            weights = batch[:, 0].abs()
            return (weights[:, None] * model(batch).pow(4)).sum(), weights.sum()

    problem = hs.Problem(network(), Weighted(), points(2, 5))
    assert pytest.approx(float(torch.cat(points(2, 5))[:, 0].abs().sum())) == problem.N
    assert isinstance(problem.N, float)
    found = hs.trace(hs.hessian(problem))
    assert found.estimate == pytest.approx(float(matrix(problem).trace()))
    assert isinstance(problem.describe()["terms"], float)
