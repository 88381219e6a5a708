"""Estimators held to the exact diagonal: the errors are the true ones, and a study goes on where it was stopped."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import hesscope as hs
from hesscope.algorithms.checkpoint import Checkpoint
from hesscope.results import DiagonalStudy
from spectra import Counted, generic

METHODS, BUDGETS = ["hutchinson", "nystrom"], [8, 24]


def study(A: torch.Tensor, **keywords: Any) -> DiagonalStudy:
    return hs.diagonal_study(hs.operator(A), METHODS, BUDGETS, seeds=2, **keywords)


def test_every_cell_is_that_estimates_own_error() -> None:
    A = generic(40) + torch.eye(40)
    d = A.diagonal()
    found = study(A)
    torch.testing.assert_close(found.exact, d)
    for m, method in enumerate(METHODS):
        for b, budget in enumerate(BUDGETS):
            for s in range(2):
                alone = hs.diagonal(hs.operator(A), method, budget=budget, seed=s)
                low, high = alone.interval()
                true = float((alone.flat() - d).norm() / d.norm())
                assert float(found.relative_errors[m, b, s]) == pytest.approx(true, rel=1e-9)
                assert float(found.stated[m, b, s]) == pytest.approx(alone.relative_error, rel=1e-9)
                covered = ((low["x"] <= d) & (d <= high["x"])).double().mean()
                assert float(found.coverage[m, b, s]) == pytest.approx(float(covered))


def test_what_is_given_is_not_computed_and_references_are_compared() -> None:
    A = generic(40) + torch.eye(40)
    counted = Counted(A)
    found = hs.diagonal_study(counted.operator(), METHODS, BUDGETS, exact=A.diagonal(), seeds=1,
                              references={"twice": 2 * A.diagonal()})  # fmt: skip
    assert counted.columns == found.products == sum(BUDGETS) * len(METHODS)
    assert found.references == {"twice": pytest.approx(1.0)}
    assert "twice: relative error 1" in found.summary()
    assert study(A).products == 40 + 2 * 2 * sum(BUDGETS)


def test_the_diagonal_of_another_operator_is_no_truth() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    problem = hs.supervised(model, [(torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2)])
    H, G = hs.hessian(problem), hs.ggn(problem)
    easy: dict[str, Any] = {"methods": ["hutchinson"], "budgets": [8], "seeds": 1}
    own, other = hs.diagonal(H, "exact"), hs.diagonal(G, "exact")
    with pytest.raises(hs.HesscopeError, match=r"operator ggn.* -> hessian"):
        hs.diagonal_study(H, exact=other, **easy)
    alone = hs.diagonal_study(H, **easy)
    by_another_way = hs.diagonal(hs.hessian(problem, engine="finite-difference"), "exact")
    for truth in (own, by_another_way):
        found = hs.diagonal_study(H, exact=truth, references={"Gauss-Newton": other}, **easy)
        assert float(found.mean_errors) == pytest.approx(float(alone.mean_errors), rel=1e-4)
        gap = (other.flat() - own.flat()).norm() / own.flat().norm()
        assert found.references["Gauss-Newton"] == pytest.approx(float(gap), rel=1e-4)
    hs.diagonal_study(H, exact=other.flat(), **easy)


def test_it_goes_on_with_the_next_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    A = generic(40) + torch.eye(40)
    whole = study(A)
    module = importlib.import_module("hesscope.algorithms.diagonal_study")
    made = module.estimator
    cells: list[str] = []

    def stopping(H: Any, method: str, *rest: Any) -> Any:
        cells.append(method)
        if len(cells) == 5:
            raise KeyboardInterrupt
        return made(H, method, *rest)

    monkeypatch.setattr(module, "estimator", stopping)
    kept = Checkpoint(tmp_path / "kept", every=0.0)
    with pytest.raises(KeyboardInterrupt):
        study(A, checkpoint=kept)
    resumed = study(A, checkpoint=kept)
    assert torch.equal(resumed.relative_errors, whole.relative_errors)
    assert len(cells) < 2 * 8 + 1
    assert resumed.products == whole.products


def test_it_does_not_go_on_with_another_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    A = generic(40) + torch.eye(40)
    module = importlib.import_module("hesscope.algorithms.diagonal_study")
    made, cells = module.estimator, []

    def stopping(H: Any, method: str, *rest: Any) -> Any:
        cells.append(method)
        if len(cells) == 2:
            raise KeyboardInterrupt
        return made(H, method, *rest)

    monkeypatch.setattr(module, "estimator", stopping)
    kept = Checkpoint(tmp_path / "kept", every=0.0)
    with pytest.raises(KeyboardInterrupt):
        study(A, exact=A.diagonal(), checkpoint=kept)
    with pytest.raises(hs.HesscopeError, match="of another run: exact "):
        study(A, exact=2 * A.diagonal(), checkpoint=kept)
    whole = study(A, exact=A.diagonal())
    assert study(A, exact=A.diagonal(), checkpoint=kept).relative_errors.equal(whole.relative_errors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["exact"]}, "methods among auto, hutchinson"),
        ({"methods": []}, "got none"),
        ({"budgets": [3]}, "at least 4 products"),
        ({"budgets": []}, "got none"),
        ({"seeds": 0}, "at least 1 seed"),
        ({"exact": torch.ones(4)}, "'exact' to have 5 entries"),
        ({"references": {"other": torch.ones(4)}}, "'other' to have 5 entries"),
    ],
)
def test_impossible_studies_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        hs.diagonal_study(hs.operator(torch.eye(5)), **arguments)


@pytest.mark.parametrize(
    "A", [generic(30) + torch.eye(30), torch.zeros(5, 5), torch.eye(9)], ids=["any", "zero", "unit"]
)
def test_its_figure_is_drawn_and_it_comes_back(A: torch.Tensor, tmp_path: Path) -> None:
    found = study(A, references={"nothing": torch.zeros(len(A))})
    assert found.plot(tmp_path / "study.png").stat().st_size > 0
    again = hs.load(found.save(tmp_path / "study"))
    assert torch.equal(again.relative_errors, found.relative_errors)
    assert again.summary() == found.summary()
    assert again.row("nystrom") == found.row("nystrom")
