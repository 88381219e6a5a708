"""Is the Hessian block-diagonal? The energy of an exact block by rows, layers and blocks, and its whole spectrum."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor

from hesscope.algorithms.block import block
from hesscope.algorithms.driver import versions
from hesscope.algorithms.energy import energies
from hesscope.algorithms.membership import membership
from hesscope.communicator import ALONE, Communicator
from hesscope.errors import HesscopeError
from hesscope.figures.subject import unit
from hesscope.operators import Operator
from hesscope.operators.free import short_of
from hesscope.results import Block, Structure, StructureComparison


@overload
def structure(H: Operator | Block | Structure) -> Structure: ...
@overload
def structure(H: Mapping[str, Operator | Block | Structure]) -> StructureComparison: ...
def structure(
    H: Operator | Block | Structure | Mapping[str, Operator | Block | Structure],
) -> Structure | StructureComparison:
    """Where a symmetric matrix has its energy, sum A_ij^2, and what its spectrum is.

    Five disjoint classes of entries (i, j): the diagonal; one row (the weights of one output unit); one layer, different
    rows; one block, different layers; different blocks. Each has a share of the energy, and a chance level, the share
    it would have with energy spread evenly: its number of entries / n^2. The block-diagonal part D leaves
    |A - D|_F / |A|_F = sqrt(1 - the shares inside blocks) out.

    Args:
        H: an operator, whose exact block is computed first (n products); or such a block; or several by name, which
            gives their comparison.

    Raises:
        HesscopeError: the matrix, or its float64 copy for the eigenvalues, does not fit in memory; an entry is not finite.

    Example:
        >>> import torch, hesscope as hs
        >>> hs.structure(hs.operator(torch.ones(4, 4))).shares      # a matrix of one row has no layers or blocks
        tensor([0.2500, 0.7500, 0.0000, 0.0000, 0.0000], dtype=torch.float64)
    """
    if isinstance(H, Mapping):
        return _compare(H)
    if isinstance(H, Structure):
        return H
    if not isinstance(H, (Operator, Block)):
        raise HesscopeError(
            f"Expected an operator, a block, or a dictionary of them by name, got {type(H).__name__}; hs.operator(matrix) "
            "makes an operator of a matrix."
        )
    return of_block(H) if isinstance(H, Block) else of_block(block(H), H.comm)


def of_block(exact: Block, comm: Communicator = ALONE) -> Structure:
    """The same of a block that all ranks of some have, each of which makes its own copy."""
    began = time.perf_counter()
    A, n = exact.matrix, len(exact.labels)
    _require_memory(n, comm)
    members = membership(exact.labels, exact.provenance.get("selection"))
    inner, layer_energy = energies(A, members)
    same_block = members.block_of_layer[:, None] == members.block_of_layer
    off = layer_energy.clone().fill_diagonal_(0.0)
    outer = torch.stack([off[same_block].sum(), off[~same_block].sum()])
    if not bool(torch.isfinite(outer.sum() + inner.sum())):
        raise HesscopeError("Expected a block of finite entries; it holds infinities or NaN, so compute it again.")
    eigenvalues = comm.on_all(lambda: _eigenvalues(A))
    return Structure(
        products=exact.products,
        units=exact.units,
        seconds=exact.seconds + time.perf_counter() - began,
        provenance=exact.provenance,
        energy=torch.cat([inner, outer]),
        entries=members.entries(),
        layers=members.layers,
        layer_sizes=members.sizes()[1].tolist(),
        layer_block=members.block_of_layer.tolist(),
        blocks=members.blocks,
        layer_energy=layer_energy,
        eigenvalues=eigenvalues,
        rounding=_rounding(exact),
        asymmetry=exact.asymmetry,
    )


def _eigenvalues(A: Tensor) -> Tensor:
    """All eigenvalues, ascending, float64. One copy of the matrix, which LAPACK overwrites."""
    from scipy.linalg import eigh

    copied = A.to("cpu", torch.float64, copy=True).numpy()
    # The transpose of a symmetric matrix in C's order is itself in Fortran's, which is what is overwritten in place.
    return torch.from_numpy(eigh(copied.T, eigvals_only=True, overwrite_a=True, check_finite=False, driver="evd"))


def _rounding(exact: Block) -> float:
    """The epsilon of the coarser of the matrix and the weights."""
    eps = torch.finfo(exact.matrix.dtype).eps
    named = str((exact.provenance.get("problem") or {}).get("dtype", ""))
    dtype = getattr(torch, named, None) if named else None
    return max(eps, torch.finfo(dtype).eps) if isinstance(dtype, torch.dtype) else eps


def _require_memory(n: int, comm: Communicator) -> None:
    if (short := short_of(comm, {torch.device("cpu"): 8 * n * n})) is not None:
        _, needed, free = short
        raise HesscopeError(
            f"Expected memory for a float64 copy of the {n} x {n} matrix, {needed / 2**30:.1f} GiB, of which "
            f"{free / 2**30:.1f} are free; select at most {int((free / 8) ** 0.5)} coordinates."
        )


def _compare(named: Mapping[str, Any]) -> StructureComparison:
    if not named:
        raise HesscopeError("Expected at least one operator or block to compare, got an empty dictionary.")
    found = {str(name): structure(part) for name, part in named.items()}
    parts = list(found.values())
    return StructureComparison(
        products=sum(part.products for part in parts),
        units=sum(part.units for part in parts),
        seconds=sum(part.seconds for part in parts),
        provenance={"options": {}, "cases": {n: part.provenance for n, part in found.items()}, "versions": versions()},
        cases=list(found),
        energy=torch.stack([part.energy for part in parts]),
        entries=torch.stack([part.entries for part in parts]),
        eigenvalues={name: part.eigenvalues for name, part in found.items()},
        rounding=[part.rounding for part in parts],
        units_of_curvature=[unit(part) for part in parts],
    )
