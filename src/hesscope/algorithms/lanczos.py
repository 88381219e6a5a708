"""The raw Lanczos run, for those who want T itself."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from hesscope.algorithms.checkpoint import Checkpoint, run_seed
from hesscope.algorithms.driver import Iteration, drive
from hesscope.algorithms.krylov import Krylov
from hesscope.digest import update_with_tensor
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.results import LanczosRun
from hesscope.space import Vectors


def lanczos(
    H: Operator,
    steps: int,
    start: Tensor | dict[str, Tensor] | None = None,
    reorthogonalize: bool = True,
    keep_basis: bool = False,
    seed: int | None = 0,
    checkpoint: str | Path | Checkpoint | None = None,
) -> LanczosRun:
    """Run the Lanczos process: A Q = Q T + residual, with T tridiagonal and Q orthonormal.

    Args:
        steps: products to spend; the run ends earlier where the Krylov space does.
        start: the first direction, a flat tensor [n] or {name: tensor}; a random Gaussian one by default.
        reorthogonalize: only True for now: the basis is kept and every step orthogonalised against all of it.
        keep_basis: return the basis with the result.
        checkpoint: a folder to keep the state of a long run in; the same call resumes there, and removes it at the end.

    Raises:
        HesscopeError: steps outside 1..n, or a start vector that is zero, not finite or of another size.
    """
    n = H.space.size
    if not 1 <= steps <= n:
        raise HesscopeError(f"Expected steps between 1 and {n}, the number of coordinates, got {steps}.")
    if not reorthogonalize:
        raise HesscopeError("Expected reorthogonalize=True; the three-term form without a basis is not available yet.")
    seed = run_seed(seed, checkpoint)
    first = _start(H, start, seed)
    options = {
        "steps": steps,
        "seed": seed,
        "keep_basis": keep_basis,
        "start": None if start is None else _digest(first),
    }
    run = LanczosIteration(H, Krylov(H, first, seed, restart=False, capacity=steps), steps, "lanczos")
    spent = drive(H, run, options, checkpoint)
    values, S = run.krylov.ritz()
    basis = dict(run.krylov.basis) if keep_basis else {}
    return LanczosRun(**spent, T=run.krylov.T, nodes=values, weights=S[0] ** 2,
                      residual_norm=run.krylov.residual_norm, basis_vectors=basis, seed=seed)  # fmt: skip


class LanczosIteration(Iteration):
    """A fixed number of Lanczos steps."""

    def __init__(self, H: Operator, krylov: Krylov, steps: int, description: str) -> None:
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
    if start is None:
        return H.space.gaussian(seed, ["start"])
    if not isinstance(start, dict) and start.shape != (H.space.size,):
        raise HesscopeError(f"Expected a start vector of shape [{H.space.size}], got {list(start.shape)}.")
    v = H.space.from_dict(start) if isinstance(start, dict) else H.space.unflatten(start[:, None])
    if not 0.0 < float(H.space.norms(v)) < math.inf:
        raise HesscopeError("Expected a start vector other than zero, with finite entries.")
    return v


def _digest(start: Vectors) -> str:
    """A SHA-256 of the start vector, for the record."""
    digest = hashlib.sha256()
    for part in start.values():
        update_with_tensor(digest, part)
    return digest.hexdigest()
