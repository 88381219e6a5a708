"""The raw Lanczos run, for those who want T itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.basis import Home
from hesscope.algorithms.checkpoint import Checkpoint, run_seed
from hesscope.algorithms.driver import Iteration, drive
from hesscope.algorithms.krylov import Krylov
from hesscope.algorithms.starting import start_digest, start_vectors
from hesscope.algorithms.three_term import ThreeTerm
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.results import LanczosRun
from hesscope.space import Vectors
from hesscope.space.divided import Divided


def lanczos(
    H: Operator,
    steps: int,
    start: Tensor | dict[str, Tensor] | None = None,
    reorthogonalize: bool = True,
    keep_basis: bool = False,
    seed: int | None = 0,
    checkpoint: str | Path | Checkpoint | None = None,
    *,
    basis_device: str | torch.device | None = None,
    basis_folder: str | Path | None = None,
    gather: bool = True,
) -> LanczosRun:
    """Run the Lanczos process: A Q = Q T + residual, with T tridiagonal and Q orthonormal.

    Args:
        steps: products to spend; the run ends earlier where the Krylov space does.
        start: the first direction, a flat tensor [n] or {name: tensor}; a random Gaussian one by default.
        reorthogonalize: keep the basis and orthogonalise every step against all of it. False is the three-term form,
            which holds three vectors; its nodes are joined where they are copies of one eigenvalue.
        keep_basis: return the basis with the result; needs reorthogonalize.
        checkpoint: a folder to keep the state of a long run in; the same call resumes there, and removes it at the end.

        basis_device: keep the basis there, such as "cpu".
        basis_folder: keep the basis in files of this folder, mapped into memory.
        gather: where vectors are divided among ranks, every rank gets the whole basis; with False its own rows of it, where
            they are kept, and `save`, which then all ranks call, has rank 0 write it a piece at a time.

    Raises:
        HesscopeError: steps outside 1..n, or a start vector that is zero, not finite or of another size.
    """
    n = H.space.size
    if not 1 <= steps <= n:
        raise HesscopeError(f"Expected steps between 1 and {n}, the number of coordinates, got {steps}.")
    if keep_basis and not reorthogonalize:
        raise HesscopeError(
            "Expected reorthogonalize=True with keep_basis=True: the three-term form has no basis to return."
        )
    seed = run_seed(seed, checkpoint, H.comm)
    first = _start(H, start, seed)
    options = {
        "steps": steps,
        "seed": seed,
        "keep_basis": keep_basis,
        "start": None if start is None else start_digest(H, first),
        "reorthogonalize": reorthogonalize,
    }
    home = Home.of(basis_device, basis_folder)
    krylov = (
        Krylov(H, first, seed, restart=False, capacity=steps, home=home) if reorthogonalize else ThreeTerm(H, first)
    )
    del first  # the run holds what it needs of it
    run = LanczosIteration(krylov, steps, "lanczos")
    spent = drive(H, run, options, checkpoint)
    nodes, weights = krylov.quadrature()
    basis: dict[str, Tensor | Divided] = {}
    if keep_basis and isinstance(krylov, Krylov):
        basis = H.space.kept(H.space.place(krylov.basis) if gather else krylov.basis, gather)
    return LanczosRun(**spent, T=krylov.T, nodes=nodes, weights=weights,
                      residual_norm=krylov.residual_norm, basis_vectors=basis, seed=seed)  # fmt: skip


class LanczosIteration(Iteration):
    """A fixed number of Lanczos steps."""

    def __init__(self, krylov: Krylov | ThreeTerm, steps: int, description: str) -> None:
        self.krylov, self.expected, self.description = krylov, steps, description

    @property
    def done(self) -> bool:
        return self.krylov.ended or self.krylov.m >= self.expected

    def step(self) -> None:
        self.krylov.step()

    def state(self) -> dict[str, Any]:
        return self.krylov.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.krylov.restore(state)


def _start(H: Operator, start: Tensor | dict[str, Tensor] | None, seed: int) -> Vectors:
    if isinstance(start, Tensor) and start.dim() != 1:
        raise HesscopeError(f"Expected a start vector of shape [{H.space.size}], got {list(start.shape)}.")
    given = start_vectors(H, start)
    return H.space.gaussian(seed, ["start"]) if given is None else given
