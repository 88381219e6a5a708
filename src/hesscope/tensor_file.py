"""Tensors on their way to a safetensors file, a piece at a time, so that none of them need be in memory whole.

A tensor that processes hold between them comes in `Pieces`: each of these takes all of them, and one of them has it then. So all
go through the same tensors in the same order, and go on to the end where the one that writes cannot.
"""

from __future__ import annotations

import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

#: What the format calls dtypes.
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Pieces(ABC):
    """A tensor whose numbers come in their order, some at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    @abstractmethod
    def here(self) -> bool:
        """Whether the pieces come to this process."""

    @abstractmethod
    def pieces(self) -> Iterator[Tensor | None]:
        """All of it, or on the other processes as many times nothing; all processes go through them."""


class Outgoing:
    """Tensors that go out once, the widest dtypes first, so that each begins at a multiple of its item size.

    As a context it goes to their end, also where an exception came in between: others take part in every piece.
    """

    def __init__(self, tensors: Mapping[str, Tensor | Pieces]) -> None:
        self.tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
        self._stream = self._pieces()

    @property
    def here(self) -> bool:
        """Whether it is for this process to write them."""
        return all(x.here for x in self.tensors.values() if isinstance(x, Pieces))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None or issubclass(kind, Exception):
            for _ in self._stream:
                pass

    def write(self, file: BinaryIO, metadata: Mapping[str, str] | None = None) -> tuple[int, dict[str, int]]:
        """Write all to a file that is open; returns where the first tensor's bytes begin, and each tensor's CRC-32."""
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for name, x in self.tensors.items():
            stop = offset + torch.Size(x.shape).numel() * x.dtype.itemsize
            header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        place, sums = file.tell(), dict.fromkeys(self.tensors, 0)
        for name, piece in self._stream:
            assert piece is not None, "the pieces come to another process"
            raw = raw_bytes(piece)
            file.write(raw)
            sums[name] = zlib.crc32(raw, sums[name])
        return place, sums

    def _pieces(self) -> Iterator[tuple[str, Tensor | None]]:
        for name, x in self.tensors.items():
            for piece in x.pieces() if isinstance(x, Pieces) else (x,):
                yield name, piece


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, of a tensor in main memory without a copy."""
    whole = tensor.detach().cpu().contiguous()
    # A single number is contiguous whatever its stride, which would stay with it.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy().data
