"""Perplexity against its logarithm: two Hessians computed apart, and what they differ by."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscope.algorithms import block
from hesscope.algorithms.driver import provenance
from hesscope.engines import make_engine
from hesscope.engines.base import parameter_values
from hesscope.errors import HesscopeError
from hesscope.operators import hessian
from hesscope.operators.free import short_of
from hesscope.operators.risk import CurvatureOfRisk
from hesscope.problem import Problem, select
from hesscope.results import PerplexityStudy
from hesscope.space import Space

#: How many roundings of the largest matrix may add up in the difference.
_ROUNDINGS = 30.0


def perplexity_study(problem: Problem, space: Space | None = None) -> PerplexityStudy:
    """The Hessians of the risk R and of the perplexity P = exp(R), and the check of H_P - P H = P g g^T.

    H comes from `hs.block` on the risk, batch by batch. H_P is computed another way, without the formula: exp of the
    total over N is one scalar in one graph over all batches, differentiated twice, column by column. So the check can fail.

    Costs n products of either kind, the memory of one graph over all the data, and six matrices [n, n].

    Raises:
        HesscopeError: a graph over all the data, or the matrices, would not fit in memory.

    Example:
        >>> import torch, hesscope as hs
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> X, y = torch.ones(2, 1).double(), torch.tensor([[0.0], [1.0]]).double()
        >>> hs.perplexity_study(hs.supervised(model, [(X, y)], loss="mse")).verdict
        'confirmed'
    """
    began = time.perf_counter()
    space = (select(problem) if space is None else space).whole
    of_risk = hessian(problem.related(objective="nll"), space)
    assert isinstance(of_risk, CurvatureOfRisk)
    _require_memory(of_risk.problem, space)
    found = block(of_risk)
    risk, gradient = of_risk.risk_and_gradient()
    g = space.flatten(gradient)[:, 0].to("cpu", torch.float64)
    of_risk.release()
    columns = _joint_hessian(of_risk.problem, space).to("cpu", torch.float64)
    H, H_P = found.matrix.to("cpu", torch.float64), 0.5 * (columns + columns.T)
    P = math.exp(risk)
    asymmetry = max(_relative((columns - columns.T).norm(), columns.norm()), found.asymmetry)
    eps = max(torch.finfo(c.dtype).eps for c in space.coordinates)
    checked = compare(H, H_P, g, P, max(asymmetry, eps))
    record = provenance(of_risk, {}) | {"problem": problem.describe(), "probe": found.provenance.get("probe")}
    return PerplexityStudy(
        products=of_risk.products + space.size,
        units=of_risk.units + 3.0 + 6.0 * space.size,
        seconds=time.perf_counter() - began,
        provenance=record,
        hessian=found.matrix,
        perplexity_hessian=H_P.to(found.matrix.dtype),
        eigenvalues=torch.linalg.eigvalsh(H),
        perplexity_eigenvalues=torch.linalg.eigvalsh(H_P),
        gradient=g,
        labels=found.labels,
        risk=risk,
        perplexity=P,
        gradient_norm=float(g.norm()),
        residual=checked.residual,
        rounding=checked.rounding,
        rank_ratio=checked.rank_ratio,
        angle=checked.angle,
    )


@dataclass(frozen=True)
class RankOneCheck:
    """How far D = H_P - P H is from P g g^T; see `PerplexityStudy`."""

    residual: float
    rounding: float
    rank_ratio: float
    angle: float


def compare(H: Tensor, H_P: Tensor, g: Tensor, P: float, eps: float) -> RankOneCheck:
    """Hold H_P - P H to P g g^T, where both matrices are known to a relative `eps`.

    Rounding of D is that of the matrices it is a difference of, so relative to |D| it is eps (|H_P| + P |H|) / |D|.
    """
    D = H_P - P * H
    size = float(D.norm())
    rounding = _ROUNDINGS * eps * float(H_P.norm() + P * H.norm())
    if size == 0.0:
        # No difference is right where there is no gradient, and wrong where there is one.
        missing = P * float(g.norm()) ** 2
        return RankOneCheck(0.0 if missing <= rounding else math.inf, 0.0, 0.0, 0.0)
    values, vectors = torch.linalg.eigh(D)
    order = values.abs().argsort(descending=True)
    leading = vectors[:, order[0]]
    cosine = abs(float(leading @ g)) / float(g.norm()) if float(g.norm()) > 0 else 0.0
    # The sine is accurate for small angles, where the cosine rounds to one.
    across = float((g / max(float(g.norm()), 1e-300) - (leading @ g).sign() * cosine * leading).norm())
    return RankOneCheck(
        residual=float(torch.addr(D, g, g, alpha=-P).norm()) / size,
        rounding=rounding / size,
        rank_ratio=float(values[order[1]].abs() / values[order[0]].abs()) if len(values) > 1 else 0.0,
        angle=math.degrees(math.atan2(across, cosine)),
    )


def _joint_hessian(problem: Problem, space: Space) -> Tensor:
    """The matrix of second derivatives of exp(total / N), [n, n], from one graph over all batches; not symmetrised."""
    leaves = {name: p.requires_grad_() for name, p in parameter_values(problem, space).items()}
    parameters = list(leaves.values())
    with torch.enable_grad():
        totals = [problem.total(b, leaves)[0] for b in range(len(problem.batches))]
        perplexity = (torch.stack([t.reshape(()) for t in totals]).sum() / problem.N).exp()
    if not perplexity.requires_grad:
        return torch.zeros(space.size, space.size, dtype=space.dtype)
    first = torch.autograd.grad(perplexity, parameters, create_graph=True, materialize_grads=True)
    entries = torch.cat([c.gather(d).reshape(-1) for c, d in zip(space.coordinates, first, strict=True)])
    columns = torch.zeros(space.size, space.size, dtype=space.dtype)
    for j in range(space.size if entries.requires_grad else 0):
        second = torch.autograd.grad(entries[j], parameters, retain_graph=True, materialize_grads=True)
        parts = [c.gather(d).reshape(-1) for c, d in zip(space.coordinates, second, strict=True)]
        columns[:, j] = torch.cat(parts).to(columns)
    return columns


def _require_memory(problem: Problem, space: Space) -> None:
    """Measure the graph of the longest batch and hold all of them to the free memory."""
    longest = max(range(len(problem.batches)), key=lambda b: problem.counts[b])
    comm = problem.comm
    one = comm.on_all(lambda: make_engine("reverse-over-reverse").linearize(problem, longest, space).bytes)
    graph = math.ceil(one * problem.N / problem.counts[longest])
    matrices = 6 * space.size**2 * 8
    for wanted, device, what in (
        (graph, problem.device, "one graph over all the data"),
        (matrices, torch.device("cpu"), f"six matrices {space.size} x {space.size}"),
    ):
        if (short := short_of(comm, {device: wanted})) is not None:
            _, needed, free = short
            raise HesscopeError(
                f"Expected {what} to fit in memory: about {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} are "
                "free; use fewer or shorter sequences, or select fewer coordinates."
            )


def _relative(gap: Tensor, scale: Tensor) -> float:
    return float(gap / scale) if float(scale) > 0 else 0.0
