"""For a Hessian: v_s * (H_s v_s) summed over the sequences s, each with a probe of its own."""

from __future__ import annotations

from typing import Any

from hesscope.algorithms.diagonals.drawn import Drawn
from hesscope.algorithms.diagonals.estimate import Limits
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.space import Vectors


class PerSequence(Drawn):
    """Draws with a probe a sequence; `groups` in the record says how many of them there are."""

    method = "per-sequence"

    def __init__(self, H: Operator, limits: Limits, seed: int) -> None:
        super().__init__(H, limits, seed)
        if not H.probed_groups:
            names = ", ".join(H.space.names[:3])
            raise HesscopeError(
                "Expected the Hessian of a problem (hs.hessian, engine='auto') over rows, columns or the whole of linear layers' "
                f"weights for method='per-sequence', got {H!r} over {names}; use method='hutchinson'."
            )

    def draw(self, number: int) -> Vectors:
        return self._H.probe_diagonal(self._seed, number)

    def record(self) -> dict[str, Any]:
        return {"groups": self._H.probed_groups}
