"""The next-token loss of some positions only, so that logits never stand for all of them at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hesscope.losses.causal_lm import CausalLMLoss
from hesscope.losses.cross_entropy import IGNORED, summed_cross_entropy
from hesscope.losses.tokens import raised

#: Logits of a chunk of positions stay below so many bytes.
_CHUNK_BYTES = 32 * 2**20


class PositionsLoss:
    """`CausalLMLoss` summed over positions `where` of every sequence.

    The model is run on these positions alone, so that this is for what treats positions one by one, such as a model whose
    blocks are stood in for by their outputs.
    """

    def __init__(self, base: CausalLMLoss, where: slice) -> None:
        self._base, self._where = base, where

    def total(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum and count of the positions."""
        targets = self._base.targets(batch)
        some = {name: self._cut(x, targets.shape) for name, x in batch.items()}
        logits, there = self._base.outputs(model, some), targets[:, self._where]
        total = summed_cross_entropy(raised(logits).flatten(0, 1), there.flatten())
        return total, int((there != IGNORED).sum())

    def _cut(self, x: Any, shape: tuple[int, ...]) -> Any:
        return x[:, self._where] if isinstance(x, Tensor) and x.shape[:2] == shape else x


def position_chunks(sequences: int, length: int, bytes_a_row: int) -> list[slice]:
    """Consecutive positions of all sequences, so many that their logits stay small."""
    step = max(1, _CHUNK_BYTES // max(sequences * bytes_a_row, 1))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
