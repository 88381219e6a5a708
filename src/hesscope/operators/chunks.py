"""How many vectors at once."""

from __future__ import annotations

from hesscope.operators.base import Operator

_CHUNK_BYTES = 256 * 2**20
_LARGEST_CHUNK = 16


def chunk_size(H: Operator) -> int:
    """Vectors handed to one `matmat`: enough to share its fixed cost, few enough to stay small in memory."""
    return max(1, min(_LARGEST_CHUNK, _CHUNK_BYTES // (H.space.size * H.dtype.itemsize)))
