"""For a GGN: squared gradients at labels drawn from the model."""

from __future__ import annotations

from typing import Any

from hesscope.algorithms.diagonals.drawn import Drawn
from hesscope.algorithms.diagonals.estimate import Limits
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.space import Vectors


class Sampled(Drawn):
    """Draws with labels of their own."""

    method = "sampled"

    def __init__(self, H: Operator, limits: Limits, seed: int) -> None:
        super().__init__(H, limits, seed)
        if not H.draws_diagonal:
            raise HesscopeError(
                "Expected the GGN of a language model, a classifier or a regressor (hs.ggn, objective='nll') for "
                "method='sampled', for labels are drawn from the model; use another method for this operator."
            )

    def draw(self, number: int) -> Vectors:
        return self._H.draw_diagonal(self._seed, number)

    def record(self) -> dict[str, Any]:
        return {}
