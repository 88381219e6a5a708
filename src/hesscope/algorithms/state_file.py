"""One file that holds nested tensors and facts, written all or nothing.

The file is a safetensors file. Its `__metadata__` holds the JSON form of the value, in which tensors are numbered; the
tensor `crc32` is a checksum of all others' bytes, since safetensors itself only sees that a file is too short. Tensors go out, and
come in, a piece at a time: processes that hold them between them never have one of them whole.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.space.divided import Outline
from hesscope.tensor_file import NAMES, Outgoing, Pieces, raw_bytes

_TENSOR, _CHECK, _FACTS = "tensor", "crc32", "facts"
_DTYPES = {name: dtype for dtype, name in NAMES.items()}


def write(path: Path, value: dict[str, Any]) -> None:
    """Replace the file by one that holds `value`, nested dictionaries and lists of tensors and JSON facts.

    Tensors go out one by one, without a second copy of all; those that are divided among processes piece by piece, while the
    others `take_part`. Raises OSError; the old file is then as it was.
    """
    facts, outgoing = _going_out(value)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with outgoing, temporary.open("wb") as file:
            place, sums = outgoing.write(file, {_FACTS: facts})
            file.seek(place)
            file.write(raw_bytes(torch.tensor([_joined(sums[str(i)] for i in range(len(sums) - 1))])))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def take_part(value: dict[str, Any]) -> None:
    """What the other processes do while one writes the value that all have a part of."""
    with _going_out(value)[1]:
        return


def read(path: Path) -> dict[str, Any]:
    """The value that `write` was given, its tensors on the CPU.

    Raises HesscopeError for a file that is damaged or of another kind.
    """
    stored = Stored(path)
    value: dict[str, Any] = filled(stored.outline, lambda x: stored.read(x, torch.empty(x.shape, dtype=x.dtype)))
    stored.finish()
    return value


def read_facts(path: Path) -> Any:
    """Like `read`, without reading any tensor: None in the place of each."""
    return filled(Stored(path).outline, lambda x: None)


class Stored:
    """A file that was written, to be read in the order of its tensors, some numbers at a time.

    Attributes:
        outline: the value, with an `Outline` in the place of every tensor.

    Raises HesscopeError for a file that is damaged or of another kind.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._path = path
        self._file: BinaryIO | None = None
        self._failed: Exception | None = None
        try:
            with safe_open(path, framework="pt") as known:  # refuses what is too short, or not of the format
                facts = json.loads((known.metadata() or {})[_FACTS])
                self._check = int(known.get_tensor(_CHECK))
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            entries = [header[str(i)] for i in range(len(header) - 2)]
            outlines = [Outline(i, tuple(x["shape"]), _DTYPES[x["dtype"]]) for i, x in enumerate(entries)]
            self.outline: Any = _restored(facts, outlines)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise self._unreadable(error) from error
        self._places = [8 + length + x["data_offsets"][0] for x in entries]
        self._sums = [0] * len(entries)

    def read(self, x: Outline, into: Tensor) -> Tensor:
        """The next numbers of a tensor, into one on the CPU; what cannot be read is kept for `finish` to say."""
        if self._failed is not None or into.numel() == 0:
            return into
        raw = raw_bytes(into)
        try:
            self._file = self._file or self._path.open("rb")
            self._file.seek(self._places[x.number])
            if self._file.readinto(raw) != len(raw):  # type: ignore[attr-defined]
                raise EOFError("it has become shorter")
        except (OSError, EOFError) as error:
            self._failed = error
        self._places[x.number] += len(raw)
        self._sums[x.number] = zlib.crc32(raw, self._sums[x.number])
        return into

    def finish(self) -> None:
        """Raise HesscopeError where something could not be read, or was not what had been written; all has been read."""
        if self._file is not None:
            self._file.close()
        if self._failed is not None:
            raise self._unreadable(self._failed) from self._failed
        if self._check != _joined(self._sums):
            raise HesscopeError(f"the bytes of {self._path.name} are not those that were written")

    def _unreadable(self, error: Exception) -> HesscopeError:
        return HesscopeError(f"the file {self._path.name} cannot be read ({str(error).splitlines()[0]})")


def filled(value: Any, take: Callable[[Outline], Any]) -> Any:
    """A nested value with what is taken in the place of every outline, in their order."""
    if isinstance(value, Outline):
        return take(value)
    if isinstance(value, dict):
        return {key: filled(item, take) for key, item in value.items()}
    return [filled(item, take) for item in value] if isinstance(value, list) else value


# ---- tensors inside nested values


def _going_out(value: dict[str, Any]) -> tuple[str, Outgoing]:
    """The value's JSON form, and its tensors by number."""
    tensors: list[Tensor | Pieces] = []
    facts = json.dumps(_numbered(value, tensors))
    check = torch.zeros(1, dtype=torch.int64)
    return facts, Outgoing({_CHECK: check, **{str(i): x for i, x in enumerate(tensors)}})


def _numbered(value: Any, tensors: list[Tensor | Pieces]) -> Any:
    """The value with {"tensor": i} in the place of the i-th tensor."""
    if isinstance(value, (Tensor, Pieces)):
        tensors.append(value)
        return {_TENSOR: len(tensors) - 1}
    if isinstance(value, dict):
        # Under a key of its own, no dictionary of facts can be taken for a tensor.
        return {"items": [[key, _numbered(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_numbered(item, tensors) for item in value]
    return value


def _restored(value: Any, outlines: list[Outline]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return outlines[value[_TENSOR]]
        return {key: _restored(item, outlines) for key, item in value["items"]}
    return [_restored(item, outlines) for item in value] if isinstance(value, list) else value


def _joined(sums: Iterable[int]) -> int:
    """One checksum of several."""
    return zlib.crc32(" ".join(map(str, sums)).encode())


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a crash of the machine, where the system can do that for folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
