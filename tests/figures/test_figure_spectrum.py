"""Spectra: signs, error bars, what did not converge, and which eigenvalues stand apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_by_hand import density, eigenpairs, lanczos
from matplotlib.colors import to_rgba

from hesscope.figures.style import NEGATIVE, POSITIVE
from hesscope.results.outliers import outliers


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(
    ("values", "residuals"),
    [
        ([5.0, -3.0, 1.0], [1e-6, 0.0, 1e-9]),
        ([2.0], [1e-8]),
        ([-1.0, -2.0], [1e-8, 1e-8]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([1e4, -1e-3], [1e-2, 1e-9]),
        (list(np.linspace(9, -9, 40)), [1e-5] * 40),
    ],
    ids=["mixed", "one", "negative only", "zero", "many decades", "many"],
)
def test_eigenvalues_are_drawn(values: list[float], residuals: list[float], tmp_path: Path, drawn: list[Any]) -> None:
    eigenpairs(values, residuals).plot(tmp_path / "e.png")
    upper, lower = drawn[0].axes
    points = upper.collections[-1]
    assert np.allclose(points.get_offsets()[:, 1], values)
    signs = {to_rgba(POSITIVE): 1, to_rgba(NEGATIVE): -1}
    assert [signs.get(tuple(c), 0) for c in points.get_edgecolors()] == np.sign(values).tolist()
    assert "nats per squared weight" in upper.get_ylabel()
    assert lower.get_yscale() == "log"
    assert upper.get_yscale() == ("symlog" if max(values) == 1e4 else "linear")


def test_an_eigenvalue_that_missed_the_tolerance_is_open_and_said(tmp_path: Path, drawn: list[Any]) -> None:
    eigenpairs([5.0, -3.0, 2.0], [1e-6, 0.1, float("nan")], converged=False).plot(tmp_path / "e.png")
    faces = drawn[0].axes[0].collections[-1].get_facecolors()
    assert [tuple(face) == (1.0, 1.0, 1.0, 1.0) for face in faces] == [False, True, True]
    assert any("2 of 3 missed the tolerance" in text.get_text() for text in drawn[0].texts)


def test_error_bars_have_the_length_of_the_residuals(tmp_path: Path, drawn: list[Any]) -> None:
    eigenpairs([5.0, -3.0], [0.5, 0.25], converged=False).plot(tmp_path / "e.png")
    bars = drawn[0].axes[0].containers[0].lines[2][0].get_segments()
    assert [float(bar[1, 1] - bar[0, 1]) for bar in bars] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [([-1.0, 0.0, 2.0], [0.1, 0.9, 1e-9]), ([3.0], [1.0]), ([-2.0, -1.0], [1.0, 0.0]), ([0.0], [1.0])],
)
def test_lanczos_weights_are_on_a_logarithmic_axis(
    nodes: list[float], weights: list[float], tmp_path: Path, drawn: list[Any]
) -> None:
    lanczos(nodes, weights).plot(tmp_path / "l.png")
    axes = drawn[0].axes[0]
    assert axes.get_yscale() == "log"
    assert len(axes.collections[-1].get_offsets()) == sum(w > 0 for w in weights)


def spiked(probes: int, jitter: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """A bulk that every probe samples elsewhere, two eigenvalues above it and one below."""
    random = torch.Generator().manual_seed(0)
    bulk = torch.rand(probes, 12, generator=random).sort(1).values
    spikes = torch.tensor([-4.0, 6.0, 9.0]) + jitter * torch.randn(probes, 3, generator=random)
    weights = torch.cat([torch.full((probes, 12), 0.97 / 12), torch.full((probes, 3), 0.01)], 1)
    return torch.cat([bulk, spikes], 1).double(), weights.double()


def test_outliers_are_found_at_both_ends_and_named(tmp_path: Path, drawn: list[Any]) -> None:
    nodes, weights = spiked(4)
    above, below = outliers(nodes.numpy(), weights.numpy(), 100)
    assert np.allclose([o.value for o in above], [9.0, 6.0], atol=1e-4)
    assert np.allclose([o.value for o in below], [-4.0], atol=1e-4)
    density(nodes, weights).plot(tmp_path / "d.png")
    assert {"9.00", "6.00", "−4.00"} <= set(texts(drawn[0].axes[0]))


def test_probes_that_disagree_and_heavy_nodes_are_no_outliers() -> None:
    nodes, weights = spiked(4, jitter=1.0)
    assert outliers(nodes.numpy(), weights.numpy(), 100) == ([], [])
    nodes, weights = spiked(4)
    assert outliers(nodes.numpy(), weights.numpy(), 10_000) == ([], [])


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        (torch.tensor([[-1.0, 0.0, 2.0]]), torch.tensor([[0.1, 0.8, 0.1]])),
        (torch.zeros(3, 1), torch.ones(3, 1)),
        (torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])),
        (torch.tensor([[-3.0, -1.0], [-2.5, -1.1]]), torch.tensor([[0.5, 0.5], [0.4, 0.6]])),
    ],
    ids=["one probe", "zero matrix", "identity", "negative only"],
)
def test_densities_are_drawn(nodes: torch.Tensor, weights: torch.Tensor, tmp_path: Path, drawn: list[Any]) -> None:
    density(nodes, weights).plot(tmp_path / "d.png")
    upper, lower = drawn[0].axes
    assert upper.get_yscale() == "log"
    assert len(lower.collections) == len(nodes)
    assert [len(row.get_offsets()) for row in lower.collections] == (weights > 0).sum(1).tolist()
    assert "nats per squared weight" in lower.get_xlabel()


def test_the_title_has_the_trace_and_its_error(tmp_path: Path, drawn: list[Any]) -> None:
    density(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.5], [0.4, 0.6]])).plot(tmp_path / "d.png")
    assert drawn[0].texts[0].get_text() == "Spectral density of the Hessian, trace 55.0 ± 5.0"
