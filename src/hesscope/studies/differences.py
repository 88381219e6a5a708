"""Central differences of a problem's objective and of its gradient, with errors of their own.

f is the objective in float64, e_i a unit vector of the selection, s_i the scale of coordinate i's parameter, and h = s t:

    gradient:  H e_j  ~  (g(theta + h e_j) - g(theta - h e_j)) / 2h                                       t = (3 eta_g)^(1/3)
    loss:      H_ii   ~  (f(+h) - 2 f(0) + f(-h)) / h^2,                                                   t = eta_f^(1/4)
               H_ij   ~  (f(+h_i, +h_j) - f(+h_i, -h_j) - f(-h_i, +h_j) + f(-h_i, -h_j)) / 4 h_i h_j       t = eta_f^(1/4)

The first is off by rounding eta |g| / h and truncation h^2 g''' / 6, the others by rounding of about eta |f| / h^2 and
truncation of about h^2 f'''' / 6. Where derivatives of every order are of the size of the function at distance s, the two
parts balance at the t above: eps^(1/3) for gradients, eps^(1/4) for losses (Dennis and Schnabel, 1983, section 5.4). Both are
taken at h and 2h; the value is Richardson's (4 D(h) - D(2h)) / 3, which removes the h^2 term, and

    error  =  2 |D(h) - D(2h)|  +  3 sigma * (what the formula makes of it)

bounds both parts: the first sees truncation (three times that of D(h)), the second rounding, also where the two step sizes
agree by chance. sigma is not the machine's epsilon but measured, as a model in float64 may cast to float32 inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscope.engines.base import parameter_values
from hesscope.problem import Problem
from hesscope.space import Space

_POINTS, _SPACING = 9, 1e-5
_ORDERS = (4, 5, 6)
#: Scales tried for each parameter, relative to 1 + its root mean square.
_SCALES = (4.0, 1.0, 0.25, 0.06)
_SIGMAS = 3.0


@dataclass(frozen=True)
class Measured:
    """A difference quotient and a bound on its error: a column's norm, or an entry's magnitude."""

    value: Tensor
    error: float


class Differences:
    """Difference quotients of one problem over one space. `units` counts forward passes over the data."""

    def __init__(self, problem: Problem, space: Space, seed: int) -> None:
        self._problem, self._space = problem, space
        self._values = parameter_values(problem, space)
        self._owner = [c.name for c in space.coordinates for _ in range(c.size)]
        self._slope_scales: dict[str, float] = {}
        self._loss_scales: dict[str, float] = {}
        self.units = 0.0
        self._f0, g0 = self._value_and_gradient(torch.zeros(space.size))
        self.loss_noise, self.gradient_noise = self._noise(seed)
        eps = torch.finfo(space.dtype).eps
        self._eta_f = max(self.loss_noise / max(abs(self._f0), 1e-300), eps)
        self._eta_g = max(self.gradient_noise / max(float(g0.norm()), 1e-300), eps)
        # Where the gradient vanishes its rounding is that of the terms that cancel, not relative to it.
        self._eta_g = min(self._eta_g, max(math.sqrt(self._eta_f), eps))

    def column(self, j: int) -> Measured:
        """H e_j from gradients, [n]."""
        scale = self._scale(self._slope_scales, j, lambda s: self._column(j, s))
        return self._column(j, scale)

    def entry(self, i: int, j: int) -> Measured:
        """H_ij from losses."""

        def scale(k: int) -> float:
            return self._scale(self._loss_scales, k, lambda s: self._entry(k, k, s, s))

        return self._entry(i, j, scale(i), scale(j))

    def _scale(self, known: dict[str, float], j: int, measure: Callable[[float], Measured]) -> float:
        """The scale of coordinate j's parameter: of those tried, the one with the smallest error of its own."""
        name = self._owner[j]
        if name not in known:
            size = 1.0 + float(self._values[name].double().square().mean().sqrt())
            known[name] = min((size * s for s in _SCALES), key=lambda scale: measure(scale).error)
        return known[name]

    def _column(self, j: int, scale: float) -> Measured:
        h = scale * (3 * self._eta_g) ** (1 / 3)
        fine, coarse = self._slope(j, h), self._slope(j, 2 * h)
        noise = _SIGMAS * 4 / 3 * self.gradient_noise / (math.sqrt(2.0) * h)
        return Measured((4 * fine - coarse) / 3, 2 * float((fine - coarse).norm()) + noise)

    def _entry(self, i: int, j: int, s_i: float, s_j: float) -> Measured:
        t = self._eta_f**0.25
        if i == j:
            fine, coarse = (self._second(i, k * s_i * t) for k in (1, 2))
            weight = math.sqrt(6.0) / (s_i * t) ** 2
        else:
            fine, coarse = (self._mixed(i, j, k * s_i * t, k * s_j * t) for k in (1, 2))
            weight = 0.5 / (s_i * s_j * t * t)
        noise = _SIGMAS * 4 / 3 * weight * max(self.loss_noise, self._eta_f * abs(self._f0))
        return Measured(torch.tensor((4 * fine - coarse) / 3), 2 * abs(fine - coarse) + noise)

    def _slope(self, j: int, h: float) -> Tensor:
        step = self._unit(j, h)
        return (self._value_and_gradient(step)[1] - self._value_and_gradient(-step)[1]) / (2 * h)

    def _second(self, i: int, h: float) -> float:
        step = self._unit(i, h)
        return (self._value(step) - 2 * self._f0 + self._value(-step)) / (h * h)

    def _mixed(self, i: int, j: int, h_i: float, h_j: float) -> float:
        e, d = self._unit(i, h_i), self._unit(j, h_j)
        same, opposite = self._value(e + d) + self._value(-e - d), self._value(e - d) + self._value(d - e)
        return (same - opposite) / (4 * h_i * h_j)

    # ---- rounding

    def _noise(self, seed: int) -> tuple[float, float]:
        """Standard deviations of the rounding of f and of |g|, from tables of differences (More and Wild, 2011).

        At equally spaced points so close that a smooth function's k-th difference vanishes, what is left is rounding with
        variance sigma^2 (2k)! / (k!)^2. The spacing is many roundings of float32, so that casts inside the model show.
        """
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(self._space.size, generator=generator, dtype=torch.float64)
        direction *= _SPACING / float(direction.norm())
        points = [self._value_and_gradient(k * direction) for k in range(_POINTS)]
        losses = torch.tensor([f for f, _ in points], dtype=torch.float64)[:, None]
        return _spread(losses), _spread(torch.stack([g for _, g in points]))

    # ---- the function

    def _unit(self, j: int, h: float) -> Tensor:
        step = torch.zeros(self._space.size, dtype=torch.float64)
        step[j] = h
        return step

    def _moved(self, step: Tensor) -> dict[str, Tensor]:
        parts = self._space.unflatten(step[:, None])
        return {c.name: self._values[c.name] + c.scatter(parts[c.name][0]).to(c.dtype) for c in self._space.coordinates}

    def _value(self, step: Tensor) -> float:
        moved = self._moved(step)
        self.units += 1.0
        with torch.no_grad():
            totals = [float(self._problem.total(b, moved)[0]) for b in range(len(self._problem.batches))]
        return self._objective(math.fsum(totals) / self._problem.N)

    def _value_and_gradient(self, step: Tensor) -> tuple[float, Tensor]:
        leaves = {name: p.detach().requires_grad_() for name, p in self._moved(step).items()}
        totals, gradient = [], torch.zeros(self._space.size, dtype=torch.float64)
        self.units += 3.0
        for b in range(len(self._problem.batches)):
            with torch.enable_grad():
                total, _ = self._problem.total(b, leaves)
            totals.append(float(total.detach()))
            if total.requires_grad:
                parts = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
                picked = (c.gather(g).reshape(-1) for c, g in zip(self._space.coordinates, parts, strict=True))
                gradient += torch.cat([g.to("cpu", torch.float64) for g in picked])
        value = self._objective(math.fsum(totals) / self._problem.N)
        return value, gradient * ((value if self._problem.objective == "perplexity" else 1.0) / self._problem.N)

    def _objective(self, risk: float) -> float:
        return math.exp(risk) if self._problem.objective == "perplexity" else risk


def _spread(table: Tensor) -> float:
    """The norm of the components' standard deviations, from the differences of rows of [points, components]."""
    estimates = []
    for k in range(1, max(_ORDERS) + 1):
        table = table.diff(dim=0)
        if k in _ORDERS:
            estimates.append(float(table.square().mean(0).sum()) * math.factorial(k) ** 2 / math.factorial(2 * k))
    return math.sqrt(sum(estimates) / len(estimates))
