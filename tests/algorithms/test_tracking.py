"""Eigenpairs over checkpoints: subspaces with known angles, warm starts, one selection, runs that go on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hesscope as hs
from hesscope.algorithms import tracking
from spectra import symmetric

SPECTRUM = [9.0, 7.0, 5.0, *torch.linspace(-1, 1, 37).tolist()]


def rotated(A: Tensor, angle: float, i: int, j: int) -> Tensor:
    """A with its eigenvectors i and j (of the ascending order) turned into each other."""
    values, V = torch.linalg.eigh(A)
    c, s = math.cos(angle), math.sin(angle)
    W = V.clone()
    W[:, i], W[:, j] = c * V[:, i] + s * V[:, j], c * V[:, j] - s * V[:, i]
    return W @ values.diag() @ W.T


def test_overlaps_and_angles_are_those_that_were_put_in() -> None:
    A = symmetric(SPECTRUM)
    chain = {"a": A, "b": rotated(A, 0.3, -1, 0), "c": rotated(rotated(A, 0.3, -1, 0), 0.7, -3, 5)}
    found = hs.track_eigs({name: hs.operator(B) for name, B in chain.items()}, k=3, tol=1e-9)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([[9.0, 7.0, 5.0]] * 3).double(), rtol=1e-8, atol=0)
    torch.testing.assert_close(found.angles[0], torch.tensor([0.0, 0.0, 0.3]).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.angles[1], torch.tensor([0.0, 0.0, 0.7]).double(), rtol=0, atol=1e-6)
    expected = [(2 + math.cos(x) ** 2) / 3 for x in (0.3, 0.7)]
    assert found.overlaps.tolist() == pytest.approx(expected, abs=1e-9)
    assert found.sharpness.tolist() == pytest.approx([9.0] * 3)


MIXED = [8.0, 5.0, -9.0, -7.0, *torch.linspace(-1, 1, 36).tolist()]
#: {which: {k: the sharpness of spectra MIXED and -MIXED}}; by magnitude the leading two are negative at first, then positive.
SHARPNESS: dict[str, dict[int, list[float]]] = {
    "LM": {1: [math.nan, 9.0], 2: [8.0, 9.0], 3: [8.0, 9.0]},
    "LA": {1: [8.0, 9.0], 2: [8.0, 9.0]},
    "BE": {2: [8.0, 9.0]},
    "SA": {2: [math.nan, math.nan]},
}


@pytest.mark.parametrize(("which", "k"), [(which, k) for which, ks in SHARPNESS.items() for k in ks])
def test_sharpness_is_the_largest_eigenvalue_and_never_a_negative_one_of_large_magnitude(which: str, k: int) -> None:
    chain = {"a": hs.operator(symmetric(MIXED)), "b": hs.operator(-symmetric(MIXED))}
    found = hs.track_eigs(chain, k=k, which=which, tol=1e-9)
    assert found.sharpness.tolist() == pytest.approx(SHARPNESS[which][k], rel=1e-8, nan_ok=True)
    assert ("sharpness unknown at 1 of 2 checkpoints" in found.summary()) == (which == "LM" and k == 1)


def test_turning_inside_the_leading_subspace_is_no_turning() -> None:
    A = symmetric(SPECTRUM)
    found = hs.track_eigs({"a": hs.operator(A), "b": hs.operator(rotated(A, 0.5, -1, -2))}, k=3, tol=1e-9)
    assert found.overlaps.tolist() == pytest.approx([1.0], abs=1e-9)


def test_a_warm_start_saves_products_and_says_how_many() -> None:
    A = symmetric(SPECTRUM)
    near = {f"step {i}": hs.operator(rotated(A, 0.01 * i, -1, 4)) for i in range(3)}
    found = hs.track_eigs(near, k=3, tol=1e-3, cold=True)
    alone = [hs.eigs(H, k=3, tol=1e-3).products for H in near.values()]
    assert found.cold == alone
    assert found.saved == [c - s for c, s in zip(alone, found.spent, strict=True)]
    assert found.saved[0] == 0
    assert min(found.saved[1:]) > 0
    assert found.products == sum(found.spent) + sum(found.cold[1:])
    assert f"warm starts saved {sum(found.saved)} of {sum(alone[1:])} products" in found.summary()
    plain = hs.track_eigs(near, k=3, tol=1e-3)
    assert (plain.spent, plain.saved) == (found.spent, [])
    assert plain.products == sum(plain.spent)


def test_models_are_made_one_after_another() -> None:
    order: list[str] = []

    def make(name: str) -> Any:
        return lambda: order.append(name) or hs.operator(symmetric(SPECTRUM))

    hs.track_eigs({name: make(name) for name in "abc"}, k=2)
    assert order == ["a", "b", "c"]


def model(seed: int, hidden: int = 4) -> hs.Problem:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(3, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 2)).double()
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(b, 3, generator=g, dtype=torch.float64), torch.arange(b) % 2) for b in (2, 5)]
    return hs.supervised(net, batches)


def single() -> hs.Problem:
    torch.manual_seed(0)
    return hs.supervised(torch.nn.Linear(3, 2), [(torch.ones(2, 3), torch.tensor([0, 1]))])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            lambda: hs.hessian(model(1, 5), hs.select(model(1, 5), "0.weight")),
            "0.weight has the shapes [4, 3] and [5, 3]",
        ),
        (lambda: hs.hessian(model(1), hs.select(model(1), "0.*")), "0.bias is selected in one only"),
        (lambda: hs.hessian(model(1), hs.select(model(1), {"0.weight": [0, 2]})), "other entries of 0.weight"),
    ],
)
def test_unequal_selections_are_one_sentence(other: Any, said: str) -> None:
    first = model(0)
    with pytest.raises(hs.HesscopeError, match="one selection at all checkpoints") as error:
        hs.track_eigs({"a": hs.hessian(first, hs.select(first, "0.weight")), "b": other}, k=1)
    assert said in str(error.value)


def test_no_operators_are_refused() -> None:
    with pytest.raises(hs.HesscopeError, match="at least one operator"):
        hs.track_eigs({})


# ---- a folder


def run(folder: Path, seeds: str = "012", **more: Any) -> hs.results.EigsTrack:
    return hs.track_eigs({f"step {s}": (lambda s=s: hs.hessian(model(int(s)))) for s in seeds}, folder=folder, **{"k": 2, "tol": 1e-4, **more})  # fmt: skip


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(t, other.tensors()[name]) for name, t in one.tensors().items()) and one.spent == other.spent


def test_what_is_done_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    calls = []

    def third_fails(H: hs.Operator, **more: Any) -> Any:
        calls.append(H)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return hs.eigs(H, **more)

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "eigs", third_fails)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["step-0", "step-1"]
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "eigs", lambda H, **more: calls.append(H) or hs.eigs(H, **more))
        again = run(tmp_path / "out")
    assert len(calls) == 1
    assert same(again, whole)
    assert hs.load(tmp_path / "out" / "step-2").eigenvalues.equal(whole.eigenvalues[2])


def test_another_runs_eigenpairs_are_not_taken(tmp_path: Path) -> None:
    run(tmp_path)
    for more in ({"k": 1}, {"seed": 1}, {"tol": 1e-5}, {"seeds": "102"}, {"max_basis": 5}):
        with pytest.raises(hs.HesscopeError, match="holds another run"):
            run(tmp_path, **more)
    assert run(tmp_path, k=1, restart=True).eigenvalues.shape == (3, 1)
    assert hs.load(tmp_path / "step-0").eigenvalues.shape == (1,)


def test_eigenpairs_of_another_method_are_not_taken(tmp_path: Path) -> None:
    power: dict[str, Any] = {"method": "power"}
    ways = [{}, power, power | {"momentum": 0.1}, power | {"batches": 1}, power | {"batches": 2}]
    for i, how in enumerate(ways):
        easy = {"k": 1, "tol": 10.0, "max_products": 10}
        found = run(tmp_path / str(i), "0", **easy, **how)
        assert same(run(tmp_path / str(i), "0", **easy, **how), found)
        for other in ways[:i] + ways[i + 1 :]:
            with pytest.raises(hs.HesscopeError, match="holds another run"):
                run(tmp_path / str(i), "0", **easy, **other)


def _diagonal(*entries: float) -> hs.Operator:
    return hs.operator(torch.diag(torch.tensor(entries, dtype=torch.float64)))


def _function(*entries: float) -> hs.Operator:
    d = torch.tensor(entries, dtype=torch.float64)
    return hs.operator(lambda X: d[:, None] * X, size=len(d), dtype=torch.float64)


#: {what: (an operator, another, what is said of them)}
OPERATORS: dict[str, Any] = {
    "matrix": (lambda: _diagonal(3, 1, 0.5), lambda: _diagonal(7, 1, 0.5), "operator"),
    "order of a matrix": (lambda: _diagonal(3, 1, 0.5), lambda: _diagonal(1, 3, 0.5), "operator"),
    "function": (lambda: _function(3, 1, 0.5), lambda: _function(1, 3, 0.5), "matrix"),
    "labels": (lambda: hs.fisher(model(0), seed=0), lambda: hs.fisher(model(0), seed=5), "seed 5"),
    "factor": (lambda: hs.hessian(model(0)) * 1.0, lambda: hs.hessian(model(0)) * 10.0, "factor"),
    "per": (lambda: hs.fisher(model(0)), lambda: hs.fisher(model(0), per="sequence"), "per token"),
    "precision": (
        lambda: hs.hessian(single()),
        lambda: hs.hessian(single(), precision="bfloat16"),
        "precision None ->",
    ),
}


@pytest.mark.parametrize("what", OPERATORS)
def test_another_operators_eigenpairs_are_not_taken(what: str, tmp_path: Path) -> None:
    one, other, said = OPERATORS[what]
    easy: dict[str, Any] = {"k": 1, "tol": 0.5, "folder": tmp_path}
    found = hs.track_eigs({"a": one()}, **easy)
    with pytest.raises(hs.HesscopeError, match="holds another run") as error:
        hs.track_eigs({"a": other()}, **easy)
    assert said in str(error.value)
    assert same(hs.track_eigs({"a": one()}, **easy), found)
    alone = hs.eigs(other(), k=1, tol=0.5)
    assert hs.track_eigs({"a": other()}, **easy, restart=True).eigenvalues[0].equal(alone.eigenvalues)


def test_eigenpairs_of_a_rounded_basis_are_not_taken(tmp_path: Path) -> None:
    run(tmp_path, "0", tol=0.5, basis_dtype="bfloat16")
    with pytest.raises(hs.HesscopeError, match="basis_dtype bfloat16 -> None"):
        run(tmp_path, "0", tol=0.5)


def test_eigenpairs_of_a_folder_that_does_not_say_of_what_are_not_taken(tmp_path: Path) -> None:
    hs.eigs(_diagonal(3, 1, 0.5), k=1).save(tmp_path / "a")
    with pytest.raises(hs.HesscopeError, match="does not say of which"):
        hs.track_eigs({"a": _diagonal(3, 1, 0.5)}, k=1, folder=tmp_path)


def test_names_that_give_one_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(hs.HesscopeError, match="different folders"):
        hs.track_eigs({"a b": hs.operator(torch.eye(2)), "a-b": hs.operator(torch.eye(2))}, folder=tmp_path)
