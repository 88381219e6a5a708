"""The Lanczos process in its three-term form: T and the quadrature, without a basis.

    beta_j q_(j+1) = A q_j - alpha_j q_j - beta_(j-1) q_(j-1)

In finite precision the q_j lose their orthogonality once a Ritz value has converged, and copies of it ("ghosts") appear.
Their weights add up to that of the eigenvalue (Greenbaum, 1989: T is that of a nearby problem whose eigenvalues lie in tiny
clusters), so quadrature stays right; there are only fewer distinct nodes for the same steps. Copies are joined, so that
they do not pass for eigenvalues of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.space import Vectors, vectors

#: How far apart the copies of a node may be, of the largest: so many roundings of the vectors, or this part of the
#: parameters' own, whichever is more (numerics). Half-precision products scatter them by more than the vectors round.
_OF_VECTORS, _OF_PARAMETERS = 30, 0.25
#: Nor farther than this part of the node: what lies that near zero is no copy but noise, and f may change fast there.
_OF_NODE = 0.1


class ThreeTerm:
    """A Lanczos run under way that holds three vectors: q_j, q_(j-1) and the product."""

    def __init__(self, H: Operator, start: Vectors) -> None:
        self._H = H
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self._q = vectors.scale(start, 1.0 / float(H.space.norms(start)))
        self._before: Vectors = H.space.zeros()
        self.ended = False

    @property
    def m(self) -> int:
        """Steps made."""
        return len(self.alphas)

    @property
    def T(self) -> Tensor:
        """Tridiagonal, [m, m] float64."""
        off = torch.tensor(self.betas[: max(self.m - 1, 0)], dtype=torch.float64)
        return torch.diag(torch.tensor(self.alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)

    @property
    def residual_norm(self) -> float:
        """beta_m."""
        return self.betas[-1]

    def step(self) -> None:
        """One product."""
        q = self.begin()
        self.finish(q, self._H.matmat(q))

    def begin(self) -> Vectors:
        """The vector that the next step multiplies."""
        return self._q

    def finish(self, q: Vectors, w: Vectors) -> None:
        """The step, with the product A q at hand."""
        space = self._H.space
        require_finite(self._H, w)
        if self.betas:
            # Before alpha is taken: the variant that Paige (1972) found the most stable.
            w = vectors.add(w, self._before, -self.betas[-1])
        alpha = float(space.inner(q, w))
        w = vectors.add(w, q, -alpha)
        beta = float(space.norms(w))
        self.alphas.append(alpha)
        scale = max(*map(abs, self.alphas), *self.betas, 0.0)
        self.ended = beta <= 10 * torch.finfo(self._H.dtype).eps * scale
        self.betas.append(0.0 if self.ended else beta)
        if not self.ended:
            self._before, self._q = q, vectors.scale(w, 1.0 / beta)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [m] and eigenvectors [m, m] of T, ascending, copies included."""
        values, S = torch.linalg.eigh(self.T)
        return values, S

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights, copies of a node joined; see `joined`."""
        values, S = self.ritz()
        eps, rounding = torch.finfo(self._H.dtype).eps, self._H.space.rounding
        reach = max(_OF_VECTORS * eps, _OF_PARAMETERS * rounding) * float(values.abs().max())
        return joined(values, S[0] ** 2, reach)

    def state(self) -> dict[str, Any]:
        """Everything but the operator."""
        return {"alphas": self.alphas, "betas": self.betas, "ended": self.ended, "q": self._q, "before": self._before}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where a state was taken."""
        self.alphas, self.betas, self.ended = state["alphas"], state["betas"], state["ended"]
        self._q, self._before = self._H.space.place(state["q"]), self._H.space.place(state["before"])


def joined(nodes: Tensor, weights: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """Nodes [m] and weights [m] with the copies of each node made one, at their weighted mean; the weights add up as before.

    A node t of weight w is a copy of a heavier one, T of weight W, where |t - T| sqrt(w / W) <= min(reach, |T| / 10), of the
    nearest where there are several. Copies of equal weight lie within the reach; one that is only coming up lies far
    off, with next to no weight. No node is a copy of a copy, so they do not chain: what is joined to T moves, weighed by
    sqrt(w / W), by no more than the reach, and a sum over nodes changes as little as by a rounding of T.
    """
    order = weights.argsort(descending=True, stable=True)
    t, w = nodes[order], weights[order]
    bound = (_OF_NODE * t.abs()).clamp(max=reach)
    group, heads = torch.zeros(len(t), dtype=torch.long), torch.zeros(len(t), dtype=torch.bool)
    for i in range(len(t)):
        far = (t[i] - t).abs()
        eligible = heads & (far * (w[i] / w).nan_to_num(0.0).sqrt() <= bound)
        heads[i] = not bool(eligible.any())
        group[i] = i if heads[i] else torch.where(eligible, far, torch.inf).argmin()
    total = torch.zeros_like(w).index_add(0, group, w)[heads]
    means = torch.zeros_like(w).index_add(0, group, w * t)[heads] / total
    ascending = means.argsort()
    return means[ascending], total[ascending]
