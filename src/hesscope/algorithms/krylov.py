"""The Lanczos process with full reorthogonalisation.

    A Q_m = Q_m T_m + beta_m q_(m+1) e_m^T

(Lanczos, 1950; Golub and Van Loan, section 10.1.) T is kept in float64 on the CPU; Q stays per parameter, [m, *shape].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.probing import require_finite
from hesscope.operators import Operator
from hesscope.space import Vectors, vectors

_GROWTH = 1.5


class Krylov:
    """A Lanczos run under way.

    Differences from the textbook: two passes of classical Gram-Schmidt against the whole basis in every step (numerics);
    where the Krylov space ends early, `restart` continues with a fresh random direction and beta = 0, which is how a
    multiple eigenvalue or the kernel of A is found, and otherwise the run is over.
    """

    def __init__(self, H: Operator, start: Vectors, seed: int, restart: bool) -> None:
        self._H, self._seed, self._restart = H, seed, restart
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self._next = self._unit(start)
        self._starts = [0]
        self._rows: Vectors = {name: part.new_empty(8, *part.shape[1:]) for name, part in start.items()}
        self.ended = False

    @property
    def m(self) -> int:
        """Steps made."""
        return len(self.alphas)

    @property
    def basis(self) -> Vectors:
        """The orthonormal basis so far, m vectors."""
        return vectors.columns(self._rows, 0, self.m)

    @property
    def T(self) -> Tensor:
        """The projected operator, [m, m] float64."""
        off = torch.tensor(self.betas[: max(self.m - 1, 0)], dtype=torch.float64)
        on = torch.tensor(self.alphas, dtype=torch.float64)
        return torch.diag(on) + torch.diag(off, 1) + torch.diag(off, -1)

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
        self._append(self._next)
        # The stored row, whose layout a resumed run shares: products of the same numbers laid out otherwise may round otherwise.
        q = vectors.columns(self._rows, self.m, self.m + 1)
        w = self._H.matmat(q)
        require_finite(self._H, w)
        self.alphas.append(float(self._H.space.inner(q, w)))
        w = self._orthogonal(w)
        beta = float(self._H.space.norms(w))
        if beta > self._negligible():
            self.betas.append(beta)
            self._next = self._unit(w)
            return
        self.betas.append(0.0)
        self.ended = self.m == self._H.space.size or not self._restart
        if not self.ended:
            self._starts.append(self.m)
            self._next = self._unit(self._orthogonal(self._H.space.gaussian(self._seed, [f"restart/{self.m}"])))

    def state(self) -> dict[str, Any]:
        """Everything but the operator, the basis as a view."""
        return {"alphas": self.alphas, "betas": self.betas, "starts": self._starts, "ended": self.ended,
                "next": self._next, "basis": self.basis}  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where a state was taken."""
        self.alphas, self.betas, self._starts, self.ended = (state[k] for k in ("alphas", "betas", "starts", "ended"))
        self._next, self._rows = self._H.space.place(state["next"]), self._H.space.place(state["basis"])

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [m] and eigenvectors [m, m] of T, ascending."""
        values, S = torch.linalg.eigh(self.T)
        return values, S

    def _negligible(self) -> float:
        """Below this, beta is rounding and not a direction: of the basis (by |A|), or of the last product (by |A q_m|).

        The vectors' rounding, not the parameters': behind an outlier beta is soon a few percent of it, which for
        half-precision parameters would pass for rounding. A direction that is noise of the product does no harm.
        """
        eps = torch.finfo(self._H.dtype).eps
        scale = max(*map(abs, self.alphas), *self.betas, 0.0)
        product = math.hypot(self.alphas[-1], self.betas[-1] if self.betas else 0.0)
        return max(10 * eps * scale, 100 * eps * product)

    def _orthogonal(self, w: Vectors) -> Vectors:
        space, Q = self._H.space, vectors.columns(self._rows, 0, self.m)
        for _ in range(2):
            w = vectors.add(w, space.combine(Q, space.inner(Q, w)), -1.0)
        return w

    def _unit(self, w: Vectors) -> Vectors:
        return vectors.scale(w, 1.0 / float(self._H.space.norms(w)))

    def _append(self, q: Vectors) -> None:
        for name, part in q.items():
            rows = self._rows[name]
            if self.m == rows.shape[0]:
                grown = rows.new_empty(int(self.m * _GROWTH) + 1, *rows.shape[1:])
                grown[: self.m] = rows
                self._rows[name] = rows = grown
            rows[self.m] = part[0]
