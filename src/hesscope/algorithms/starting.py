"""Start vectors: as the caller gives them, as the record keeps them, and as a Krylov run uses several at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.results import Eigenpairs
from hesscope.space import Vectors, vectors
from hesscope.space.digests import sha256

#: The random part of a warm start, relative to the rest: what the earlier vectors lack is found from it.
_FRESH = 1.0


def start_vectors(H: Operator, start: Eigenpairs | Tensor | dict[str, Tensor] | None) -> Vectors | None:
    """The vectors of an earlier result, or those of a tensor [n], [n, j] or one of {name: tensor}.

    Raises HesscopeError for another size or selection, and for vectors that are zero or not finite.
    """
    if start is None:
        return None
    V = _read(H, start)
    norms = H.space.norms(V)
    if not bool(((norms > 0) & (norms < math.inf)).all()):
        raise HesscopeError("Expected a start vector other than zero, with finite entries.")
    return V


def _read(H: Operator, start: Eigenpairs | Tensor | dict[str, Tensor]) -> Vectors:
    if isinstance(start, Eigenpairs):
        if {name: tuple(v.shape[1:]) for name, v in start.vectors.items()} != {
            c.name: c.whole.shape for c in H.space.coordinates
        }:
            raise HesscopeError(
                "Expected start to be a result on the same selection as this operator; select it again."
            )
        return vectors_of(H, start)
    if isinstance(start, dict):
        return H.space.from_dict(start)
    if start.dim() not in (1, 2) or start.shape[0] != H.space.size or start.numel() == 0:
        raise HesscopeError(f"Expected a start vector of shape [{H.space.size}], got {list(start.shape)}.")
    return H.space.unflatten(start if start.dim() == 2 else start[:, None])


def vectors_of(H: Operator, pairs: Eigenpairs) -> Vectors:
    """A result's eigenvectors as vectors of an operator on the same selection."""
    return vectors.in_dtype(H.space.place(H.space.own(pairs.vectors)), H.dtype)


def start_digest(H: Operator, given: Vectors | None) -> str | None:
    """A SHA-256 of start vectors, for the record."""
    if given is None:
        return None
    return sha256(H.space, given)


def warm_start(H: Operator, given: Vectors | None, seed: int) -> Vectors:
    """One start vector: random, or the sum of the unit vectors given plus a random one of the same length.

    A Krylov space of the sum of j near-eigenvectors has them all after j steps. Without the random part a direction that
    has become extreme since, orthogonal to all of them, would be overlooked; `emergence` says when it has been long enough in the run.
    """
    random = H.space.gaussian(seed, ["start"])
    if given is None:
        return random
    weights = (1.0 / H.space.norms(given))[:, None]
    total = H.space.combine(given, weights)
    length = float(H.space.norms(total))
    if length == 0:
        return random
    return vectors.add(total, random, _FRESH * length / float(H.space.norms(random)))


def unit_columns(H: Operator, V: Vectors) -> Vectors:
    """Every vector divided by its norm."""
    return H.space.combine(V, torch.diag(1.0 / H.space.norms(V)))
