"""Hutchinson's estimator: z * (A z) for random z with independent entries of mean 0 and variance 1."""

from __future__ import annotations

from typing import Any

from hesscope.algorithms.diagonals.estimate import Estimate, Estimator, Limits
from hesscope.algorithms.diagonals.samples import Samples
from hesscope.operators import Operator
from hesscope.operators.chunks import chunk_size
from hesscope.results.statistics import RunningMean
from hesscope.space import Vectors, vectors

#: The variance of one sample's entry i, by distribution: sum_{j != i} A_ij^2, and for normal entries 2 A_ii^2 on top.
DISTRIBUTIONS = ("rademacher", "gaussian")


class Hutchinson(Estimator):
    """The mean of z * (A z) over independent probes; its standard error is the samples' own.

    Bekas, Kokiopoulou and Saad (2007) divide by the mean of z * z, which for signs is one and for normal numbers would
    turn the mean biased.
    """

    description = "diagonal"

    def __init__(self, H: Operator, limits: Limits, seed: int, distribution: str = "rademacher") -> None:
        super().__init__(H, limits, seed)
        self._distribution = distribution
        self._samples = Samples(H.space)

    @property
    def probes(self) -> int:
        return self._samples.count

    def step(self) -> None:
        m = self.probes
        stop = min(m + (chunk_size(self._H) if self._limits.fixed else 1), self.expected)
        Z = self._draw(range(m, stop))
        self._samples.add(vectors.multiply(Z, self._multiply(Z)))

    def estimate(self) -> Estimate:
        method = "hutchinson" if self._distribution == "rademacher" else "gaussian"
        entries = self._samples.entries
        return Estimate(method, entries.mean, entries.standard_error(), self.probes - 1, self._samples.record())

    def own_state(self) -> dict[str, Any]:
        return self._samples.state()

    def restore_own(self, state: dict[str, Any]) -> None:
        self._samples.restore(state)

    def _draw(self, streams: range) -> Vectors:
        space = self._H.space
        return (space.rademacher if self._distribution == "rademacher" else space.gaussian)(self._seed, streams)


def add_samples(mean: RunningMean, samples: Vectors) -> None:
    """Take in every vector of samples as one sample."""
    for k in range(vectors.count(samples)):
        mean.add({name: part[k] for name, part in samples.items()})


def mean_state(mean: RunningMean) -> dict[str, Any]:
    """A running mean as the state of an iteration keeps it."""
    return {"count": mean.count, "mean": mean.mean, "squares": mean.squares}


def restored_mean(H: Operator, state: dict[str, Any]) -> RunningMean:
    """The running mean that `mean_state` was taken of."""
    if state["count"] == 0:
        return RunningMean()
    return RunningMean(state["count"], H.space.place(state["mean"]), H.space.place(state["squares"]))
