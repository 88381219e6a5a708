"""Whether a Lanczos run from earlier vectors would have seen an eigenvalue that these lack.

Along a unit eigenvector x of eigenvalue t the basis has parts c = Q^T x with (T - t) c = -beta_m c_(m+1) e_m and
c_1^2 + ... + c_(m+1)^2 <= 1. So c is known up to a factor, and an eigenvalue at t has a part of at most

    |c_1| <= 1 / |(c_1, ..., c_(m+1)) / c_1|

in the start vector: the square root of the Christoffel function there. The random half of a warm start has a part of about
1 / sqrt(2 n). Once the bound is a small share of that for t beyond and between the values found, nothing is hidden there.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from hesscope.algorithms.krylov import Krylov

#: The share. A Gaussian part is smaller than that once in so many starts, and a quarter more.
_SHARE = 10.0
#: How far beyond a value found, of the largest of them, beside twice the tolerance.
_BEYOND = 0.01


def ratios(krylov: Krylov, values: Tensor, S: Tensor, points: list[float], kept: int) -> tuple[float, float]:
    """Logarithms of the least |(c_f, ..., c_(m+1))| / |c_f| and |c_(m+1)| / |c_f| over the points.

    c_f, with f = kept + 1, is the part of the first vector of this basis that is no Ritz vector kept at a restart.
    """
    whole, last = [], []
    beta = krylov.residual_norm
    for t in points:
        far = values - t
        far = torch.where(far.abs() < 1e-300, 1e-300, far)
        c = S @ (S[-1] / far) * beta  # times -c_(m+1)
        first = math.log(max(abs(float(c[kept])), 1e-300))
        whole.append(0.5 * math.log1p(float(c @ c)) - first)
        last.append(-first)
    return min(whole), min(last)


def needed(size: int) -> float:
    """The logarithm of the ratio from which on a part of 1 / sqrt(2 n) is too much by the share."""
    return math.log(_SHARE * math.sqrt(2 * size))


def points(found: Tensor, which: str, tol: float) -> list[float]:
    """Where an eigenvalue would be wanted: beyond the values found at either wanted end, and half-way between them."""
    scale = float(found.abs().max()) or 1.0
    margin = (_BEYOND + 2 * tol) * scale
    return [
        sign * t
        for sign in _signs(which, len(found))
        for t in _outward(sign * found, _least(found, sign, which), margin)
    ]


def _signs(which: str, k: int) -> tuple[float, ...]:
    if which == "BE" and k == 1:
        which = "LA"
    return {"LA": (1.0,), "SA": (-1.0,)}.get(which, (1.0, -1.0))


def _least(found: Tensor, sign: float, which: str) -> float:
    """How extreme an eigenvalue at this end has to be to be wanted."""
    if which == "LM":
        return float(found.abs().min())
    upper = len(found) - len(found) // 2
    if which == "BE":
        found = found[:upper] if sign > 0 else found[upper:]
    return float((sign * found).min())


def _outward(found: Tensor, least: float, margin: float) -> list[float]:
    """Points from `least` on outwards."""
    steps = [least, *sorted(float(t) for t in found if t > least)]
    between = [(a + b) / 2 for a, b in pairwise(steps) if b - a > 2 * margin]
    return [*between, steps[-1] + margin]
