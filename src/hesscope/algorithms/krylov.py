"""The Lanczos process with full reorthogonalisation, and its thick restart.

    A Q_m = Q_m K_m + beta_m q_(m+1) e_m^T

(Lanczos, 1950; Golub and Van Loan, section 10.1.) K holds all coefficients of the orthogonalisation, so the identity holds
for the products as they came, noise and asymmetry included; T, what K would be for an exactly symmetric A, is what is
diagonalised. Both are float64 on the CPU; Q is a `Basis`. Where that rounds its vectors, the identity holds to rounding only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.basis import Basis, Home
from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.space import Vectors, vectors


class Krylov:
    """A Lanczos run under way.

    Differences from the textbook: after the terms that A's symmetry leaves, a pass of classical Gram-Schmidt against the whole
    basis in every step, and one more where that removed more than rounding (numerics);
    where the Krylov space ends early, `restart` continues with a fresh random direction and beta = 0, which is how a
    multiple eigenvalue or the kernel of A is found, and otherwise the run is over.
    """

    def __init__(
        self, H: Operator, start: Vectors, seed: int, restart: bool, capacity: int, home: Home | None = None
    ) -> None:
        self._H, self._seed, self._restart = H, seed, restart
        self._Q = Basis(H.space, home or Home(), min(capacity, H.space.size))
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self._next = self._unit(start)
        self._starts, self._made = [0], 0
        self._arrow = torch.zeros(0, dtype=torch.float64)
        self._lost = torch.zeros(0, dtype=torch.float64)
        self._K = torch.zeros(0, 0, dtype=torch.float64)
        self.ended = False

    @property
    def m(self) -> int:
        """Vectors in the basis: steps made, until a thick restart."""
        return len(self.alphas)

    @property
    def basis(self) -> Vectors:
        """The orthonormal basis so far, m vectors, where it is kept."""
        return self._Q.rows

    @property
    def T(self) -> Tensor:
        """The projected operator, [m, m] float64: tridiagonal, with an arrow's head of p columns after a restart."""
        off = torch.tensor(self.betas[: max(self.m - 1, 0)], dtype=torch.float64)
        T = torch.diag(torch.tensor(self.alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
        p = len(self._arrow)
        if p < self.m:
            T[p, :p] = T[:p, p] = self._arrow
        return T

    @property
    def newest(self) -> int:
        """Where the newest of the runs that have made a step began: 0 until a restart direction was used."""
        return [s for s in self._starts if s < self.m][-1]

    @property
    def exhausted(self) -> bool:
        """Whether the last step left nothing outside the basis."""
        return self.betas[-1] == 0.0

    @property
    def residual_norm(self) -> float:
        """beta_m, the norm of what the last step left outside the basis."""
        return self.betas[-1]

    def step(self) -> None:
        """One product."""
        q = self.begin()
        self.finish(q, self._H.matmat(q))

    def begin(self) -> Vectors:
        """The vector that the next step multiplies."""
        q = self._Q.append(self._next)
        self._next = {}  # a vector less beside the product
        return q

    def finish(self, q: Vectors, w: Vectors) -> None:
        """The step, with the product A q at hand; w is used up."""
        require_finite(self._H, w)
        self.alphas.append(float(self._H.space.inner(q, w)))
        # The vectors that A q has a part along: itself and the one before, or all of them right after a restart.
        near = self.m if self.m - 1 <= len(self._arrow) else 2
        w, h = self._Q.orthogonalise_(w, near)
        self._made += 1
        self._note_coefficients(h[:, 0])
        beta = float(self._H.space.norms(w))
        if beta > self._negligible(float(h.norm())):
            self.betas.append(beta)
            vectors.scale_(w, 1.0 / beta)
            self._next = w
            return
        self.betas.append(0.0)
        self.ended = self.m == self._H.space.size or not self._restart
        if not self.ended:
            self._starts.append(self.m)
            fresh = self._H.space.gaussian(self._seed, [f"restart/{self._made}"])
            self._next = self._unit(self._Q.orthogonalise(fresh)[0])

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [m], ascending, and eigenvectors [m, m] of T; none mixes an exhausted run with the newest one."""
        c = self.newest
        if c == 0:
            values, S = torch.linalg.eigh(self.T)
            return values, S
        T = self.T
        (before, S_before), (after, S_after) = torch.linalg.eigh(T[:c, :c]), torch.linalg.eigh(T[c:, c:])
        order = torch.cat([before, after]).argsort(stable=True)
        S = T.new_zeros(T.shape)
        S[:c, :c], S[c:, c:] = S_before, S_after
        return torch.cat([before, after])[order], S[:, order]

    def quadrature(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights of the start vector's Gauss quadrature; not after a restart."""
        values, S = self.ritz()
        return values, S[0] ** 2

    def residuals(self, values: Tensor, S_mK: Tensor) -> Tensor:
        """|A v - lambda v| for v = Q s, from the products that were made: A v = sum_j s_j (A q_j).

        By the identity it is |K s - lambda s|, what noise leaves inside the basis, and |beta_m s_m|, what lies outside.
        """
        inside = (self._K @ S_mK - S_mK * values).norm(dim=0)
        outside, lost = self.betas[-1] * S_mK[-1], S_mK.abs().T @ self._lost
        return torch.sqrt(inside**2 + outside**2 + lost**2)

    def combine(self, S_mK: Tensor) -> Vectors:
        """Unit vectors along Q s."""
        V = self._Q.combine(S_mK)
        return self._H.space.combine(V, torch.diag(1.0 / self._H.space.norms(V)))

    def restart(self, values: Tensor, S: Tensor, keep: Tensor) -> None:
        """Go on from the Ritz vectors numbered `keep` and the direction outside the basis (Wu and Simon, 2000).

        With v_i = Q s_i and A v_i = lambda_i v_i + beta_m s_mi q_(m+1) the kept vectors satisfy a Lanczos identity whose
        T begins with an arrow: lambda_i on the diagonal and beta_m s_mi beside it. Vectors of exhausted runs come first.
        """
        closed = S[self.newest :, keep].norm(dim=0) == 0 if self.newest else torch.zeros(len(keep), dtype=torch.bool)
        keep = torch.cat([keep[closed], keep[~closed]])
        S_mp, c, pending = S[:, keep], int(closed.sum()), self._starts[-1] == self.m
        K_mp = self._K @ S_mp
        inside = S_mp.T @ K_mp
        self._lost = ((K_mp - S_mp @ inside).norm(dim=0) ** 2 + (S_mp.abs().T @ self._lost) ** 2).sqrt()
        self._arrow = self.betas[-1] * S_mp[-1]
        self._Q.rotate(S_mp)
        self._K, self.alphas, self.betas = inside, values[keep].tolist(), [0.0] * len(keep)
        self._starts = sorted({0, c, *([self.m] if pending else [])})

    def state(self) -> dict[str, Any]:
        """Everything but the operator, the basis as a view."""
        return {"alphas": self.alphas, "betas": self.betas, "starts": self._starts, "ended": self.ended,
                "made": self._made, "arrow": self._arrow, "lost": self._lost, "coefficients": self._K,
                "next": self._next, "basis": self._Q.stored}  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where a state was taken."""
        self.alphas, self.betas, self._starts, self.ended = (state[k] for k in ("alphas", "betas", "starts", "ended"))
        self._made, self._arrow, self._lost, self._K = (state[k] for k in ("made", "arrow", "lost", "coefficients"))
        self._next = self._H.space.place(state["next"])
        self._Q.restore(state["basis"])

    def _note_coefficients(self, h_m: Tensor) -> None:
        """K's new column, and its new row: what couples the new vector to those before it."""
        m, p = self.m, len(self._arrow)
        K = torch.zeros(m, m, dtype=torch.float64)
        K[: m - 1, : m - 1], K[:, m - 1] = self._K, h_m
        if m - 1 == p:
            K[p, :p] = self._arrow
        elif m > 1:
            K[m - 1, m - 2] = self.betas[-1]
        self._K = K
        self._lost = torch.cat([self._lost, torch.zeros(1, dtype=torch.float64)])

    def _negligible(self, inside: float) -> float:
        """Below this, beta is rounding and not a direction: of the basis (by |A|), or of the last product (by |A q_m|).

        The vectors' rounding, not the parameters': behind an outlier beta is soon a few percent of it, which for
        half-precision parameters would pass for rounding. A direction that is noise of the product does no harm.
        """
        eps = torch.finfo(self._H.dtype).eps
        scale = max(*map(abs, self.alphas), *self.betas, 0.0)
        before = float(self._arrow.norm()) if self.m - 1 == len(self._arrow) else self.betas[-1]
        # Two passes against a rounded basis leave its rounding squared of what lies inside it.
        left = 10 * self._Q.rounding**2 * inside
        return max(10 * eps * scale, 100 * eps * math.hypot(self.alphas[-1], before), left)

    def _unit(self, w: Vectors) -> Vectors:
        return self._H.space.combine(w, 1.0 / self._H.space.norms(w)[:, None])
