"""A warm start finds what the earlier vectors lack as surely as a cold one; eigenvalues of a diagonal are its oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hesscope as hs
from hesscope.algorithms.eigs import Search
from hesscope.algorithms.emergence import points
from hesscope.integrations import CurvatureCallback


def spectrum(n: int, leading: list[float], new: float | None = None, width: float = 1.0) -> Tensor:
    """Leading eigenvalues first, a new one in the last place, and a bulk uniform on [-width, width]."""
    values = width * (2 * torch.rand(n, generator=torch.Generator().manual_seed(0)) - 1)
    values[: len(leading)] = torch.tensor(leading)
    if new is not None:
        values[-1] = new
    return values


def diagonal(values: Tensor) -> hs.Operator:
    return hs.operator(lambda X: values[:, None] * X, size=len(values), dtype=torch.float32)


def first(n: int, k: int) -> Tensor:
    """The leading eigenvectors of `spectrum`, to which the new one is exactly orthogonal."""
    return torch.eye(n, k)


@pytest.mark.parametrize("tol", [1e-4, 1e-3, 0.02])
def test_a_new_largest_eigenvalue_is_found_among_many_coordinates(tol: float) -> None:
    n = 100_000
    found = hs.eigs(diagonal(spectrum(n, [2.9], 3.1)), k=1, which="LA", tol=tol, start=first(n, 1))
    assert found.converged
    assert float(found.eigenvalues[0]) == pytest.approx(3.1, rel=tol)


@pytest.mark.parametrize("n", [10_000, 200_000])
def test_a_new_one_before_three_is_found_at_a_loose_tolerance(n: int) -> None:
    found = hs.eigs(diagonal(spectrum(n, [3.0, 2.5, 2.0], 4.0)), k=3, which="LA", tol=0.02, start=first(n, 3))
    assert found.eigenvalues.tolist() == pytest.approx([4.0, 3.0, 2.5], rel=0.02)


@pytest.mark.parametrize("bounded", [{}, {"max_basis": 9}])
@pytest.mark.parametrize(
    ("which", "leading", "new"),
    [
        ("LA", [3.0, 2.5], 3.1),
        ("LA", [3.0, 2.5], 2.7),
        ("SA", [-3.0, -2.5], -3.1),
        ("LM", [3.0, 2.5], -2.8),
        ("LM", [3.0, -2.5], 3.3),
        ("BE", [3.0, -2.5], -2.8),
        ("BE", [3.0, -2.5], 3.2),
    ],
)
def test_a_new_one_at_any_wanted_end_is_found(
    which: str, leading: list[float], new: float, bounded: dict[str, Any]
) -> None:
    n, tol = 10_000, 1e-3
    for width in (0.05, 1.0):
        H = diagonal(spectrum(n, leading, new, width))
        warm = hs.eigs(H, k=2, which=which, tol=tol, start=first(n, 2), **bounded)
        cold = hs.eigs(H, k=2, which=which, tol=tol, **bounded)
        assert warm.converged
        assert bool(((warm.eigenvalues - new).abs() < 2 * tol * abs(new)).any())
        torch.testing.assert_close(warm.eigenvalues, cold.eigenvalues, rtol=2 * tol, atol=0)


def test_one_of_both_ends_is_the_upper_one() -> None:
    """Nothing is looked for below it: what lies there is not wanted, and is not resolved for long."""
    n = 2000
    H = diagonal(spectrum(n, [1.02]))
    found, upper = (hs.eigs(H, k=1, which=which, start=first(n, 1)) for which in ("BE", "LA"))
    assert found.converged
    assert (found.products, float(found.eigenvalues)) == (upper.products, float(upper.eigenvalues))


def test_what_has_hardly_moved_costs_fewer_products_than_from_random() -> None:
    """In all, over several searches: where the bulk is far away a cold one needs hardly more than a new direction would."""
    n, angle = 20_000, 0.03
    spent = {"warm": 0, "cold": 0}
    for k in (1, 3, 5):
        H = diagonal(spectrum(n, [3.0 - 0.3 * i for i in range(k)]))
        turned = torch.randn(n, k, generator=torch.Generator().manual_seed(1)) / n**0.5
        for seed in range(3):
            warm = hs.eigs(H, k=k, which="LA", seed=seed, start=first(n, k) + angle * turned)
            cold = hs.eigs(H, k=k, which="LA", seed=seed)
            assert warm.converged
            assert warm.products <= cold.products
            spent = {"warm": spent["warm"] + warm.products, "cold": spent["cold"] + cold.products}
    assert spent["warm"] < 0.93 * spent["cold"]


@pytest.mark.parametrize("rounded", [{}, {"basis_dtype": "float16"}])
def test_too_few_products_to_see_what_is_new_are_not_called_converged(rounded: dict[str, Any]) -> None:
    n = 10_000
    with pytest.warns(hs.HesscopeWarning, match="may still be hidden"):
        found = hs.eigs(diagonal(spectrum(n, [2.9], 3.1)), k=1, tol=0.02, max_products=7, start=first(n, 1), **rounded)
    assert not found.converged


def test_a_track_follows_an_eigenvalue_that_overtakes() -> None:
    n = 10_000
    chain = {f"{x:.1f}": diagonal(spectrum(n, [3.0], x)) for x in (2.0, 2.5, 3.5, 4.0)}
    found = hs.track_eigs(chain, k=1, which="LA", tol=0.02)
    assert found.sharpness.tolist() == pytest.approx([3.0, 3.0, 3.5, 4.0], rel=0.02)


def test_the_callback_follows_an_eigenvalue_that_overtakes() -> None:
    own = CurvatureCallback(None)
    for x in (2.0, 2.5, 3.3, 4.0, 4.0):
        found = own._largest(diagonal(spectrum(10_000, [3.0], x)), "sharpness")
        assert found["sharpness"] == pytest.approx(max(3.0, x), rel=0.02)


def test_a_stopped_warm_search_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state holds what was raised before a restart."""
    n, step, made = 2000, Search.step, []
    values = spectrum(n, [3.0, 2.5], 3.1)
    how: dict[str, Any] = {"k": 2, "which": "LA", "max_basis": 6, "start": first(n, 2)}
    whole = hs.eigs(diagonal(values), **how)

    def stops(self: Search) -> None:
        made.append(self)
        if len(made) == 9:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr("hesscope.algorithms.checkpoint.Checkpoint.is_due", lambda self, last: True)
        patch.setattr(Search, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            hs.eigs(diagonal(values), **how, checkpoint=tmp_path / "state")
    resumed = hs.eigs(diagonal(values), **how, checkpoint=tmp_path / "state")
    assert resumed.provenance["resumed"] == 1
    assert torch.equal(resumed.eigenvalues, whole.eigenvalues)
    assert resumed.products == whole.products


def test_points_are_beyond_and_between_what_was_found() -> None:
    found = torch.tensor([3.0, 2.0], dtype=torch.float64)
    assert points(found, "LA", 0.0) == pytest.approx([2.5, 3.03])
    assert points(-found, "SA", 0.0) == pytest.approx([-2.5, -3.03])
    assert points(found, "LM", 0.0) == pytest.approx([2.5, 3.03, -2.03])
    assert points(torch.tensor([3.0, -2.0]), "BE", 0.0) == pytest.approx([3.03, -2.03])
    assert points(torch.tensor([3.0]), "BE", 0.0) == pytest.approx([3.03])
