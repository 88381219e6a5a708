"""The spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from hesscope.algorithms.basis import Home
from hesscope.algorithms.checkpoint import Checkpoint, run_seed
from hesscope.algorithms.driver import Iteration, drive
from hesscope.algorithms.krylov import Krylov
from hesscope.algorithms.three_term import ThreeTerm
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.results import Density
from hesscope.results.quadrature import density_of
from hesscope.space import vectors


def density(
    H: Operator,
    probes: int = 10,
    steps: int = 60,
    bandwidth: float | None = None,
    seed: int | None = 0,
    checkpoint: str | Path | Checkpoint | None = None,
    *,
    basis: bool = True,
    basis_device: str | torch.device | None = None,
    basis_folder: str | Path | None = None,
) -> Density:
    """The density of an operator's eigenvalues, by stochastic Lanczos quadrature.

    For a random sign vector z of norm sqrt(n), m Lanczos steps from z give nodes t_j and weights w_j with
    (1/n) z^T f(A) z ~ sum_j w_j f(t_j), exact for polynomials up to degree 2m - 1; its mean over probes is
    (1/n) tr f(A) (Lin, Saad and Yang, 2016; Ubaru, Chen and Saad, 2017).

    Args:
        probes: independent start vectors; every error bar comes from the spread over them.
        steps: Lanczos steps a probe, at most n.
        bandwidth: standard deviation of the Gaussian that smooths the picture, in units of the eigenvalues; a hundredth
            of the range of nodes by default, at least a 30000th of it.
        seed: of the start vectors; None draws one and records it.
        checkpoint: a folder to keep the state of a long run in; the same call resumes there, and removes it at the end.

        basis: keep each probe's basis and reorthogonalise. False keeps three vectors instead: copies of converged
            eigenvalues then appear, which share the weight of one; those within rounding of the largest are joined.
        basis_device: keep the basis there, such as "cpu".
        basis_folder: keep the basis in files of this folder, mapped into memory.

    Raises:
        HesscopeError: fewer than two probes, or steps below one.
    """
    if probes < 2:
        raise HesscopeError(f"Expected at least 2 probes, for the error comes from their spread, got {probes}.")
    if steps < 1:
        raise HesscopeError(f"Expected at least 1 step, got {steps}.")
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise HesscopeError(f"Expected bandwidth to be positive, got {bandwidth}.")
    seed = run_seed(seed, checkpoint, H.comm)
    home = Home.of(basis_device, basis_folder) if basis else None
    run = Quadrature(H, probes, min(steps, H.space.size), seed, home)
    options = {"probes": probes, "steps": steps, "bandwidth": bandwidth, "seed": seed, "basis": basis}
    spent = drive(H, run, options, checkpoint)
    eps = torch.finfo(H.dtype).eps
    return density_of(run.nodes, run.weights, H.space.size, steps, eps, bandwidth, **spent, seed=seed)


class Quadrature(Iteration):
    """One probe after another, each `steps` Lanczos steps or fewer where its Krylov space ends.

    Groups of ranks that divide a product's vectors are each given a probe: as many go in step, with a basis each.
    """

    description = "density"

    def __init__(self, H: Operator, probes: int, steps: int, seed: int, home: Home | None) -> None:
        self._home = home
        self._H, self._probes, self._steps, self._seed = H, probes, steps, seed
        self.expected = probes * steps
        self.nodes = torch.zeros(probes, steps, dtype=torch.float64)
        self.weights = torch.zeros(probes, steps, dtype=torch.float64)
        self._begun = 0
        self._under_way: dict[int, Krylov | ThreeTerm] = {}
        self._fill()

    @property
    def done(self) -> bool:
        return not self._under_way

    def step(self) -> None:
        self._step_all(list(self._under_way.values()))
        for probe, run in list(self._under_way.items()):
            if run.ended or run.m == self._steps:
                nodes, weights = run.quadrature()
                self.nodes[probe, : len(nodes)] = nodes
                self.weights[probe, : len(nodes)] = weights
                del self._under_way[probe]
        self._fill()

    def _step_all(self, runs: list[Krylov | ThreeTerm]) -> None:
        """A step of every run, by one call of the operator."""
        if len(runs) == 1:
            runs[0].step()
            return
        Q = [run.begin() for run in runs]
        W = self._H.matmat(vectors.joined(Q))
        for k, (run, q) in enumerate(zip(runs, Q, strict=True)):
            run.finish(q, vectors.columns(W, k, k + 1))

    def _fill(self) -> None:
        """Begin as many probes as go in step."""
        while self._begun < self._probes and len(self._under_way) < max(self._H.comm.probe_groups, 1):
            self._under_way[self._begun] = self._begin(self._begun)
            self._begun += 1

    def state(self) -> dict[str, Any]:
        under_way = {str(probe): run.state() for probe, run in self._under_way.items()}
        return {"begun": self._begun, "nodes": self.nodes, "weights": self.weights, "under_way": under_way}

    def restore(self, state: dict[str, Any]) -> None:
        self._begun, self.nodes, self.weights = state["begun"], state["nodes"], state["weights"]
        self._under_way = {int(probe): self._begin(int(probe)) for probe in state["under_way"]}
        for probe, of_run in state["under_way"].items():
            self._under_way[int(probe)].restore(of_run)
        self._fill()

    def note(self) -> str:
        return f"probe {min(self._begun, self._probes)} of {self._probes}"

    def _begin(self, probe: int) -> Krylov | ThreeTerm:
        start = vectors.scale(self._H.space.rademacher(self._seed, [f"density/{probe}"]), self._H.space.size**-0.5)
        if self._home is None:
            return ThreeTerm(self._H, start)
        return Krylov(self._H, start, self._seed, restart=False, capacity=self._steps, home=self._home)
