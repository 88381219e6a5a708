"""From quadrature nodes and weights to a smoothed density with its moments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hesscope.results.density import Density

_MOMENTS = 4
_GRID = 1024


def density_of(
    nodes: Tensor, weights: Tensor, size: int, steps: int, eps: float, bandwidth: float | None = None, **rest: Any
) -> Density:
    """The density that nodes and weights [probes, steps] stand for; `rest` is what every result has, and the seed.

    Args:
        size: the number of eigenvalues, n.
        steps: Lanczos steps that were asked for; they decide how many moments have no bias.
        eps: the rounding of the operator's vectors.
        bandwidth: as for `hesscope.density`.
    """
    probes = len(nodes)
    used = nodes[weights > 0]
    width = max(bandwidth or _default_bandwidth(used, eps), float(used.max() - used.min()) / 30000)
    grid = _grid(used, width)
    curves = torch.stack([smooth(nodes[p], weights[p], grid, width) for p in range(probes)])
    powers = torch.stack([(weights * nodes**p).sum(1) for p in range(1, _exact_moments(size, steps) + 1)], 1)
    return Density(**rest, nodes=nodes, weights=weights, grid=grid, density=curves.mean(0),
                   density_standard_error=curves.std(0) / math.sqrt(probes), moments=powers.mean(0),
                   moments_standard_error=powers.std(0) / math.sqrt(probes), bandwidth=width, size=size)  # fmt: skip


def smooth(nodes: Tensor, weights: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
    """sum_j w_j N(x; t_j, bandwidth^2) on the grid."""
    z = (grid[:, None] - nodes[None, :]) / bandwidth
    return (weights * torch.exp(-0.5 * z * z)).sum(1) / (bandwidth * math.sqrt(2 * math.pi))


def _exact_moments(size: int, steps: int) -> int:
    """How many moments the quadrature has without bias: m steps are exact up to degree 2m - 1, n steps for all."""
    return _MOMENTS if steps >= size else min(_MOMENTS, 2 * steps - 1)


def _default_bandwidth(nodes: Tensor, eps: float) -> float:
    spread, magnitude = float(nodes.max() - nodes.min()), float(nodes.abs().max())
    return (spread if spread > 100 * eps * magnitude else magnitude) / 100 or 0.01


def _grid(nodes: Tensor, width: float) -> Tensor:
    low, high = float(nodes.min()) - 5 * width, float(nodes.max()) + 5 * width
    # Half a bandwidth apart the points still integrate the curve to one.
    return torch.linspace(low, high, max(_GRID, math.ceil(2 * (high - low) / width)), dtype=torch.float64)
