"""What every result has: cost, provenance, a folder it can be saved to, and a picture."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.operators.product_error import ProductError
from hesscope.tensor_file import Outgoing, Pieces

TENSORS, MANIFEST = "result.safetensors", "manifest.json"
#: What a result can be; a folder holds one of them, with a figure of that name.
KINDS = (
    *("approximations", "block", "convergence", "density", "diagonal", "diagonal-study"),
    *("eigs", "eigs-track", "groups", "lanczos", "perplexity-study", "plan"),
    *("structure", "structure-comparison", "trace", "verify"),
)
#: Files that some results of a kind have and others have not: those of an earlier one go when it is replaced.
_FURTHER = (
    *("diagonal.safetensors", "diagonal_standard_error.safetensors"),
    *("diagonal-heatmaps.png", "diagonal-histograms.png"),
)


@dataclass(frozen=True, eq=False)
class Result(ABC):
    """A frozen value. `products` operator products and `units` forward passes over the data were spent on it.

    Fields that are tensors, or dictionaries of tensors, go to `result.safetensors`; the others to `manifest.json`. Where some of
    them are `Divided` among processes, all of these call `save`, and one of them writes.
    """

    kind: ClassVar[str]

    products: int
    units: float
    seconds: float
    provenance: dict[str, Any]

    @abstractmethod
    def summary(self) -> str:
        """A few lines for a person: value, error, cost."""

    @abstractmethod
    def error(self) -> dict[str, Any]:
        """What is known of the error, for the manifest."""

    @abstractmethod
    def plot(self, path: str | Path) -> Path:
        """Draw the result to a file whose ending (.png, .pdf, .svg) decides the format."""

    def files(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        """Further files for a folder, as {name: (tensors, metadata)}, in forms that other programs read."""
        return {}

    def views(self) -> dict[str, dict[str, Any]]:
        """Further pictures for a run's folder, as {name: options of `plot`}."""
        return {}

    def product_error_line(self) -> str:
        """The measured error of the operator's products in words; empty where it was not measured."""
        found = self.provenance.get("product_error")
        return str(ProductError(**found)) if found else ""

    def cost_line(self) -> str:
        """The cost in words."""
        passes = f" = {self.units:.0f} forward passes" if self.units else ""
        return f"{self.products} product{'' if self.products == 1 else 's'}{passes} in {self.seconds:.1f} s"

    def tensors(self) -> dict[str, Tensor | Pieces]:
        """Every tensor of the result, dictionaries flattened to `field/name`."""
        found: dict[str, Tensor | Pieces] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, Pieces)):
                found[field.name] = value
            elif _is_tensor_dict(value):
                found |= {f"{field.name}/{name}": tensor for name, tensor in value.items()}
        return found

    def facts(self) -> dict[str, Any]:
        """Every field that is not a tensor."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: v for k, v in values.items() if not isinstance(v, (Tensor, Pieces)) and not _is_tensor_dict(v)}

    def manifest(self) -> dict[str, Any]:
        """Everything about the result except its tensors, of which it keeps the order: safetensors does not."""
        problem = self.provenance.get("problem") or {}
        return {
            "kind": self.kind,
            "error": self.error(),
            "fingerprint": problem.get("fingerprint"),
            **self.facts(),
            "tensors": list(self.tensors()),
        }

    def save(self, folder: str | Path, *, overwrite: bool = False, also_pt: bool = False) -> Path:
        """Write `result.safetensors` and `manifest.json` (and `result.pt`) to a folder, all or nothing.

        Raises HesscopeError where the folder already holds a result and `overwrite` is not set.
        """
        folder = Path(folder)
        with self.outgoing() as outgoing:
            if outgoing.here:
                require_free(folder, overwrite)
                with staged(folder) as stage:
                    self.write(stage, outgoing, also_pt)
        return folder

    def outgoing(self) -> Outgoing:
        """The tensors on their way to a file: a context that every process enters that holds some of them."""
        return Outgoing(self.tensors())

    def write(self, stage: Path, outgoing: Outgoing, also_pt: bool = False) -> None:
        """Write the files of `save` into a folder that exists, one after the other, and tensor after tensor."""
        from safetensors.torch import load_file, save_file

        with (stage / TENSORS).open("wb") as file:
            outgoing.write(file)
        for name, (parts, metadata) in self.files().items():
            save_file({key: t.detach().cpu().contiguous() for key, t in parts.items()}, stage / name, metadata)
        (stage / MANIFEST).write_text(json.dumps(jsonable(self.manifest()), indent=2) + "\n", encoding="utf-8")
        if also_pt:
            tensors = load_file(stage / TENSORS)  # mapped, not read
            tensors = {name: tensors[name] for name in self.tensors()}
            torch.save(next(iter(tensors.values())) if len(tensors) == 1 else tensors, stage / "result.pt")

    @classmethod
    def from_parts(cls, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> Self:
        """Rebuild a result from what `save` wrote."""
        order = manifest.get("tensors", list(tensors))
        if set(order) != set(tensors):
            raise HesscopeError(f"Expected the tensors {', '.join(order)}, got {', '.join(tensors)}.")
        tensors = {name: tensors[name] for name in order}
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name in tensors:
                values[field.name] = tensors[field.name]
            elif field.name in manifest:
                # Infinities and NaN are text in JSON.
                value = manifest[field.name]
                values[field.name] = float(value) if field.type == "float" else value
            else:
                prefix = field.name + "/"
                values[field.name] = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
                if not values[field.name]:
                    raise HesscopeError(f"Expected {field.name!r} in a result of kind {cls.kind!r}; it is missing.")
        return cls(**values)


def jsonable(value: Any) -> Any:
    """The value in terms of JSON; infinities and NaN, which JSON lacks, become text."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not (value == value and abs(value) != float("inf")):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def require_free(folder: Path, overwrite: bool) -> None:
    """Raise HesscopeError where a folder already holds a result, or is a file."""
    if folder.exists() and not folder.is_dir():
        raise HesscopeError(f"Expected {folder.name!r} to be a folder to write to; it is a file.")
    if not overwrite and (folder / MANIFEST).exists():
        raise HesscopeError(
            f"The folder {str(folder)!r} already holds a run; choose another folder, or overwrite it (overwrite=True, --overwrite)."
        )


class staged:
    """A temporary folder beside `folder` whose files move there together when the block ends without an exception."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Path:
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._stage = Path(tempfile.mkdtemp(prefix=f".{self._folder.name}-", dir=self._folder.parent))
        except OSError as error:
            raise HesscopeError(
                f"Expected a folder that can be written to, got {str(self._folder)!r} ({error.strerror}); choose another."
            ) from error
        return self._stage

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._folder.mkdir(exist_ok=True)
                # The manifest is what makes a folder a result: an old one goes first, the new one comes last.
                (self._folder / MANIFEST).unlink(missing_ok=True)
                for name in ("result.pt", *_FURTHER, *map("{}.png".format, KINDS)):
                    (self._folder / name).unlink(missing_ok=True)
                for path in sorted(self._stage.iterdir(), key=lambda p: p.name == MANIFEST):
                    target = self._folder / path.name
                    if path.is_dir() and target.exists():
                        shutil.rmtree(target)
                    os.replace(path, target)
        finally:
            shutil.rmtree(self._stage, ignore_errors=True)


def _is_tensor_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, (Tensor, Pieces)) for v in value.values())
