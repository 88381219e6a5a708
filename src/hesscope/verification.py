"""Checks of the Hessian on the user's own problem: is the answer one that can be trusted?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from hesscope.algorithms.driver import provenance
from hesscope.algorithms.probing import difference, symmetry, tolerated
from hesscope.arithmetic import precision
from hesscope.data.batching import batches_of_sequences
from hesscope.operators import Operator, hessian
from hesscope.problem import Problem, select
from hesscope.problem.precision import in_float64
from hesscope.results import Verification
from hesscope.results.verification import Check, columns_of
from hesscope.space import Space

#: A finite difference is no better than this in float32, where no float64 copy can be made.
_DIFFERENCE_LIMIT = {"float64": 1e-3, "own": 1e-2}


def verify(problem: Problem, space: Space | None = None, engine: str = "auto", seed: int = 0) -> Verification:
    """Hold a problem's Hessian to five checks, in about 60 forward passes.

    1. symmetry: |<u, Hv> - <v, Hu>| relative to |u| |Hv| / sqrt(n), its size without symmetry, for random signs u, v;
    2. repeatability: the same product twice;
    3. linearity: H(u + v) against Hu + Hv;
    4. token weighting: the product when the same sequences are batched differently (in a copy of the data);
    5. finite difference: the product against central differences of the gradient along one direction; for parameters in
       less than float64, of a float64 copy of the model, unless its weights are divided among processes.

    Returns:
        A `Verification`; `passed` says whether every measured value is within its limit.
    """
    space = select(problem) if space is None else space
    H = hessian(problem, space, engine)
    began = time.perf_counter()
    checks, partners = _checks(problem, space, H, engine, seed)
    everyone = [H, *partners]
    return Verification(
        products=sum(A.products for A in everyone),
        units=sum(A.units for A in everyone),
        seconds=time.perf_counter() - began,
        provenance=provenance(H, {"engine": engine, "seed": seed}),
        **columns_of(checks),
    )


def _checks(problem: Problem, space: Space, H: Operator, engine: str, seed: int) -> tuple[list[Check], list[Operator]]:
    u, v = (space.rademacher(seed, [f"verify/{i}"]) for i in range(2))
    Hu, Hv, again = H.matmat(u), H.matmat(v), H.matmat(u)
    both = H.matmat({name: u[name] + v[name] for name in u})
    summed = {name: Hu[name] + Hv[name] for name in Hu}
    limit = tolerated(H)
    checks = [
        Check("symmetry", "<u, Hv> = <v, Hu>", symmetry(H, u, v, Hu, Hv), limit),
        Check("repeatability", "the same product twice", difference(H, Hu, again), limit),
        Check("linearity", "H(u + v) = Hu + Hv", difference(H, summed, both), limit),
    ]
    partners: list[Operator] = []
    other = rebatched(problem) if problem.dropout == "off" else None
    if other is not None:
        split = hessian(other, space, engine)
        partners.append(split)
        gap = difference(H, Hu, split.matmat(u))
        checks.append(Check("token weighting", "other batches of the same sequences", gap, limit))
    reference, limit_of_difference = _finite_difference(problem, space)
    partners.append(reference)
    # The same random signs, in the reference's own dtype.
    expected = reference.matmat(reference.space.rademacher(seed, ["verify/0"]))
    gap = difference(H, expected, Hu)
    checks.append(
        Check("finite difference", "central differences of the gradient", gap, max(limit, limit_of_difference))
    )
    return checks, partners


def _finite_difference(problem: Problem, space: Space) -> tuple[Operator, float]:
    """The finite-difference operator and what may be expected of it, on a float64 copy of a narrower model.

    Dropout masks depend on the dtype they are drawn in, so that a frozen mask forbids the copy.
    """
    twin, wide = in_float64(problem, space)
    exact = all(p.dtype == torch.float64 for p in twin.model.parameters())
    with precision(None):  # what is asked for is that of the operator which is checked
        reference = hessian(twin, wide, "finite-difference")
    return reference, _DIFFERENCE_LIMIT["float64" if exact else "own"]


def rebatched(problem: Problem) -> Problem | None:
    """The same sequences in other batches: single ones, or pairs where they were single; None where neither works."""
    batches = list(problem.batches)
    if any(_rows(b) > 1 for b in batches):
        split = [single for b in batches for single in _singles(b)]
        return problem.related(batches=split)
    pairs = _pairs(batches)
    return problem.related(batches=pairs) if pairs is not None else None


def _rows(batch: Any) -> int:
    """The common first dimension of a batch's tensors, or 1 where they have none in common."""
    sizes = {x.shape[0] if x.dim() else 0 for x in tree_leaves(batch) if isinstance(x, Tensor)}
    return sizes.pop() if len(sizes) == 1 else 1


def _singles(batch: Any) -> Iterator[Any]:
    rows = _rows(batch)
    for i in range(rows):
        yield tree_map(lambda x, i=i: x[i : i + 1] if isinstance(x, Tensor) and rows > 1 else x, batch)


def _pairs(batches: list[Any]) -> list[Any] | None:
    """Neighbours joined, if there are two and they are plain sequences of tokens with labels or equal in shape."""
    if len(batches) < 2:
        return None
    first, second = batches[0], batches[1]
    if isinstance(first, dict) and all(set(b) == {"input_ids", "labels"} for b in (first, second)):
        return [_padded_pair(first, second), *batches[2:]]
    leaves = [[x.shape for x in tree_leaves(b) if isinstance(x, Tensor)] for b in (first, second)]
    if leaves[0] != leaves[1]:
        return None
    return [tree_map(lambda x, y: torch.cat([x, y]) if isinstance(x, Tensor) else x, first, second), *batches[2:]]


def _padded_pair(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    [pair] = batches_of_sequences([first["input_ids"][0], second["input_ids"][0]], 2)
    labels = torch.full_like(pair["input_ids"], -100)
    for row, batch in enumerate((first, second)):
        labels[row, : batch["labels"].shape[1]] = batch["labels"][0]
    return {**pair, "labels": labels}
