"""Tensors that go to a file a piece at a time."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hesscope.tensor_file import NAMES, Outgoing, Pieces, raw_bytes


class Rowwise(Pieces):
    """Rows of a matrix, counted as they are taken; None on a process that they do not come to."""

    def __init__(self, whole: Tensor, here: bool = True) -> None:
        self._whole, self._here, self.taken = whole, here, 0
        self.shape, self.dtype = tuple(whole.shape), whole.dtype

    @property
    def here(self) -> bool:
        return self._here

    def pieces(self) -> Iterator[Tensor | None]:
        for row in self._whole:
            self.taken += 1
            yield row if self._here else None


def test_pieces_make_the_file_of_a_whole_tensor(tmp_path: Path) -> None:
    tensors = {f"of {name}": torch.arange(12).view(3, 4).to(dtype) for dtype, name in NAMES.items()}
    tensors |= {"empty": torch.zeros(0, 3), "transposed": torch.arange(6.0).view(2, 3).T, "number": torch.tensor(2.0)}
    tensors |= {
        "one of a column": torch.arange(10.0)[::5][1:],
        "one of a table": torch.arange(10.0).view(2, 5)[1:, 2:3],
    }
    given: dict[str, Tensor | Pieces] = {**tensors, "of F16": Rowwise(tensors["of F16"]), "last": Rowwise(torch.eye(3))}
    with (tmp_path / "x").open("wb") as file, Outgoing(given) as outgoing:
        place, sums = outgoing.write(file, {"what": "a test"})
    found = load_file(tmp_path / "x")
    assert found.keys() == given.keys()
    for name, tensor in (tensors | {"last": torch.eye(3)}).items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert sums[name] == zlib.crc32(raw_bytes(tensor))
    assert (tmp_path / "x").read_bytes()[place : place + 96] == bytes(raw_bytes(tensors["of F64"]))


def test_others_take_part_to_the_end_where_the_file_cannot_be_written(tmp_path: Path) -> None:
    x = Rowwise(torch.eye(3))
    with pytest.raises(OSError, match="No space"), Outgoing({"x": x}):
        raise OSError("No space left on device")
    assert x.taken == 3
    (tmp_path / "x").touch()
    with (
        (tmp_path / "x").open("rb") as file,
        pytest.raises(OSError, match="write"),
        Outgoing({"x": (x := Rowwise(torch.eye(3)))}) as out,
    ):
        out.write(file)
    assert x.taken == 3
    with pytest.raises(KeyboardInterrupt), Outgoing({"x": (x := Rowwise(torch.eye(3)))}):
        raise KeyboardInterrupt
    assert x.taken == 0


def test_where_the_pieces_do_not_come_nothing_is_written() -> None:
    with Outgoing({"x": (x := Rowwise(torch.eye(3), here=False)), "y": torch.ones(2)}) as outgoing:
        assert not outgoing.here
    assert x.taken == 3
    assert Outgoing({"y": torch.ones(2)}).here
