"""Is this operator one operator, and symmetric? Asked before a long run, with three products."""

from __future__ import annotations

import math

import torch

from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.space import Vectors, vectors


def probe(H: Operator, seed: int = 0) -> dict[str, float]:
    """Measure symmetry |<u, Hv> - <v, Hu>| and repeatability |Hu - Hu'|, relative to |Hu| and |Hv|.

    Raises HesscopeError where a product is not finite, or either figure exceeds `tolerated`.
    """
    u, v = (H.space.rademacher(seed, [f"probe/{i}"]) for i in range(2))
    Hu, Hv = H.matmat(u), H.matmat(v)
    again = H.matmat(u)
    require_finite(H, Hu)
    require_finite(H, Hv)
    found = {"symmetry": symmetry(H, u, v, Hu, Hv), "repeatability": difference(H, Hu, again)}
    limit = tolerated(H)
    if found["repeatability"] > limit:
        raise HesscopeError(
            f"The same product came out twice with a relative difference of {found['repeatability']:.1e}, expected at "
            f"most {limit:.0e}: something draws random numbers or changes state; put the model in evaluation mode."
        )
    if found["symmetry"] > limit:
        raise HesscopeError(
            f"<u, Hv> and <v, Hu> differ by {found['symmetry']:.1e} relative to their scale, expected at most "
            f"{limit:.0e}: some operation's second derivative is wrong; try engine='finite-difference' or another dtype."
        )
    return found


def tolerated(H: Operator) -> float:
    """The largest relative discrepancy of a product that may pass for rounding."""
    return H.space.tolerance


def symmetry(H: Operator, u: Vectors, v: Vectors, Hu: Vectors, Hv: Vectors) -> float:
    """|<u, Hv> - <v, Hu>| / ((|u| |Hv| + |v| |Hu|) / (2 sqrt(n))).

    For independent sign vectors <u, Hv> is of the size |Hv| = |u| |Hv| / sqrt(n). Relative to |u| |Hv| itself, a map
    without any symmetry would come out as sqrt(2 / n), which for large n passes for rounding.
    """
    inner = H.space.inner
    scale = 0.5 * float(H.space.norms(u) * H.space.norms(Hv) + H.space.norms(v) * H.space.norms(Hu))
    scale /= math.sqrt(H.space.size)
    gap = abs(float(inner(u, Hv)) - float(inner(v, Hu)))
    return gap / scale if scale > 0 else 0.0


def difference(H: Operator, x: Vectors, y: Vectors) -> float:
    """|x - y| / |x|."""
    gap, scale = float(H.space.norms(vectors.add(x, y, -1.0))), float(H.space.norms(x))
    return gap / scale if scale > 0 else (0.0 if gap == 0 else math.inf)


def require_finite(H: Operator, x: Vectors) -> None:
    """Raise HesscopeError where a product holds infinities or NaN, naming the first parameter."""
    for name, part in x.items():
        if not bool(torch.isfinite(part).all()):
            raise HesscopeError(
                f"The product is not finite in {name}: the loss's second derivative overflows there; try dtype float64."
            )
