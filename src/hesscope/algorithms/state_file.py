"""One file that holds nested tensors and facts, written all or nothing.

The file is a safetensors file. Its `__metadata__` holds the JSON form of the value, in which tensors are numbered; the
tensor `crc32` is a checksum of all others' bytes, since safetensors itself only sees that a file is too short.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hesscope.errors import HesscopeError

_TENSOR, _CHECK, _FACTS = "tensor", "crc32", "facts"
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def write(path: Path, value: dict[str, Any]) -> None:
    """Replace the file by one that holds `value`, nested dictionaries and lists of tensors and JSON facts.

    Tensors go out one by one, without a second copy of all. Raises OSError; the old file is then as it was.
    """
    tensors: list[Tensor] = []
    facts = json.dumps(_numbered(value, tensors))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            _write_safetensors(file, tensors, facts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def read(path: Path) -> dict[str, Any]:
    """The value that `write` was given, its tensors on the CPU.

    Raises HesscopeError for a file that is damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[_FACTS])
            tensors = [file.get_tensor(str(i)).clone() for i in range(len(file.keys()) - 1)]
            check = int(file.get_tensor(_CHECK))
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise HesscopeError(f"the file {path.name} cannot be read ({str(error).splitlines()[0]})") from error
    if check != _checksum(tensors):
        raise HesscopeError(f"the bytes of {path.name} are not those that were written")
    value: dict[str, Any] = _restored(facts, tensors)
    return value


def read_facts(path: Path) -> Any:
    """Like `read`, without reading any tensor: None in the place of each."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return _restored(json.loads((file.metadata() or {})[_FACTS]), None)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise HesscopeError(f"the file {path.name} cannot be read ({str(error).splitlines()[0]})") from error


# ---- tensors inside nested values


def _numbered(value: Any, tensors: list[Tensor]) -> Any:
    """The value with {"tensor": i} in the place of the i-th tensor."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {_TENSOR: len(tensors) - 1}
    if isinstance(value, dict):
        # Under a key of its own, no dictionary of facts can be taken for a tensor.
        return {"items": [[key, _numbered(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_numbered(item, tensors) for item in value]
    return value


def _restored(value: Any, tensors: list[Tensor] | None) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return None if tensors is None else tensors[value[_TENSOR]]
        return {key: _restored(item, tensors) for key, item in value["items"]}
    return [_restored(item, tensors) for item in value] if isinstance(value, list) else value


# ---- bytes


def _write_safetensors(file: BinaryIO, tensors: list[Tensor], facts: str) -> None:
    # Widest first, as the format's own writer does, so that every tensor begins at a multiple of its item size.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].dtype.itemsize)
    check = torch.zeros(1, dtype=torch.int64)
    header: dict[str, Any] = {"__metadata__": {_FACTS: facts}}
    offset = 0
    for name, tensor in [(_CHECK, check), *((str(i), tensors[i]) for i in order)]:
        stop = offset + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    place = file.tell()
    file.write(_raw(check))
    sums = {}
    for i in order:
        raw = _raw(tensors[i])
        file.write(raw)
        sums[i] = zlib.crc32(raw)
    file.seek(place)
    file.write(_raw(torch.tensor([_joined(sums[i] for i in range(len(tensors)))])))


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(tensors: list[Tensor]) -> int:
    return _joined(zlib.crc32(_raw(t)) for t in tensors)


def _joined(sums: Iterator[int]) -> int:
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
