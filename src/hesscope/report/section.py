"""One result's part of a report, and what its picture means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hesscope.figures.subject import unit
from hesscope.results import Result

_TITLES = {
    "block": "Exact block",
    "convergence": "How the block settles",
    "density": "Spectral density",
    "diagonal": "Diagonal",
    "eigs": "Eigenvalues",
    "lanczos": "Lanczos quadrature",
    "perplexity-study": "Perplexity against its logarithm",
    "structure": "Structure",
    "structure-comparison": "Structures compared",
    "trace": "Trace",
    "verify": "Verification",
}
_MEANINGS = {
    "block": "Every second derivative between two of the selected weights: vermilion is positive, blue negative and white "
    "zero, on a scale that is logarithmic beyond a small linear part.",
    "convergence": "How far each further sequence moved the block, and how far the block is expected to be from that of "
    "endless text; the first falls as one over the number of sequences, the second as one over its square root.",
    "density": "How the eigenvalues are distributed, on a logarithmic scale: a bulk near zero and, marked by triangles, "
    "eigenvalues apart from it; below it are each probe's quadrature nodes, which are the result.",
    "diagonal": "The second derivative in every single weight, in the weight's own shape and as a histogram; methods that "
    "prune or quantise read these as sensitivities.",
    "eigs": "The second derivatives along the directions found, positive upwards and negative downwards; below are the "
    "measured residuals, which bound the distance to an exact eigenvalue.",
    "lanczos": "The nodes and weights of the quadrature that the start vector's Krylov space gives; heavy nodes are where "
    "that vector meets much of the spectrum.",
    "perplexity-study": "The spectra of the Hessians of the mean loss and of its exponential, and the check that they differ, "
    "after scaling, by a matrix of rank one along the gradient.",
    "structure": "Where the block has its energy, the sum of squared entries: a map of the typical entry between every two "
    "layers, the shares on the diagonal, within rows, layers and blocks and across blocks, with the shares that chance would "
    "give in the thin strip, and all eigenvalues in order.",
    "structure-comparison": "The shares of energy of several matrices, each above the thin strip that chance would give, and "
    "their spectra relative to the largest magnitude.",
    "trace": "The sum of all second derivatives, with single probes as points; the band is the 95% interval of the running "
    "mean, and an exact trace is shown as a running sum.",
    "verify": "Every check of the operator against another way to the same number; a bar that passes its black mark has "
    "failed.",
}


@dataclass(frozen=True)
class Section:
    """A title, what the picture means, the result, and the picture's file (.png or .svg)."""

    title: str
    explanation: str
    result: Result
    figure: Path


def section(result: Result, figure: Path, title: str | None = None) -> Section:
    """A section with the title and the explanation that results of this kind usually have."""
    return Section(title or _TITLES.get(result.kind, result.kind.capitalize()), explain(result), result, figure)


def explain(result: Result) -> str:
    """What this kind of picture means, and its units."""
    meaning = _MEANINGS.get(result.kind, "")
    if result.kind == "verify":
        return f"{meaning} Discrepancies are relative and have no unit."
    if result.kind == "structure-comparison":
        return f"{meaning} Shares and relative spectra have no unit."
    units = unit(result)
    last = f"Values are in {units}." if units else "Values are in the units of the operator that was given."
    return f"{meaning} {last}".strip()
