"""A trace as a picture: how the estimate settled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from scipy.stats import t

from hesscope.figures import subject
from hesscope.figures.numbers import number, with_error
from hesscope.figures.scales import Array, array
from hesscope.figures.style import INK, MUTED, NEGATIVE, look, new_figure, save, sign_colours
from hesscope.results.trace import Trace

#: Methods whose samples are independent, so that their running mean shows how the estimate settled; what is counted.
_INDEPENDENT = {"hutchinson": "products", "hutch++": "probes of what the sketch leaves"}
_TRUSTED = 5  # probes before the band decides how tall the picture is


def draw_trace(trace: Trace, path: Path) -> Path:
    """Draw the running mean of an estimate with its 95% band, or the running sum of an exact diagonal.

    Raises:
        HesscopeError: the path ends in something other than .png, .pdf and .svg.
    """
    samples = array(trace.samples)
    with look():
        figure = new_figure(7.6, 3.6, _title(trace), _subtitle(trace), subject.footer(trace))
        axes = figure.add_subplot()
        if trace.method == "exact":
            _running_sum(axes, samples)
        elif trace.method in _INDEPENDENT and len(samples) > 0:
            _running_mean(axes, samples)
            axes.set_xlabel(_INDEPENDENT[trace.method])
        else:
            _samples(axes, samples)
        _final(axes, trace)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_ylabel(subject.with_unit("trace", trace))
        return save(figure, path)


def running(samples: Array) -> tuple[Array, Array]:
    """The mean of the first m samples and half its 95% interval, for every m; infinite for one sample."""
    m = np.arange(1, len(samples) + 1)
    shift = samples.mean()  # keeps the difference of squares below from cancelling
    mean = np.cumsum(samples - shift) / m
    squares = np.maximum(np.cumsum(np.square(samples - shift)) - m * np.square(mean), 0.0)
    half = np.full(len(samples), np.inf)
    half[1:] = t.ppf(0.975, m[1:] - 1) * np.sqrt(squares[1:] / (m[1:] * (m[1:] - 1)))
    return mean + shift, half


def _title(trace: Trace) -> str:
    exact = trace.method == "exact"
    value = f"{number(trace.estimate, 5)}, exact" if exact else with_error(trace.estimate, trace.standard_error)
    return f"Trace of the {subject.operator_name(trace)}: {value}"


def _subtitle(trace: Trace) -> list[str]:
    parts = [subject.selection_line(trace) or f"{trace.size:,} coordinates"]
    if trace.method == "exact":
        return [*parts, f"mean curvature {number(trace.estimate / trace.size, 3)}"]
    low, high = trace.interval()
    return [*parts, subject.method_name(trace.method), f"95% interval {number(low)} to {number(high)}"]


def _running_sum(axes: Any, samples: Array) -> None:
    total = np.concatenate([[0.0], np.cumsum(samples)])
    axes.plot(np.arange(len(total)), total, color=INK, linewidth=1.6)
    axes.fill_between(np.arange(len(total)), 0, total, color=NEGATIVE, alpha=0.08, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("diagonal entries summed, in the selection's order")


def _running_mean(axes: Any, samples: Array) -> None:
    m = np.arange(1, len(samples) + 1)
    mean, half = running(samples)
    axes.scatter(m, samples, s=14, color=sign_colours(samples), alpha=0.4, linewidth=0, label="single probes")
    axes.fill_between(m[1:], (mean - half)[1:], (mean + half)[1:], color=NEGATIVE, alpha=0.16, linewidth=0,
                      label="95% interval")  # fmt: skip
    axes.plot(m, mean, color=INK, linewidth=1.7, label="running mean")
    _limits(axes, samples, mean, half)
    axes.legend(loc="upper right", ncols=3)


def _limits(axes: Any, samples: Array, mean: Array, half: Array) -> None:
    """The first intervals, from a handful of probes, are enormous; they may leave the picture."""
    settled = slice(min(_TRUSTED, len(samples)) - 1, None)
    finite = np.where(np.isfinite(half), half, 0.0)
    low = min(samples.min(), (mean - finite)[settled].min())
    high = max(samples.max(), (mean + finite)[settled].max())
    room = (high - low) or abs(high) or 1.0
    axes.set_ylim(low - 0.06 * room, high + 0.2 * room)


def _samples(axes: Any, samples: Array) -> None:
    """Samples that share most of what they are made of: each leaves one test vector out."""
    axes.scatter(np.arange(1, len(samples) + 1), samples, s=16, color=sign_colours(samples), alpha=0.6, linewidth=0)
    axes.set_xlabel("sample")


def _final(axes: Any, trace: Trace) -> None:
    axes.axhline(trace.estimate, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(number(trace.estimate), (1, trace.estimate), (4, 0), xycoords=("axes fraction", "data"),
                  textcoords="offset points", va="center", color=INK, fontweight="bold")  # fmt: skip
