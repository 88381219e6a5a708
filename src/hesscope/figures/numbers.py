"""Numbers in words: as many digits as are known, and a minus sign that is one."""

from __future__ import annotations

import math


def number(value: float, digits: int = 4) -> str:
    """So many significant digits, trailing zeros kept, and a proper minus sign."""
    if value == 0 or not math.isfinite(value):
        text = f"{value:g}".removeprefix("-0") or "0"
    else:
        # The general format would write 3000 with three digits as 3.00e+03.
        text = f"{value:.0f}" if 10.0 ** (digits - 1) <= abs(value) < 1e5 else f"{value:#.{digits}g}"
    return text.removesuffix(".").replace("-", "\N{MINUS SIGN}").replace("inf", "∞")


def with_error(value: float, error: float) -> str:
    """`6.98 ± 0.37`: the error to two significant digits, the value to the same decimal place."""
    if error == 0 or not (math.isfinite(error) and math.isfinite(value)):
        return f"{number(value)} ± {number(error, 2) if error else 0}"
    scale = math.floor(math.log10(max(abs(value), error)))
    shift = 0 if -4 <= scale < 6 else scale
    places = max(0, 1 - math.floor(math.log10(error)) + shift)
    known, spread = (f"{x / 10.0**shift:.{places}f}" for x in (value, error))
    text = f"{known} ± {spread}" if shift == 0 else f"({known} ± {spread})e{shift}"
    return text.replace("-", "\N{MINUS SIGN}")


def share(part: float) -> str:
    """A percentage that says 0% and 100% only where it is so."""
    if 0 < part < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= part < 1 else f"{part:.0%}"
