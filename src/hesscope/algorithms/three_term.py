"""The Lanczos process in its three-term form: T and the quadrature, without a basis.

    beta_j q_(j+1) = A q_j - alpha_j q_j - beta_(j-1) q_(j-1)

In finite precision the q_j lose their orthogonality once a Ritz value has converged, and copies of it ("ghosts") appear.
Their weights add up to that of the eigenvalue (Greenbaum, 1989: T is that of a nearby problem whose eigenvalues lie in tiny
clusters), so quadrature stays right; there are only fewer distinct nodes for the same steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.space import Vectors, vectors

#: Nodes closer than so many roundings of the largest are copies of one.
_COPIES = 1e4


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
        """Nodes and weights, copies joined: the weighted mean, and the sum of the weights.

        A copy that is only coming up lies apart and has no weight to speak of; it is left out.
        """
        values, S = self.ritz()
        weights = S[0] ** 2
        eps = torch.finfo(self._H.dtype).eps
        apart = _COPIES * eps * float(values.abs().max())
        group = torch.cat([torch.zeros(1), (values.diff() > apart).double()]).cumsum(0).long()
        count = int(group[-1]) + 1
        joined = torch.zeros(count, dtype=torch.float64).index_add(0, group, weights)
        places = torch.zeros(count, dtype=torch.float64).index_add(0, group, weights * values)
        kept = joined > eps**2
        return places[kept] / joined[kept], joined[kept]

    def state(self) -> dict[str, Any]:
        """Everything but the operator."""
        return {"alphas": self.alphas, "betas": self.betas, "ended": self.ended, "q": self._q, "before": self._before}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where a state was taken."""
        self.alphas, self.betas, self.ended = state["alphas"], state["betas"], state["ended"]
        self._q, self._before = self._H.space.place(state["q"]), self._H.space.place(state["before"])
