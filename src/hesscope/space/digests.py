"""A digest of vectors: the same whether processes hold them whole or divided."""

from __future__ import annotations

import hashlib

from hesscope.digest import update_with_bytes, update_with_outline, update_with_tensor
from hesscope.space.divided import Divided
from hesscope.space.space import Space
from hesscope.space.vectors import Vectors

#: Hexadecimal digits that a record keeps.
_DIGITS = 16


def sha256(space: Space, V: Vectors) -> str:
    """A SHA-256 of every part's dtype, shape and bytes. Processes that hold them between them all call it."""
    digest = hashlib.sha256()
    for name, part in space.kept(V, gather=False).items():
        if not isinstance(part, Divided):
            update_with_tensor(digest, part)
            continue
        update_with_outline(digest, part.dtype, part.shape)
        for k in range(part.shape[0]):
            update_with_bytes(digest, space.gathered({name: V[name][k : k + 1]})[name])
    return digest.hexdigest()


class Digest:
    """The first digits of the digest of an operator's own vectors, found once; anew where they were written to since."""

    def __init__(self, space: Space, V: Vectors) -> None:
        self._space, self._V = space, V
        self._found: tuple[tuple[int, ...], str] | None = None

    def __str__(self) -> str:
        written = tuple(0 if part.is_inference() else part._version for part in self._V.values())
        if self._found is None or self._found[0] != written:
            self._found = written, sha256(self._space, self._V)[:_DIGITS]
        return self._found[1]
