"""Key numbers: the right ones, with their errors, and the same for the terminal and for the page."""

from __future__ import annotations

import io

import pytest
import torch
from made_by_hand import (
    block,
    comparison,
    density,
    diagonal,
    eigenpairs,
    lanczos,
    provenance,
    structure,
    trace,
    verification,
)
from rich.console import Console

from hesscope.report import key_number_table, key_numbers
from hesscope.results import Result

NODES, WEIGHTS = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.5], [0.4, 0.6]])


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (trace([3.0, 5.0, 4.0]), [("Trace", "4.00", "± 0.58 (95%: 1.516 to 6.484)")]),
        (trace([3.0, 5.0], "exact"), [("Trace", "8.0000", "exact")]),
        (trace([3.0]), [("Trace", "3.000", "± ∞ (95%: −∞ to ∞)")]),
        (
            trace([3e-7, 5e-7, 4e-7]),
            [("Trace", "4.00e−7", "± 0.58e−7 (95%: 1.516e−07 to 6.484e−07)")],
        ),
        (
            eigenpairs([-5.0, 2.0], [1e-6, 2e-6]),
            [
                ("Largest eigenvalue", "2.000", "residual 2.0e-06"),
                ("Most negative eigenvalue found", "−5.000", "residual 1.0e-06"),
            ],
        ),
        (
            eigenpairs([2.0], [0.5], converged=False),
            [("Largest eigenvalue", "2.000", "residual 5.0e-01; not all converged")],
        ),
        (
            block(torch.tensor([[1.0, -7.0], [-7.0, 2.0]])),
            [("Largest entry of the 2 × 2 block", "−7.000", "asymmetry 1.0e-07"), ("Its trace", "3.000", "exact")],
        ),
        (
            diagonal({"a": torch.tensor([[1.0, -2.0]]), "b": torch.tensor([3.0, 6.0])}),
            [
                ("Mean of the diagonal", "2.000", "exact"),
                ("Largest diagonal entry", "6.000", "exact"),
                ("Negative diagonal entries", "25%", "exact"),
            ],
        ),
        (
            density(NODES, WEIGHTS),
            [
                ("Trace from the spectral density", "55.0", "± 5.0"),
                ("Reach of the quadrature nodes", "0 to 1.000", "inside the spectrum"),
            ],
        ),
        (lanczos([-1.0, 2.0], [0.5, 0.5]), [("Reach of 2 Lanczos nodes", "−1.000 to 2.000", "residual norm 1.0e-01")]),
        (
            structure(torch.diag(torch.tensor([4.0, -1.0, 1.0, 0.0])), {"0.a": (1, 0), "1.a": (1, 1)}),
            [
                ("Energy inside blocks", "100%", "chance 50%"),
                ("Energy on the diagonal", "100%", "chance 25%"),
                ("Negative eigenvalues", "25%", "17% of the absolute trace; 1 of 4 zero to rounding"),
                ("Condition above rounding", "4.00", "effective rank 2.38"),
            ],
        ),
        (
            comparison(one=structure(torch.ones(4, 4), {"0.a": (1, 0), "1.a": (1, 1)})),
            [("Energy inside blocks, one", "50%", "chance 50%")],
        ),
        (verification([1e-4, 1e-2], [1e-3, 1e-3]), [("Checks passed", "1 of 2", "worst at 10 × its limit")]),
        (verification([float("nan")], [1e-3]), [("Checks passed", "0 of 1", "some are not finite")]),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_numbers_and_errors(result: Result, expected: list[tuple[str, str, str]]) -> None:
    assert [row[:3] for row in key_numbers([result])] == expected


def test_cost_stands_on_the_first_row_only() -> None:
    costs = [row[3] for row in key_numbers([eigenpairs([3.0, 1.0], [0.0, 0.0]), trace([1.0, 2.0], units=0.0)])]
    assert costs == ["6 products, 40 passes, 1.5 s", "", "6 products, 1.5 s"]


def test_selections_are_told_apart_where_they_differ() -> None:
    one, other = trace([1.0, 2.0]), trace([1.0, 2.0], provenance=provenance(selection={"lm_head.weight": [3]}))
    assert [row[0] for row in key_numbers([one, one])] == ["Trace", "Trace"]
    assert key_numbers([one, other])[1][0] == "Trace, lm_head.weight (3)"


def shown(results: list[Result]) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(key_number_table(results))
    return out.getvalue()


def test_the_terminal_shows_the_same_numbers_and_the_units() -> None:
    results = [trace([3.0, 5.0, 4.0]), eigenpairs([-5.0, 2.0], [1e-6, 2e-6])]
    text = shown(results)
    for row in key_numbers(results):
        assert all(cell in text for cell in row)
    assert "nats per squared weight" in text


def test_brackets_in_names_are_text_and_not_markup() -> None:
    named = [trace([1.0, 2.0], provenance=provenance(selection={name: [2]})) for name in ("w[bold]x[/bold]", "[red]v")]
    text = shown(list(named))
    assert "w[bold]x[/bold]" in text
    assert "[red]v" in text
