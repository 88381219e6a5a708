"""Leading eigenpairs over the checkpoints of a training run, each search begun where the one before ended."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.algorithms.checkpoint import Checkpoint
from hesscope.algorithms.driver import versions
from hesscope.algorithms.eigs import eigs
from hesscope.algorithms.identity import differences, identity, in_words
from hesscope.algorithms.starting import start_digest, start_vectors, vectors_of
from hesscope.errors import HesscopeError
from hesscope.operators import Operator
from hesscope.results import Eigenpairs, EigsTrack, load
from hesscope.results.base import MANIFEST
from hesscope.space import Space
from hesscope.space.divided import Divided
from hesscope.space.random import resolve_seed


def track_eigs(
    operators: Mapping[str, Operator | Callable[[], Operator]],
    k: int = 6,
    which: str = "LM",
    tol: float = 1e-3,
    max_products: int | None = None,
    seed: int | None = 0,
    folder: str | Path | None = None,
    *,
    cold: bool = False,
    every: float = 60.0,
    restart: bool = False,
    say: Callable[[str], None] | None = None,
    **how: Any,
) -> EigsTrack:
    """The leading eigenpairs at every checkpoint, and the overlap |U_a^T U_b|_F^2 / k of consecutive leading subspaces.

    Every search after the first starts from the sum of the previous eigenvectors and a random vector of the same length, and
    goes on until an eigenvalue that those lack would have been seen.

    Args:
        operators: by name, in the order of training; a function that makes one is called when its turn comes, so that one
            model is in memory at a time. All on the same selection: equal names, shapes and indices.
        k, which, tol, max_products, seed, how: as for `hesscope.eigs`.
        folder: every checkpoint's eigenpairs are saved in a folder of it as soon as they are found. Given again, those
            that are there are not computed again, and a search that was stopped goes on.
        cold: also search from a random start, to count the products that the warm start saves. Doubles the cost.
        every, restart: seconds between checkpoints of a search; compute everything anew.

    Raises:
        HesscopeError: no operators, unequal selections, or a folder that holds another run's eigenpairs.

    Example:
        >>> import torch, hesscope as hs
        >>> a, b = (hs.operator(torch.diag(torch.tensor(d).double())) for d in ([3.0, 2.0, 1.0], [3.0, 1.0, 2.0]))
        >>> hs.track_eigs({"before": a, "after": b}, k=2).overlaps.round(decimals=6)       # one of two directions stays
        tensor([0.5000], dtype=torch.float64)
    """
    if not operators:
        raise HesscopeError("Expected at least one operator to track, got an empty dictionary.")
    wanted: dict[str, Any] = {"k": k, "which": which, "tol": tol, "max_products": max_products, "seed": seed, **how}
    kept = None if folder is None else _Kept(Path(folder), list(operators), every, restart, say)
    track = _Track(which, tol)
    for name, made in operators.items():
        H = made if isinstance(made, Operator) else made()
        if track.seed is None:
            track.seed = wanted["seed"] = H.comm.on_first(lambda: resolve_seed(seed))
        track.require_same(name, H.space)
        if track.last is not None:
            wanted["start"] = track.last
        pairs = eigs(H, **wanted, gather=False) if kept is None else kept.eigs(name, H, wanted)
        without = (
            eigs(H, **(wanted | {"start": how.get("start")}), gather=False) if cold and track.last is not None else None
        )
        track.add(name, H, pairs, without)
        del H, made
    return track.result(cold, {key: value for key, value in wanted.items() if key != "start"})


class _Kept:
    """Eigenpairs by name in folders of one folder."""

    def __init__(
        self, folder: Path, names: list[str], every: float, restart: bool, say: Callable[[str], None] | None
    ) -> None:
        self._every, self._restart, self._say = every, restart, say
        self._folders = {name: folder / slug(name) for name in names}
        if len(set(self._folders.values())) < len(names):
            raise HesscopeError("Expected names that give different folders; rename the checkpoints that do not.")

    def eigs(self, name: str, H: Operator, wanted: dict[str, Any]) -> Eigenpairs:
        """Those that are there, of this very search; otherwise found and saved."""
        folder = self._folders[name]
        if H.comm.on_first(lambda: not self._restart and (folder / MANIFEST).exists()):
            return self._found(folder, H, wanted)
        state = Checkpoint(
            folder.with_name(f"{folder.name}.partial"), every=self._every, restart=self._restart, say=self._say
        )
        pairs = eigs(H, **wanted, checkpoint=state, gather=False)
        with H.comm.summed():  # the others wait until it is there
            if H.comm.rank == 0 or H.space.divided is not None:
                pairs.save(folder, overwrite=self._restart)
            if H.comm.rank == 0:
                state.discard()
        return pairs

    def _found(self, folder: Path, H: Operator, wanted: dict[str, Any]) -> Eigenpairs:
        pairs: Eigenpairs = load(folder)
        options = _OPTIONS | {key: value for key, value in wanted.items() if key in _OPTIONS}
        options |= {"start": start_digest(H, start_vectors(H, wanted.get("start")))}
        made = pairs.provenance.get("identity") if isinstance(pairs, Eigenpairs) else None
        changed = ["it does not say of which"]
        if made is not None:
            before = in_words(_OPTIONS) | made
            changed = differences(before, identity(H, before["algorithm"], options, versions()))
        if changed:
            raise HesscopeError(
                f"The folder {str(folder)!r} holds another run: {'; '.join(changed)}. Choose another folder, or compute everything "
                "anew (restart=True, --restart)."
            )
        if self._say is not None:
            self._say(f"{folder.name}: taken from {folder}")
        return pairs


#: What decides the numbers of a search, with the defaults of `eigs`.
_OPTIONS: dict[str, Any] = {
    "k": 6, "which": "LM", "tol": 1e-3, "max_products": None, "seed": 0, "max_basis": None, "method": "lanczos", "momentum": 0.0,
    "batches": None, "basis_dtype": None,
}  # fmt: skip


def slug(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "checkpoint"


class _Track:
    """The checkpoints so far; of their vectors only the last ones are held."""

    def __init__(self, which: str, tol: float) -> None:
        self._which, self._tol = which, tol
        #: Known once there is an operator, whose ranks have to agree on it.
        self.seed: int | None = None
        self.last: Eigenpairs | None = None
        self._first: tuple[str, Space] | None = None
        self._pairs: list[tuple[str, Tensor, Tensor, bool]] = []
        self._cosines: list[Tensor] = []
        self._spent: list[int] = []
        self._cold: list[int] = []
        self._cost: dict[str, Any] = {"products": 0, "units": 0.0, "seconds": 0.0}
        self._provenance: dict[str, Any] = {}

    def require_same(self, name: str, space: Space) -> None:
        """Raise HesscopeError unless the selection is the first checkpoint's."""
        if self._first is None:
            self._first = name, space
            return
        first, before = self._first
        if not before.same_as(space):
            raise HesscopeError(
                f"Expected one selection at all checkpoints, with equal names and shapes, but {_difference(before, space)} "
                f"({first!r} against {name!r}); select what both have."
            )

    def add(self, name: str, H: Operator, pairs: Eigenpairs, without: Eigenpairs | None) -> None:
        """Take in a checkpoint."""
        if self.last is not None:
            inner = H.space.inner(vectors_of(H, self.last), vectors_of(H, pairs))
            self._cosines.append(torch.linalg.svdvals(inner).clamp(max=1.0))
        self._pairs.append((name, pairs.eigenvalues, pairs.residuals, pairs.converged))
        self._spent.append(pairs.products)
        self._cold.append((without or pairs).products)
        for found in (pairs, without) if without else (pairs,):
            for key in self._cost:
                self._cost[key] += getattr(found, key)
        self._provenance[name] = pairs.provenance
        self.last = dataclasses.replace(pairs, vectors={key: _alone(part) for key, part in pairs.vectors.items()})

    def result(self, cold: bool, options: dict[str, Any]) -> EigsTrack:
        """All checkpoints."""
        names, values, residuals, converged = (list(part) for part in zip(*self._pairs, strict=True))
        k = len(values[0])
        cosines = torch.stack(self._cosines) if self._cosines else torch.zeros(0, k, dtype=torch.float64)
        first = next(iter(self._provenance.values()))
        assert self.seed is not None
        record = {key: first[key] for key in ("operator", "selection")}
        record |= {"options": options, "checkpoints": self._provenance, "versions": versions()}
        return EigsTrack(**self._cost, provenance=record, names=names, which=self._which,
                         eigenvalues=torch.stack(values), residuals=torch.stack(residuals), converged=converged,
                         cosines=cosines, spent=self._spent, cold=self._cold if cold else [], tol=self._tol,
                         seed=self.seed)  # fmt: skip


def _alone(part: Tensor | Divided) -> Tensor | Divided:
    """Vectors that do not hold on to the model they are of."""
    return part.alone() if isinstance(part, Divided) else part


def _difference(one: Space, other: Space) -> str:
    """The first thing that differs, in words."""
    ours, theirs = ({c.name: c for c in space.coordinates} for space in (one, other))
    for name in {**ours, **theirs}:
        if name not in theirs or name not in ours:
            return f"{name} is selected in one only"
        if ours[name].parameter_shape != theirs[name].parameter_shape:
            return f"{name} has the shapes {list(ours[name].parameter_shape)} and {list(theirs[name].parameter_shape)}"
        if ours[name].key() != theirs[name].key():
            return f"other entries of {name} are selected"
    return "their order differs"
