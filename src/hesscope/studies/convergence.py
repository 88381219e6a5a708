"""How an exact block settles as sequences are added."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence as Numbers
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms import block
from hesscope.algorithms.driver import provenance
from hesscope.communicator import Communicator
from hesscope.errors import HesscopeError, UnusedParameters
from hesscope.operators import PROBLEM_OPERATORS, hessian
from hesscope.operators.free import short_of
from hesscope.operators.risk import CurvatureOfRisk
from hesscope.problem import Problem, select
from hesscope.results import Convergence
from hesscope.space import Space
from hesscope.studies.accumulator import Accumulator, MeanHessian, PerplexityHessian, Sequence

#: Operators that are sums over sequences without drawing anything at random.
_SUMS = ("hessian", "ggn")
_KEEP_MEMORY = 512 * 2**20


def convergence(
    problem: Problem,
    space: Space | None = None,
    *,
    operator: str = "hessian",
    engine: str = "auto",
    keep: str | Numbers[int] = "auto",
    keep_memory: int = _KEEP_MEMORY,
) -> Convergence:
    """The exact block after 1, 2, ..., S sequences, and how far each addition moved it.

    With H_r the Hessian of the summed loss of sequence r and N_r its terms, E_s = sum_(r<=s) H_r / sum_(r<=s) N_r (for
    objective="perplexity" the Hessian of exp R on the first s sequences). Recorded for every s, in Frobenius norms (the
    l2 norm of the matrix as a vector): the change |E_s - E_(s-1)| / |E_s|, which falls as 1/s, and the standard error,
    the distance to the block of endless data that independent sequences would let one expect, which falls as 1/sqrt(s).

    It costs what one block over all the data costs, and two float64 matrices [n, n] beside the block's own.

    Args:
        space: from `hesscope.select`; every trainable parameter by default.
        operator: "hessian", or "ggn" where there is one.
        keep: running estimates to keep: "all", "none", a list of numbers of sequences, or "auto": all if they fit in
            `keep_memory` bytes (512 MiB), otherwise as many as fit, evenly spaced on a logarithmic scale. The distance
            to the final estimate is known where they are kept.

    Raises:
        HesscopeError: batches that cannot be split into sequences, an operator that is no sum over sequences, a number in
            `keep` that is none of a sequence, or matrices that would not fit in memory.

    Example:
        >>> import torch, hesscope as hs
        >>> X = torch.tensor([[1.0], [2.0], [3.0]])
        >>> problem = hs.supervised(torch.nn.Linear(1, 1, bias=False), [(X, torch.zeros(3, 1))], loss="mse")
        >>> hs.convergence(problem).estimates[:, 0, 0]      # (2/s) sum of x^2
        tensor([2.0000, 5.0000, 9.3333])
    """
    began = time.perf_counter()
    space = (select(problem) if space is None else space).whole
    if operator not in _SUMS or operator not in PROBLEM_OPERATORS:
        known = " or ".join(name for name in _SUMS if name in PROBLEM_OPERATORS)
        raise HesscopeError(f"Expected an operator that is a sum over sequences, {known}, got {operator!r}.")
    singles = problem.by_sequence().related(objective="nll")
    whole = hessian(singles, space)
    kept = _kept(keep, len(singles.batches), space, keep_memory)
    _require_memory(problem.comm, space, len(kept))
    study = _Study(singles, space, operator, engine, problem.objective, kept)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for s in range(len(singles.batches)):
            study.add(s)
    _pass_on(caught, sum(N > 0 for N in singles.counts))
    options = {"operator": operator, "engine": engine, "keep": keep if isinstance(keep, str) else list(keep)}
    record = provenance(whole, options) | {"problem": problem.describe()}
    return study.result(time.perf_counter() - began, record | {"operator": study.described, "probe": None})


class _Study:
    """The sums so far, the curves, and the running estimates that are kept."""

    def __init__(
        self, singles: Problem, space: Space, operator: str, engine: str, objective: str, kept: list[int]
    ) -> None:
        self._singles, self._space, self._make, self._engine = singles, space, PROBLEM_OPERATORS[operator], engine
        self._kept, self._perplexity = kept, objective == "perplexity"
        n = space.size
        self._sums: Accumulator = PerplexityHessian(n) if self._perplexity else MeanHessian(n)
        self._estimates = torch.empty(len(kept), n, n, dtype=space.dtype)
        self._curves: list[tuple[float, float, float]] = []
        self._products, self._units, self._asymmetry = 0.0, 0.0, 0.0
        self._labels: list[str] = []
        self.described: dict[str, Any] = {}

    def add(self, s: int) -> None:
        """Take in the sequence at place s; one without terms changes nothing."""
        sums = self._sums
        if self._singles.counts[s]:
            sums.add(self._sequence(s))
            self._curves.append((sums.norm, sums.change, sums.standard_error))
        else:
            self._require_no_loss(s)
            still = math.nan if math.isnan(sums.norm) else 0.0
            self._curves.append((sums.norm, still, sums.standard_error))
        if s + 1 in self._kept:
            empty = math.isnan(sums.norm)
            self._estimates[self._kept.index(s + 1)] = torch.nan if empty else sums.estimate().to(self._space.dtype)

    def _sequence(self, s: int) -> Sequence:
        part = self._singles.subset([s])
        H = self._make(part, self._space, self._engine)
        found = block(H)
        total, gradient = 0.0, torch.zeros(0)
        if self._perplexity:
            of_risk = H if isinstance(H, CurvatureOfRisk) else hessian(part, self._space, self._engine)
            assert isinstance(of_risk, CurvatureOfRisk)
            risk, g = of_risk.risk_and_gradient()
            total, gradient = risk * part.N, self._space.flatten(g)[:, 0] * part.N
        share = part.N / self._singles.N
        self._products += found.products * share
        self._units += found.units * share
        self._asymmetry = max(self._asymmetry, found.asymmetry)
        self._labels, self.described = found.labels, H.describe()
        return Sequence(total, part.N, found.matrix * part.N, gradient)

    def _require_no_loss(self, s: int) -> None:
        with torch.no_grad():
            total = float(self._singles.total(s)[0])
        if total != 0.0:
            raise HesscopeError(
                f"Expected sequence {s} to have no loss, for it counts no terms, but its loss is {total:.4g}: what does not "
                "grow with the terms, such as a penalty on the weights, is no sum over sequences."
            )

    def result(self, seconds: float, record: dict[str, Any]) -> Convergence:
        """The curves over all sequences, and the final matrix."""
        matrix = self._sums.estimate().to(self._space.dtype)
        norms, changes, errors = (torch.tensor(c, dtype=torch.float64) for c in zip(*self._curves, strict=True))
        return Convergence(
            products=round(self._products),
            units=self._units,
            seconds=seconds,
            provenance=record,
            matrix=matrix,
            labels=self._labels,
            asymmetry=self._asymmetry,
            counts=torch.tensor(self._singles.counts),
            norms=norms,
            changes=torch.where(changes == 0, 0.0, changes / norms),
            standard_errors=errors,
            distances=self._distances(matrix),
            kept=self._kept,
            estimates=self._estimates,
        )

    def _distances(self, matrix: Tensor) -> Tensor:
        """|E_s - E_S| / |E_S| where E_s was kept, NaN elsewhere; zero for the last."""
        found = torch.full((len(self._singles.batches),), torch.nan, dtype=torch.float64)
        last = matrix.double()
        scale = float(last.norm()) or 1.0
        for place, s in enumerate(self._kept):
            found[s - 1] = float((self._estimates[place].double() - last).norm()) / scale
        found[-1] = 0.0
        return found


def _kept(keep: str | Numbers[int], S: int, space: Space, limit: int) -> list[int]:
    """Numbers of sequences, from 1 to S, in order."""
    if isinstance(keep, str) and keep not in ("auto", "all", "none"):
        raise HesscopeError(f"Expected keep to be auto, all, none or numbers of sequences, got {keep!r}.")
    if keep == "none":
        return []
    if isinstance(keep, str):
        fit = limit // (space.size**2 * space.dtype.itemsize)
        return list(range(1, S + 1)) if keep == "all" or fit >= S else _spaced(S, fit)
    wrong = [s for s in keep if not (isinstance(s, int) and 1 <= s <= S)]
    if wrong:
        raise HesscopeError(f"Expected keep to hold numbers of sequences from 1 to {S}, got {wrong[0]}.")
    return sorted(set(keep))


def _spaced(S: int, most: int) -> list[int]:
    """At most so many of 1..S, as evenly as whole numbers can on a logarithmic scale; S is one of them."""
    found: list[int] = []
    for steps in range(1, S + 1):
        now = sorted({round(S ** (k / steps)) for k in range(1, steps + 1)})
        if len(now) > most:
            break
        found = now
    return found


def _require_memory(comm: Communicator, space: Space, kept: int) -> None:
    n = space.size
    if (short := short_of(comm, {torch.device("cpu"): n * n * (3 * 8 + kept * space.dtype.itemsize)})) is not None:
        _, wanted, free = short
        raise HesscopeError(
            f"Expected matrices that fit in memory: the sums and {kept} running estimates of {n} x {n} take "
            f"{wanted / 2**30:.1f} GiB, of which {free / 2**30:.1f} are free; keep fewer or select fewer coordinates."
        )


def _pass_on(caught: list[warnings.WarningMessage], sequences: int) -> None:
    """Warn of parameters that no sequence uses, for that one alone does not is nothing to say; and of all else."""
    unused = [w.message.names for w in caught if isinstance(w.message, UnusedParameters)]
    never = set.intersection(*map(set, unused)) if len(unused) == sequences else set()
    if never:
        warnings.warn(UnusedParameters(sorted(never)), stacklevel=3)
    for said in dict.fromkeys((str(w.message), w.category) for w in caught):
        if said[1] is not UnusedParameters:
            warnings.warn(*said, stacklevel=3)
