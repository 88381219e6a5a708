"""Curvature by groups of parameters: every block, layer or kind of layer, and what lies between them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hesscope.algorithms.basis import Home
from hesscope.algorithms.checkpoint import Checkpoint, run_seed
from hesscope.algorithms.cross_norms import CrossNorms
from hesscope.algorithms.driver import Iteration, drive
from hesscope.algorithms.group_spectra import GroupSpectra, Tally
from hesscope.algorithms.grouping import grouped
from hesscope.errors import HesscopeError, HesscopeWarning
from hesscope.operators import Operator
from hesscope.results import Groups


def groups(
    H: Operator,
    by: str | Callable[[str], str] = "block",
    probes: int = 10,
    steps: int = 30,
    max_products: int = 60,
    tol: float = 1e-3,
    seed: int | None = 0,
    checkpoint: str | Path | Checkpoint | None = None,
    *,
    basis_device: str | torch.device | None = None,
    basis_folder: str | Path | None = None,
) -> Groups:
    """Trace, extreme eigenvalues and spectral density of every group g of the selection, and |A_gh|_F between any two.

    For independent signs z on group h, zero elsewhere, E <z, A z> = tr A_hh and E |(A z)_g|^2 = |A_gh|_F^2; a symmetric
    matrix gives every |A_gh|_F^2 twice, from either side, and their mean is taken. The same z begin the Lanczos runs of the
    density on A_hh. The extreme eigenvalues come from a Lanczos search of their own.

    The cost, for G groups: G probes products with the whole operator, and G (probes steps + at most max_products)
    products on one group. Those of a problem's operator pass through no other group's gradients; a forward pass costs
    the same for all.

    Args:
        by: "block" (of the model's trunk), "layer" (one of one block, a weight with its bias), "kind" (all layers of one
            name, such as every mlp.down_proj), or a function that gives a parameter's name the name of its group. What is
            outside the blocks is a group by its own name; a tied embedding has its first name.
        probes: sign vectors a group, 2 or more; every standard error comes from the spread over them.
        steps: Lanczos steps a probe, for the density.
        max_products: at most so many a group for its extreme eigenvalues.
        tol: a search ends early once both residuals |A_gg v - lambda v| are at most tol |lambda|.
        seed: of all random vectors; None draws one and records it.
        checkpoint: a folder to keep the state of a long run in; the same call resumes there, and removes it at the end.

        basis_device, basis_folder: where the Lanczos basis of the present group is kept, as for `hesscope.eigs`.

    Raises:
        HesscopeError: an unknown `by`, fewer than 2 probes, steps below 1, max_products below 2, tol not positive.

    Example:
        >>> import torch, hesscope as hs
        >>> problem = hs.supervised(torch.nn.Linear(1, 1), [(torch.ones(1, 1), torch.zeros(1, 1))], loss="mse")
        >>> hs.groups(hs.hessian(problem), by=lambda name: name).norms        # weight and bias of (w + b)^2
        tensor([[2., 2.],
                [2., 2.]], dtype=torch.float64)
    """
    _require(probes, steps, max_products, tol)
    parts = grouped(H.space, by)
    seed = run_seed(seed, checkpoint, H.comm)
    home = Home.of(basis_device, basis_folder)
    run = _Run(Tally(H), list(parts.values()), probes, steps, max_products, tol, seed, home)
    said = by if isinstance(by, str) else "a function of names"
    options: dict[str, Any] = {"by": said, "groups": {name: part.size for name, part in parts.items()}}
    if callable(by):
        options["members"] = {name: part.names for name, part in parts.items()}
    options |= {"probes": probes, "steps": steps, "max_products": max_products, "tol": tol, "seed": seed}
    spent = drive(run.whole, run, options, checkpoint)
    norms, spectra = run.norms, run.spectra
    result = Groups(
        **spent,
        by=said,
        names=list(parts),
        sizes=[part.size for part in parts.values()],
        traces=norms.means[:, 0].clone(),
        trace_standard_errors=norms.errors[:, 0].clone(),
        squares=norms.means[:, 1:].T.clone(),
        squares_standard_error=norms.errors[:, 1:].T.clone(),
        extremes=spectra.extremes,
        residuals=spectra.residuals,
        converged=spectra.converged,
        tol=tol,
        nodes=spectra.nodes,
        weights=spectra.weights,
        steps=steps,
        rounding=torch.finfo(H.dtype).eps,
        seed=seed,
    )
    _tell(result)
    return result


def _require(probes: int, steps: int, max_products: int, tol: float) -> None:
    if probes < 2:
        raise HesscopeError(f"Expected at least 2 probes, for the errors come from their spread, got {probes}.")
    if steps < 1:
        raise HesscopeError(f"Expected at least 1 step, got {steps}.")
    if max_products < 2:
        raise HesscopeError(f"Expected max_products of at least 2, for two eigenvalues, got {max_products}.")
    if not tol > 0:
        raise HesscopeError(f"Expected tol to be positive, got {tol}.")


def _tell(result: Groups) -> None:
    missed = result.converged.count(False)
    if missed:
        warnings.warn(
            f"The extreme eigenvalues of {missed} of {len(result.names)} groups missed tol={result.tol:g}; their measured "
            "residuals are in the result; allow more with max_products.",
            HesscopeWarning,
            stacklevel=3,
        )


class _Run(Iteration):
    """First the products with the whole operator, then the groups' own."""

    description = "groups"
    at_most = True

    def __init__(self, whole: Tally, parts: list[Any], probes: int, steps: int, products: int, tol: float, seed: int,
                 home: Home) -> None:  # fmt: skip
        self.whole = whole
        self.norms = CrossNorms(whole, parts, probes, seed)
        self.spectra = GroupSpectra(whole, parts, probes, steps, products, tol, seed, home)
        self.expected = self.norms.expected + self.spectra.expected

    @property
    def done(self) -> bool:
        return self.spectra.done

    def step(self) -> None:
        (self.spectra if self.norms.done else self.norms).step()

    def note(self) -> str:
        return self.spectra.note() if self.norms.done else "cross-group norms"

    def state(self) -> dict[str, Any]:
        return {"norms": self.norms.state(), "spectra": self.spectra.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.norms.restore(state["norms"])
        self.spectra.restore(state["spectra"])
