"""Is this operator one operator, and symmetric? Asked before a long run, with three products."""

from __future__ import annotations

import math

import torch

from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.operators.product_error import asymmetry
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
    return H.tolerance


def symmetry(H: Operator, u: Vectors, v: Vectors, Hu: Vectors, Hv: Vectors) -> float:
    """|<u, Hv> - <v, Hu>| relative to its size for a map without any symmetry."""
    return asymmetry(H.space, u, v, Hu, Hv)


def difference(H: Operator, x: Vectors, y: Vectors) -> float:
    """|x - y| / |x|."""
    gap, scale = float(H.space.norms(vectors.add(x, y, -1.0))), float(H.space.norms(x))
    return gap / scale if scale > 0 else (0.0 if gap == 0 else math.inf)


def require_finite(H: Operator, x: Vectors) -> None:
    """Raise HesscopeError where a product holds infinities or NaN, naming the first parameter."""
    for name, part in x.items():
        # A sum of squares shows any of them in a tenth of the time; it may also overflow by itself.
        if not math.isfinite(float(torch.linalg.vector_norm(part))) and not bool(torch.isfinite(part).all()):
            raise HesscopeError(
                f"The product is not finite in {name}: the loss's second derivative overflows there; try dtype float64."
            )
