"""The vector space over a selection: packing, inner products, combinations and random probes.

Shape legend: n coordinates; K, L vectors; `V[name]` is [K, *shape of the selected part].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.resting import mapped
from hesscope.space import random, sums, vectors
from hesscope.space.coordinates import Coordinates
from hesscope.space.divided import Divided
from hesscope.space.division import Division, as_dtensor, local_part
from hesscope.space.vectors import Sums, Vectors

#: Numbers of a random vector that are found at once: 64-bit whole numbers on the way take many times their memory.
_DRAWN_AT_ONCE = 2**18


class Space:
    """The real vector space R^n whose coordinates are those of a selection, in the selection's order.

    Vectors stay split by parameter, on the parameters' own devices; `flatten` and `unflatten` are the border to flat
    tensors of shape [n, K]. Vectors of half-precision parameters are float32.
    """

    def __init__(self, coordinates: Sequence[Coordinates]) -> None:
        self.coordinates = tuple(coordinates)

    @cached_property
    def divided(self) -> Division | None:
        """How vectors are divided among processes; None where each process has all of them."""
        return Division.of(self.coordinates)

    @cached_property
    def whole(self) -> Space:
        """The space of the same coordinates whose vectors are not divided."""
        return self if self.divided is None else Space([c.whole for c in self.coordinates])

    def gathered(self, V: Vectors) -> Vectors:
        """Vectors of `whole` from this space's; every process takes part and has them."""
        return V if self.divided is None else self.divided.gathered(V)

    def collected(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        """One vector in the parameters' own shapes, whole on every process: in main memory where it was divided."""
        return v if self.divided is None else self.divided.collected(v)

    def kept(self, V: Vectors, gather: bool = True) -> dict[str, Tensor | Divided]:
        """Vectors for a result: whole, on every process, or left divided where they are."""
        if self.divided is None:
            return {**V}
        return self.divided.kept(V) if not gather else {**self.divided.gathered(V)}

    def own(self, V: Mapping[str, Tensor | Divided]) -> Vectors:
        """Vectors of this space from those of `whole`, or from divided ones, where they are."""
        if self.divided is not None:
            return self.divided.own(V)
        if divided := [name for name, part in V.items() if isinstance(part, Divided)]:
            raise HesscopeError(
                f"Expected whole vectors for a model that is not divided, but those of {divided[0]} are; leave gather=False out."
            )
        return V  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"Space({self.size} coordinates of {len(self.coordinates)} parameters)"

    @cached_property
    def size(self) -> int:
        """The number of coordinates, n."""
        return sum(c.whole.size for c in self.coordinates)

    @cached_property
    def own_size(self) -> int:
        """How many of the coordinates are here."""
        return sum(c.size for c in self.coordinates)

    def sizes(self, device: torch.device | None = None) -> dict[torch.device, int]:
        """How many numbers of a vector each device keeps of those that are here; one device all, where it is named."""
        found: dict[torch.device, int] = {}
        for c in self.coordinates:
            found[device or c.device] = found.get(device or c.device, 0) + c.size
        return found

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of flat vectors: the widest of the parameters', at least float32."""
        result = torch.float32
        for c in self.coordinates:
            result = torch.promote_types(result, c.dtype)
        return result

    @cached_property
    def rounding(self) -> float:
        """The machine epsilon of the least precise parameter."""
        return max(torch.finfo(c.dtype).eps for c in self.coordinates)

    @cached_property
    def tolerance(self) -> float:
        """The largest relative discrepancy of a product that may pass for rounding.

        A thousand roundings, but never so few that a float64 model which casts to float32 inside (every RMSNorm does), or
        a finite difference, would be refused, nor so many that nothing would be (for bfloat16 they exceed the products).
        """
        return min(max(1000 * self.rounding, 1e-3), 0.2)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each parameter's coordinates are in a flat vector."""
        sizes = [c.whole.size for c in self.coordinates]
        return {
            c.name: slice(end - k, end) for c, k, end in zip(self.coordinates, sizes, accumulate(sizes), strict=True)
        }

    @property
    def device(self) -> torch.device:
        """Where flat vectors are put: the device of the first parameter."""
        return self.coordinates[0].device

    @property
    def names(self) -> list[str]:
        return [c.name for c in self.coordinates]

    @property
    def labels(self) -> list[str]:
        """One readable label a coordinate, in order."""
        return [label for c in self.coordinates for label in c.whole.labels()]

    def describe(self) -> dict[str, Any]:
        """The selection for the record of a result, as JSON: size, and per parameter its shapes, indices and place."""
        parameters = {}
        for c in self.coordinates:
            name, whole, shape, picked = c.key()
            parameters[name] = {"shape": list(shape), "unit_axis": c.unit_axis, "block": c.block, "layer": c.layer}
            if picked:
                parameters[name] |= {"of_shape": list(whole), "index_sha256": picked}
        return {"size": self.size, "parameters": parameters}

    def separately(self) -> dict[str, Space]:
        """One space for each parameter, by its place in the model, such as `block00-self_attn.q_proj` or `lm_head`."""
        width = max(2, *(len(str(c.block or 0)) for c in self.coordinates))
        named = (
            (c.layer or c.name, "" if c.block is None else f"block{c.block:0{width}}-", c) for c in self.coordinates
        )
        return {block + layer: Space([c]) for layer, block, c in named}

    def same_as(self, other: Space) -> bool:
        """Whether both spaces have the same coordinates in the same order."""
        return self is other or [c.key() for c in self.coordinates] == [c.key() for c in other.coordinates]

    def is_of(self, other: Space) -> bool:
        """Whether all coordinates are some parameters' of the other, each with every one that is selected there."""
        return {id(c) for c in self.coordinates} <= {id(c) for c in other.coordinates}

    def like(self, given: dict[str, Tensor], V: Vectors) -> dict[str, Tensor]:
        """One vector as DTensors where those given are, and whole elsewhere."""
        whole = self.gathered({name: part for name, part in V.items() if not hasattr(given[name], "to_local")})
        rows = {c.name: c.rows for c in self.coordinates}
        return {
            name: whole[name][0] if name in whole else as_dtensor(given[name], part[0], rows[name])
            for name, part in V.items()
        }

    # ---- the border to flat tensors and dictionaries

    def unflatten(self, flat_nK: Tensor) -> Vectors:
        """Split a flat [n, K] tensor into vectors."""
        if self.divided is not None:
            return self.own(self.whole.unflatten(flat_nK))
        parts = torch.split(flat_nK.detach().T.to(self.dtype), [c.size for c in self.coordinates], dim=1)
        return {
            c.name: part.reshape(-1, *c.shape).to(c.device) for c, part in zip(self.coordinates, parts, strict=True)
        }

    def flatten(self, V: Vectors, give_up: bool = False) -> Tensor:
        """Join vectors into a flat [n, K] tensor; with `give_up` it may be in their memory, so that they are not to be used on."""
        if self.divided is not None:
            return self.whole.flatten(self.gathered(V))
        if give_up and (flat := self._joined(V)) is not None:
            return flat
        return torch.cat([_rows(c, V).to(self.device) for c in self.coordinates], 1).T

    def from_dict(self, v: dict[str, Tensor]) -> Vectors:
        """Read one vector given as {name: tensor shaped like the selected part}."""
        if set(v) != set(self.names):
            wrong = sorted(set(v) ^ set(self.names))
            raise HesscopeError(
                f"A vector of this space needs exactly the {len(self.names)} names in space.names; "
                f"{', '.join(wrong[:3])} is missing or not one of them."
            )
        return {c.name: self._shaped(c, v[c.name])[None] for c in self.coordinates}

    def one(self, v: Tensor | dict[str, Tensor]) -> Vectors:
        """One vector, given as a flat tensor [n] or as {name: tensor shaped like the selected part}."""
        if isinstance(v, dict):
            return self.from_dict(v)
        if not isinstance(v, Tensor) or v.shape != (self.size,):
            came = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise HesscopeError(f"Expected one vector, a tensor of shape [{self.size}] or a dictionary, got {came}.")
        return self.unflatten(v[:, None])

    def _shaped(self, c: Coordinates, part: Tensor) -> Tensor:
        if tuple(part.shape) != c.whole.shape:
            raise HesscopeError(
                f"Expected {c.name} to have shape {list(c.whole.shape)} as selected, got {list(part.shape)}; reshape it."
            )
        part = local_part(c, part)
        return part.detach().to(device=c.device, dtype=self.dtype)

    def place(self, V: Vectors) -> Vectors:
        """Vectors that come from elsewhere, such as a file, with every part on its parameter's device."""
        return {c.name: V[c.name].to(c.device) for c in self.coordinates}

    # ---- arithmetic

    def zeros(self, count: int = 1) -> Vectors:
        """The zero vector, `count` times."""
        return self._fill(lambda c: self._zeros(c, count))

    def sums(self, count: int = 1, dtype: torch.dtype | None = None) -> Sums:
        """The zero vector, `count` times, to be added to, in another dtype if given; its parts take no memory before that.

        A single one on a single device has all its parts side by side in memory.
        """
        by_name = {c.name: c for c in self.coordinates}
        if count != 1 or self.divided is not None or any(c.device != self.device for c in self.coordinates):
            return Sums(by_name, lambda name: self._zeros(by_name[name], count, dtype))
        folder, dtype = self.coordinates[0].folder, dtype or self.dtype
        flat = (
            torch.empty(self.size, dtype=dtype, device=self.device)
            if folder is None
            else mapped(folder, (self.size,), dtype)
        )
        return Sums(by_name, lambda name: flat[self.slices[name]].zero_().view(1, *by_name[name].shape))

    def _zeros(self, c: Coordinates, count: int, dtype: torch.dtype | None = None) -> Tensor:
        if c.folder is not None:
            return mapped(c.folder, (count, *c.shape), dtype or self.dtype)
        return torch.zeros(count, *c.shape, dtype=dtype or self.dtype, device=c.device)

    def _joined(self, V: Vectors) -> Tensor | None:
        """One vector whose parts are side by side in memory, as [n, 1] without a copy; else None."""
        first = V[self.coordinates[0].name]
        storage = first.untyped_storage()
        for c in self.coordinates:
            x, at = V[c.name], self.slices[c.name].start
            beside = x.untyped_storage().data_ptr() == storage.data_ptr() and x.storage_offset() == at
            if not beside or len(x) != 1 or not x.is_contiguous():
                return None
        whole = storage.nbytes() == self.size * first.itemsize
        return first.as_strided((self.size, 1), (1, self.size), 0) if whole else None

    def inner(self, U: Vectors, V: Vectors) -> Tensor:
        """All inner products <u_k, v_l>, a [K, L] float64 tensor on the CPU."""
        shape = vectors.count(U), vectors.count(V)
        return self.total(lambda c: sums.products(_rows(c, U), _rows(c, V)), shape)

    def total(self, sum_of: Callable[[Coordinates], Tensor], shape: tuple[int, ...] = ()) -> Tensor:
        """A sum over all coordinates, float64 on the CPU, from one function of the part of a parameter that is here."""
        total = torch.zeros(shape, dtype=torch.float64)
        apart = torch.zeros(shape, dtype=torch.float64)
        for c in self.coordinates:
            (total if c.rows is None else apart).add_(sum_of(c).to("cpu", torch.float64))
        return total if self.divided is None else total + self.divided.total(apart)

    def totals(self, sum_of: Callable[[Coordinates], Tensor]) -> dict[str, Tensor]:
        """The same sum over every parameter's coordinates by itself; all of one shape."""
        found = {c.name: sum_of(c).to("cpu", torch.float64) for c in self.coordinates}
        if self.divided is None:
            return found
        names = list(self.divided.rows)
        return found | dict(zip(names, self.divided.total(torch.stack([found[n] for n in names])), strict=True))

    def norms(self, V: Vectors) -> Tensor:
        """Euclidean norms, [K] float64."""
        return self.total(lambda c: sums.squares(_rows(c, V)), (vectors.count(V),)).sqrt()

    def combine(self, V: Vectors, weights_KL: Tensor) -> Vectors:
        """Linear combinations: L vectors, the l-th being sum_k weights[k, l] v_k."""
        return self._fill(
            lambda c: torch.tensordot(weights_KL.T.to(V[c.name].device, V[c.name].dtype), V[c.name], dims=1)
        )

    def basis(self, start: int, stop: int) -> Vectors:
        """The unit vectors e_start .. e_(stop-1) of the selection's order."""
        if self.divided is not None:
            return self.own(self.whole.basis(start, stop))
        result = self.zeros(stop - start)
        for name, own in self.slices.items():
            first, last = max(start, own.start), min(stop, own.stop)
            if first < last:
                k = torch.arange(first - start, last - start)
                result[name].view(stop - start, -1)[k, torch.arange(first - own.start, last - own.start)] = 1.0
        return result

    # ---- random probes

    def rademacher(self, seed: int, streams: Sequence[int | str]) -> Vectors:
        """One vector of independent signs a stream."""
        return self._draw(random.signs, seed, streams)

    def gaussian(self, seed: int, streams: Sequence[int | str]) -> Vectors:
        """One vector of independent standard normal numbers a stream."""
        return self._draw(random.normals, seed, streams)

    def _draw(self, draw: Callable[[int, Tensor], Tensor], seed: int, streams: Sequence[int | str]) -> Vectors:
        def part(c: Coordinates) -> Tensor:
            found = self._zeros(c, len(streams))
            flat_Kn, keys = found.view(len(streams), c.size), [random.stream_key(seed, s, c.name) for s in streams]
            for start in range(0, c.size, _DRAWN_AT_ONCE):
                stop = min(start + _DRAWN_AT_ONCE, c.size)
                indices = c.flat_indices(start, stop).to(c.device)
                for k, key in enumerate(keys):
                    flat_Kn[k, start:stop] = draw(key, indices)
            return found

        return {c.name: part(c) for c in self.coordinates}

    def _fill(self, part: Callable[[Coordinates], Tensor]) -> Vectors:
        return {c.name: _at_rest(c, part(c)) for c in self.coordinates}


def _rows(c: Coordinates, V: Vectors) -> Tensor:
    """One parameter's part of V as a matrix, [K, size]; a scalar parameter's part has no axis to flatten."""
    return V[c.name].reshape(len(V[c.name]), c.size)


def _at_rest(c: Coordinates, part: Tensor) -> Tensor:
    """Vectors' part where the coordinates have it rest."""
    return part if c.folder is None else mapped(c.folder, part.shape, part.dtype).copy_(part)


def flat_space(size: int, dtype: torch.dtype, device: torch.device) -> Space:
    """R^size with anonymous coordinates, the space of an operator given as a matrix."""
    return Space([Coordinates("x", (size,), dtype, device)])
