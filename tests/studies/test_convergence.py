"""How a block settles: closed forms, dense oracles on ragged batches, and what is kept."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.problem.batches import sequences_in
from hesscope.studies.convergence import _spaced
from oracles import causal_lm, labels_of, relative

GLOBS = ("transformer.ln_f.bias", {"transformer.wte.weight": [0, 77, 5]})


def regression(*counts: int, dtype: torch.dtype = torch.float64) -> tuple[hs.Problem, list[Tensor]]:
    """y = w x: the summed squared error's Hessian of a batch is 2 X^T X."""
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(b, 3, generator=g).to(dtype) for b in counts]
    model = nn.Linear(3, 1, bias=False).to(dtype)
    return hs.supervised(model, [(X, torch.ones(len(X), 1, dtype=dtype)) for X in inputs], loss="mse"), inputs


def test_a_regression_in_closed_form() -> None:
    problem, inputs = regression(4, 1, 3)
    found = hs.convergence(problem)
    X = torch.cat(inputs)
    assert found.counts.tolist() == [1] * 8
    assert found.kept == list(range(1, 9))
    for s in range(1, 9):
        E = 2 / s * X[:s].T @ X[:s]
        torch.testing.assert_close(found.estimates[s - 1], E)
        assert float(found.norms[s - 1]) == pytest.approx(float(E.norm()), rel=1e-12)
    E = found.estimates
    torch.testing.assert_close(found.changes[1:], (E[1:] - E[:-1]).norm(dim=(1, 2)) / E[1:].norm(dim=(1, 2)))
    torch.testing.assert_close(found.distances, (E - E[-1]).norm(dim=(1, 2)) / E[-1].norm())
    torch.testing.assert_close(found.matrix, hs.block(hs.hessian(problem)).matrix)
    torch.testing.assert_close(found.block(3).matrix, E[2])
    assert found.labels == ["weight[0, 0]", "weight[0, 1]", "weight[0, 2]"]
    assert found.products == 3


@pytest.mark.parametrize("objective", ["nll", "perplexity"])
def test_ragged_batches_against_dense_autograd(objective: str) -> None:
    model = tiny("gpt2")
    problem = hs.causal_lm(model, ragged_batches(), objective=objective)
    space = hs.select(problem, *GLOBS)
    found = hs.convergence(problem, space)
    labelled = [{**batch, "labels": labels_of(batch)} for batch in ragged_batches()]
    singles = [one for b, batch in enumerate(labelled) for one in sequences_in(b, batch)]
    for s in (1, 3, len(singles)):
        dense = causal_lm(model, singles[:s], space)
        expected = dense.hessian if objective == "nll" else dense.perplexity_hessian
        assert relative(found.estimates[s - 1], expected) < 1e-9
    assert relative(found.matrix, hs.block(hs.hessian(problem, space)).matrix) < 1e-12
    assert found.provenance["problem"]["fingerprint"] == problem.fingerprint
    assert torch.isfinite(found.standard_errors[1:]).all() == (objective == "nll")


@pytest.mark.parametrize("objective", ["nll", "perplexity"])
def test_a_gauss_newton_matrix(objective: str) -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches(), objective=objective)
    space = hs.select(problem, *GLOBS)
    found = hs.convergence(problem, space, operator="ggn", keep="none")
    assert relative(found.matrix, hs.block(hs.ggn(problem, space)).matrix) < 1e-11
    assert relative(found.matrix, hs.block(hs.hessian(problem, space)).matrix) > 1e-2


def test_float32_is_the_block_up_to_rounding() -> None:
    problem, _ = regression(5, 2, dtype=torch.float32)
    found = hs.convergence(problem)
    assert found.matrix.dtype == found.estimates.dtype == torch.float32
    assert relative(found.matrix, hs.block(hs.hessian(problem)).matrix) < 1e-6


def test_sequences_without_a_label_change_nothing() -> None:
    ids = torch.randint(3, 37, (3, 6), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[0], labels[2] = -100, -100
    problem = hs.causal_lm(tiny("gpt2"), [{"input_ids": ids, "labels": labels}, {"input_ids": ids[:1] + 1}])
    space = hs.select(problem, *GLOBS)
    found = hs.convergence(problem, space)
    assert found.counts.tolist() == [0, 5, 0, 5]
    assert found.changes[2] == 0
    assert torch.isnan(found.changes[:2]).all()
    assert torch.isnan(found.norms[0])
    assert torch.isnan(found.estimates[0]).all()
    assert torch.equal(found.estimates[1], found.estimates[2])
    assert relative(found.matrix, hs.block(hs.hessian(problem, space)).matrix) < 1e-12


def test_a_loss_that_counts_nothing_is_no_sum_over_sequences() -> None:
    class Penalty:
        def total(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
            return model(batch).square().sum() + 1.0, int(batch.abs().sum() > 0)

    problem = hs.Problem(nn.Linear(2, 1).double(), Penalty(), [torch.ones(1, 2).double(), torch.zeros(1, 2).double()])
    with pytest.raises(hs.HesscopeError, match="Expected sequence 1 to have no loss"):
        hs.convergence(problem)


@pytest.mark.parametrize(
    ("keep", "memory", "expected"),
    [
        ("all", 0, [1, 2, 3, 4, 5]),
        ("none", 10**9, []),
        ([3, 1, 3], 0, [1, 3]),
        ("auto", 10**9, [1, 2, 3, 4, 5]),
        ("auto", 3 * 72, [2, 3, 5]),
        ("auto", 71, []),
    ],
)
def test_what_is_kept(keep: Any, memory: int, expected: list[int], tmp_path: Path) -> None:
    problem, _ = regression(5)
    found = hs.convergence(problem, keep=keep, keep_memory=memory)
    assert found.kept == expected
    assert found.estimates.shape == (len(expected), 3, 3)
    known = (~torch.isnan(found.distances)).nonzero().flatten() + 1
    assert known.tolist() == sorted({*expected, 5})
    assert torch.isfinite(found.changes[1:]).all()
    again = hs.load(found.save(tmp_path / "run"))
    assert torch.equal(again.estimates, found.estimates)
    assert again.kept == expected
    missing = next((s for s in (1, 2, 3, 4) if s not in expected), None)
    if missing:
        with pytest.raises(hs.HesscopeError, match=rf"whose estimate was kept, .*, got {missing}"):
            again.block(missing)


def test_numbers_on_a_logarithmic_scale() -> None:
    assert _spaced(140, 0) == []
    assert _spaced(140, 1) == [140]
    assert _spaced(140, 5) == [3, 7, 19, 52, 140]
    assert len(_spaced(140, 67)) <= 67
    assert _spaced(3, 10) == [1, 2, 3]


@pytest.mark.parametrize("keep", [[0], [6], ["2"], "some"])
def test_what_cannot_be_kept(keep: Any) -> None:
    with pytest.raises(hs.HesscopeError, match="Expected keep to"):
        hs.convergence(regression(5)[0], keep=keep)


def test_more_than_fits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from hesscope.studies import convergence as function

    def short_of(comm: Any, needed: dict[Any, float]) -> tuple[str, float, int] | None:
        return next((("cpu", size, 9 * 24 + 72) for size in needed.values() if size > 9 * 24 + 72), None)

    monkeypatch.setattr(__import__(function.__module__, fromlist=["short_of"]), "short_of", short_of)
    hs.convergence(regression(5)[0], keep=[5])
    with pytest.raises(hs.HesscopeError, match="keep fewer or select fewer coordinates"):
        hs.convergence(regression(5)[0], keep="all")


def test_an_operator_that_is_no_sum() -> None:
    with pytest.raises(hs.HesscopeError, match="Expected an operator that is a sum over sequences, hessian or ggn"):
        hs.convergence(regression(2)[0], operator="fisher")


def test_a_single_sequence_and_a_zero_hessian(tmp_path: Path) -> None:
    one = hs.convergence(regression(1)[0])
    assert one.distances.tolist() == [0.0]
    assert "one sequence" in one.summary()
    flat = hs.Problem(nn.Linear(2, 1), lambda m, x: m(x).sum() / len(x), [torch.ones(3, 2)], count=len)
    found = hs.convergence(flat)
    assert found.changes[1:].tolist() == [0.0, 0.0]
    for result in (one, found):
        assert result.plot(tmp_path / "c.png").stat().st_size > 0


class Parts(nn.Module):
    """Weights of which a sequence uses those whose bit its input's integer part has set."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.ones(())) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        used = [p for k, p in enumerate((self.a, self.b, self.c)) if int(x.sum()) >> k & 1]
        return x * sum(used)


@pytest.mark.parametrize(("inputs", "named"), [((1.0, 2.0, 3.0), "c"), ((1.0, 6.0, 7.0), ""), ((3.0, 7.0), "")])
def test_only_what_no_sequence_uses_is_worth_a_warning(inputs: tuple[float, ...], named: str) -> None:
    problem = hs.supervised(Parts(), [(torch.tensor([[v]]), torch.zeros(1, 1)) for v in inputs], loss="mse")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = hs.convergence(problem)
    said = [str(w.message) for w in caught if issubclass(w.category, hs.HesscopeWarning)]
    assert [f"does not depend on {named}:" in text for text in said] == [True] * bool(named)
    if named:
        torch.testing.assert_close(found.matrix[2], torch.zeros(3))
