"""An output projection a = W h + b and the logits z = f(a), for a chunk of tokens at a time.

Nothing of the logits' size outlives its chunk. Half-precision products W h are raised to float32, as logits are, and sums over
chunks are at least float32. Legend: T tokens that count, V classes, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hesscope.arithmetic import unrounded
from hesscope.losses.logits_map import AS_THEY_ARE, LogitsMap, Slope
from hesscope.memory import kind_of

#: What a chunk of tokens takes beside what comes in and goes out: on a CPU no more than makes products of matrices fast.
_CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 256 * 2**20}
#: A projection's output that takes no more is kept between products.
_KEPT_BYTES = 64 * 2**20
#: Fewer tokens make these products slow.
_LEAST_ROWS = 128
#: Tensors of a chunk's logits' size that are there at once.
_AT_ONCE = 3

#: Something of h, of W and of b; None where there is none.
Parts = list[Tensor | None]


@dataclass(frozen=True)
class HeadForm:
    """What the logits go through, the tokens a chunk, and whether the projection's output is kept between products.

    By default it is kept where it is small, for it saves one of seven products of matrices.
    """

    map: LogitsMap = AS_THEY_ARE
    rows: int | None = None
    keep: bool | None = None

    def most(self, weight: Tensor) -> int:
        """The largest number of tokens of a chunk."""
        fit = _CHUNK_BYTES.get(kind_of(weight.device), 64 * 2**20) // (_AT_ONCE * len(weight) * max(weight.itemsize, 4))
        return self.rows or max(fit, _LEAST_ROWS)

    def keeps(self, T: int, weight: Tensor) -> bool:
        """Whether the projection's output of T tokens is kept."""
        return T * len(weight) * max(weight.itemsize, 4) <= _KEPT_BYTES if self.keep is None else self.keep

    def slices(self, T: int, weight: Tensor) -> list[slice]:
        """T tokens in chunks of nearly equal size."""
        most = self.most(weight)
        count = -(-T // most)
        size = -(-T // max(count, 1))
        return [slice(start, min(start + size, T)) for start in range(0, T, max(size, 1))]


class ChunkedHead:
    """What the passes over an output projection share: h, W, b, the targets, and the chunks."""

    def __init__(
        self,
        h_Td: Tensor,
        W_Vd: Tensor,
        b_V: Tensor | None,
        y_T: Tensor,
        form: HeadForm,
        kept_TV: Tensor | None = None,
    ) -> None:
        self.h_Td, self.W_Vd, self.b_V, self.y_T, self.form = h_Td, W_Vd, b_V, y_T, form
        #: The projection's output, where it is kept.
        self.kept_TV = kept_TV
        self.slices = form.slices(len(h_Td), W_Vd)
        #: Sums over chunks and everything of a chunk's logits' size.
        self.wide = W_Vd.dtype if W_Vd.itemsize >= 4 else torch.float32
        self._rooms: dict[str, Tensor] = {}

    def room(self, name: str, rows: slice) -> Tensor:
        """Memory for a chunk's tensor of that name: every chunk has the same, for new memory costs the time to touch it."""
        if name not in self._rooms:
            most = max((s.stop - s.start for s in self.slices), default=0)
            self._rooms[name] = self.h_Td.new_empty(most, len(self.W_Vd), dtype=self.wide)
        return self._rooms[name][: rows.stop - rows.start]

    def keep(self) -> int:
        """Keep the projection's output if the form says so; returns its bytes."""
        if not self.form.keeps(len(self.h_Td), self.W_Vd):
            return 0
        kept_TV = self.h_Td.new_empty(len(self.h_Td), len(self.W_Vd), dtype=self.wide)
        for rows in self.slices:
            kept_TV[rows] = self.projected(rows)
        self.kept_TV = kept_TV
        return kept_TV.nbytes

    def projected(self, rows: slice) -> Tensor:
        """The projection's output, in memory that may be written to until the next chunk."""
        if self.kept_TV is not None:
            return self.room("projected", rows).copy_(self.kept_TV[rows])
        with unrounded():
            return F.linear(self.h_Td[rows], self.W_Vd, self.b_V).to(self.wide)

    def residual(self, z_TV: Tensor, normaliser_T: Tensor, rows: slice) -> Tensor:
        """p - e_y, in the memory of z."""
        return self.less_target(z_TV.sub_(normaliser_T[rows, None]).exp_(), rows)

    def less_target(self, p_TV: Tensor, rows: slice) -> Tensor:
        """p - e_y, in the memory of p."""
        places = self.y_T[rows, None]
        return p_TV.scatter_add_(1, places, p_TV.new_full((), -1.0).expand(places.shape))

    def zeros(self, wanted: tuple[bool, ...]) -> Parts:
        """Sums in h, W and b, zero; None where not wanted."""
        parts = (self.h_Td, self.W_Vd, self.b_V)
        return [
            torch.zeros_like(x, dtype=self.wide, memory_format=torch.contiguous_format)
            if want and x is not None
            else None
            for x, want in zip(parts, wanted, strict=True)
        ]

    def tangent(self, rows: slice, u_h: Tensor | None, u_W: Tensor | None, u_b: Tensor | None) -> Tensor:
        """q = u_h W^T + h u_W^T + u_b, the projection's derivative along u; None is zero. Its memory is as `projected`'s."""
        q_TV: Tensor | None = None
        for x, y in ((u_h, self.W_Vd), (self.h_Td, u_W)):
            if x is not None and y is not None:
                q_TV = self._product(x[rows], y, rows) if q_TV is None else q_TV.addmm_(x[rows], y.T)
        if q_TV is None:
            q_TV = self.h_Td.new_zeros(len(self.h_Td[rows]), len(self.W_Vd))
        q_TV = q_TV.to(self.wide)
        return q_TV if u_b is None else q_TV.add_(u_b)

    def _product(self, x: Tensor, y: Tensor, rows: slice) -> Tensor:
        if x.dtype == y.dtype == self.wide:
            return torch.mm(x, y.T, out=self.room("tangent", rows))
        return F.linear(x, y)

    def dot(self, x_TV: Tensor, y_TV: Tensor, rows: slice) -> Tensor:
        """The inner product of two tensors of the logits' shape, for every token."""
        return torch.mul(x_TV, y_TV, out=self.room("dot", rows)).sum(-1)

    def add_transposed(self, into: Parts, rows: slice, A_TV: Tensor, x_Td: Tensor, W_Vd: Tensor) -> None:
        """Add A W to the rows of h's part, A^T x to W's, and the column sums of A to b's."""
        A_narrow = A_TV.to(W_Vd.dtype)
        if into[0] is not None:
            _add_mm(into[0][rows], A_narrow, W_Vd)
        if into[1] is not None:
            _add_mm(into[1], A_narrow.T, x_Td)
        if into[2] is not None:
            into[2] += A_TV.sum(0)

    def narrowed(self, parts: Parts) -> tuple[Tensor | None, ...]:
        """In the dtypes of h, W and b."""
        inputs = (self.h_Td, self.W_Vd, self.b_V)
        return tuple(
            x if x is None or like is None else x.to(like.dtype) for x, like in zip(parts, inputs, strict=True)
        )


def _add_mm(into: Tensor, x: Tensor, y: Tensor) -> None:
    if x.dtype == into.dtype:
        into.addmm_(x, y)
    else:
        into += x @ y


def scaled(x: Tensor, slope: Slope) -> Tensor:
    """x times a slope, in the memory of x."""
    if slope is None:
        return x.zero_()
    return x if isinstance(slope, float) and slope == 1.0 else x.mul_(slope)
