"""Pictures of convergence and of a perplexity study: the curves, their guides, the check."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from made_by_hand import spent

from hesscope.figures.style import FAILED, PASSED
from hesscope.results import Convergence, PerplexityStudy


def convergence(S: int, kept: list[int] | None = None, **changes: Any) -> Convergence:
    s = torch.arange(1, S + 1, dtype=torch.float64)
    distances = torch.full((S,), torch.nan, dtype=torch.float64)
    for k in kept or []:
        distances[k - 1] = float((1 / k - 1 / S) ** 0.5)
    errors = torch.where(s > 1, 0.5 / s.sqrt(), torch.inf)
    values = {
        "norms": torch.ones(S).double(),
        "changes": torch.where(s > 1, 0.7 / s, torch.nan),
        "distances": distances,
        "standard_errors": errors,
    }
    return Convergence(**spent(), matrix=torch.eye(2), labels=["w[0]", "w[1]"], asymmetry=0.0, counts=torch.full((S,), 9),
                       kept=kept or [], estimates=torch.zeros(len(kept or []), 2, 2),
                       **values | changes)  # fmt: skip


def study(n: int = 5, residual: float = 1e-9, rounding: float = 1e-6) -> PerplexityStudy:
    values = torch.linspace(-1, 3, n).double()
    return PerplexityStudy(**spent(), hessian=torch.diag(values), perplexity_hessian=torch.diag(4 * values), eigenvalues=values,
                           perplexity_eigenvalues=4 * values, gradient=torch.ones(n).double(),
                           labels=[f"w[{i}]" for i in range(n)], risk=1.4, perplexity=4.05, gradient_norm=1.0,
                           residual=residual, rounding=rounding, rank_ratio=1e-9, angle=0.0)  # fmt: skip


def test_the_curves_are_drawn_with_their_guides(tmp_path: Path, drawn: list[Any]) -> None:
    convergence(20, [1, 5, 20]).plot(tmp_path / "c.png")
    axes = drawn[0].axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    curves = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert [len(line.get_xdata()) for line in curves] == [19, 19, 2]
    change, error = (line for line in axes.lines if line.get_label().startswith("_"))
    for guide, slope in ((change, -1.0), (error, -0.5)):
        (x0, x1), (y0, y1) = guide.get_xdata(), guide.get_ydata()
        assert torch.log(torch.tensor(y1 / y0)) / torch.log(torch.tensor(x1 / x0)) == pytest.approx(slope)
    assert "20" in [t.get_text() for t in axes.get_xticklabels()]


@pytest.mark.parametrize(
    "result",
    [
        convergence(1),
        convergence(2, [1]),
        convergence(3, changes=torch.zeros(3).double(), standard_errors=torch.zeros(3).double()),
        convergence(4, standard_errors=torch.full((4,), torch.nan).double()),
        convergence(4, norms=torch.zeros(4).double(), changes=torch.full((4,), torch.nan).double()),
    ],
    ids=["one", "two", "nothing changes", "no errors", "zero"],
)
def test_short_and_empty_curves(result: Convergence, tmp_path: Path) -> None:
    assert result.plot(tmp_path / "c.png").stat().st_size > 0
    assert result.summary()


@pytest.mark.parametrize(
    ("residual", "rounding", "verdict"),
    [(1e-9, 1e-6, "confirmed"), (1e-3, 1e-6, "refuted"), (0.3, 0.5, "unresolved"), (float("nan"), 1e-6, "refuted")],
)
def test_the_verdict_is_written_and_coloured(
    residual: float, rounding: float, verdict: str, tmp_path: Path, drawn: list[Any]
) -> None:
    result = study(residual=residual, rounding=rounding)
    result.plot(tmp_path / "p.png")
    title = drawn[0].axes[1].get_title(loc="left")
    assert title.endswith(verdict)
    assert result.verdict == verdict
    assert drawn[0].axes[1]._left_title.get_color() == (FAILED if verdict == "refuted" else PASSED)


@pytest.mark.parametrize("n", [1, 5, 200])
def test_both_spectra_are_drawn(n: int, tmp_path: Path, drawn: list[Any]) -> None:
    study(n).plot(tmp_path / "p.svg")
    lines = [line for line in drawn[0].axes[0].lines if not line.get_label().startswith("_")]
    assert [len(line.get_ydata()) for line in lines] == [n, n, n]
    assert list(lines[2].get_ydata()) == sorted(lines[2].get_ydata(), reverse=True)


def test_a_zero_spectrum(tmp_path: Path) -> None:
    nothing = torch.zeros(3).double()
    flat = dataclasses.replace(
        study(3), eigenvalues=nothing, perplexity_eigenvalues=nothing, residual=0.0, rounding=0.0
    )
    assert flat.plot(tmp_path / "p.png").stat().st_size > 0
