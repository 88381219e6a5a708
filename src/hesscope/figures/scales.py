"""Signed numbers over many decades: thresholds, colour norms and ticks that are linear near zero and logarithmic beyond."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

#: At most so many decades are shown on either side of zero; smaller numbers are as good as zero beside the largest.
_DECADES = 4
#: The part from zero to the threshold takes the room of so many decades.
LINEAR_DECADES = 0.7


def array(tensor: Tensor) -> Array:
    """A float64 NumPy array of any tensor."""
    return np.asarray(tensor.detach().double().cpu().numpy(), dtype=np.float64)


def limit(values: Array) -> float:
    """The largest finite magnitude; one where every number is zero, so that a scale exists."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max(initial=0.0)) or 1.0


def threshold(values: Array) -> float:
    """Where a scale turns from linear to logarithmic: the median magnitude of the numbers that are not zero.

    At least one decade and at most four are left above it, so that neither a few giants nor a cloud of rounding errors
    decides the picture.
    """
    top = limit(values)
    finite = np.abs(values[np.isfinite(values) & (values != 0)])
    middle = float(np.median(finite)) if finite.size else top
    return min(max(middle, top * 10.0**-_DECADES), top / 10)


def signed_norm(values: Array) -> SymLogNorm:
    """A colour norm with limits symmetric about zero."""
    top = limit(values)
    return SymLogNorm(threshold(values), linscale=LINEAR_DECADES, vmin=-top, vmax=top, base=10)


def magnitude_norm(values: Array) -> SymLogNorm:
    """A colour norm from zero up, for magnitudes."""
    return SymLogNorm(threshold(values), linscale=LINEAR_DECADES, vmin=0.0, vmax=limit(values), base=10)


def ticks(linear: float, top: float, most: int = 3) -> tuple[list[float], list[str]]:
    """Zero and at most `most` powers of ten on either side, with labels; the largest round number where none fits."""
    powers = list(range(math.ceil(math.log10(linear) - 1e-9), math.floor(math.log10(top) + 1e-9) + 1))
    step = max(1, math.ceil(len(powers) / most))
    chosen = [10.0**p for p in powers[::-1][::step][::-1]] or [float(f"{top:.1g}")]
    values = [-v for v in chosen[::-1]] + [0.0, *chosen]
    return values, [_label(v) for v in values]


def mark(axis: Any, linear: float, top: float, most: int = 3) -> None:
    """Put these ticks on an axis whose scale is symmetric-logarithmic."""
    places, labels = ticks(linear, top, most)
    axis.set_major_locator(FixedLocator(places))
    axis.set_major_formatter(FixedFormatter(labels))
    axis.set_minor_locator(NullLocator())


def _label(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:g}".replace("-", "\N{MINUS SIGN}")
    mantissa, exponent = f"{value:.0e}".split("e")
    digits = {"1": "", "-1": "-"}.get(mantissa, mantissa + r"\cdot ")
    return f"${digits}10^{{{int(exponent)}}}$"
