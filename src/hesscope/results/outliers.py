"""Which quadrature nodes stand apart from the bulk of a spectrum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

#: Probes agree on an eigenvalue when their nodes differ by less than this part of the distance to the next nodes.
_AGREEMENT = 0.1
#: A sign vector of n entries puts a weight of 1/n on one eigenvalue, on average.
_LARGEST_WEIGHT = 4.0


@dataclass(frozen=True)
class Outlier:
    """An eigenvalue that every probe found by itself: the mean node, its standard error over probes, the mean weight.

    The error is the disagreement of the probes; all of them may still be short of the eigenvalue, which nodes approach
    from inside.
    """

    value: float
    standard_error: float
    weight: float


def outliers(nodes: Array, weights: Array, size: int) -> tuple[list[Outlier], list[Outlier]]:
    """Nodes isolated from the bulk: from the largest down, and from the smallest up.

    From either end inward, a place counts while every probe has exactly one node there, all probes agree on it far
    better than on the distance to what follows, and it carries the weight of about one eigenvalue of `size`.
    """
    probes = [np.sort(t[w > 0]) for t, w in zip(nodes, weights, strict=True)]
    loads = [w[w > 0][np.argsort(t[w > 0])] for t, w in zip(nodes, weights, strict=True)]
    most = (min(map(len, probes)) - 1) // 2
    upper = _from_top([t[::-1] for t in probes], [w[::-1] for w in loads], size, most)
    lower = _from_top([-t for t in probes], loads, size, most)
    return upper, [Outlier(-o.value, o.standard_error, o.weight) for o in lower]


def _from_top(nodes: list[Array], weights: list[Array], size: int, most: int) -> list[Outlier]:
    """Nodes come in descending order."""
    found: list[Outlier] = []
    for j in range(most):
        here, after = [t[j] for t in nodes], [t[j + 1] for t in nodes]
        load = float(np.mean([w[j] for w in weights]))
        gap = min(here) - max(after)
        if max(here) - min(here) > _AGREEMENT * gap or load * size > _LARGEST_WEIGHT:
            break
        error = float(np.std(here, ddof=1) / len(here) ** 0.5) if len(here) > 1 else float("inf")
        found.append(Outlier(float(np.mean(here)), error, load))
    return found
