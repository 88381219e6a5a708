"""Reading results, and plain tensors that others published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hesscope.errors import HesscopeError
from hesscope.results.approximations import Approximations
from hesscope.results.base import MANIFEST, TENSORS, Result
from hesscope.results.block import Block
from hesscope.results.convergence import Convergence
from hesscope.results.density import Density
from hesscope.results.diagonal import Diagonal
from hesscope.results.diagonal_study import DiagonalStudy
from hesscope.results.eigs import Eigenpairs
from hesscope.results.eigs_track import EigsTrack
from hesscope.results.groups import Groups
from hesscope.results.lanczos import LanczosRun
from hesscope.results.perplexity import PerplexityStudy
from hesscope.results.plan import Plan
from hesscope.results.structure import Structure
from hesscope.results.structure_comparison import StructureComparison
from hesscope.results.trace import Trace
from hesscope.results.verification import Verification

KINDS: dict[str, type[Result]] = {
    kind.kind: kind
    for kind in (
        *(
            Approximations,
            Block,
            Convergence,
            Density,
            Diagonal,
            DiagonalStudy,
            Eigenpairs,
            EigsTrack,
            Groups,
            LanczosRun,
            PerplexityStudy,
            Plan,
            Structure,
            StructureComparison,
        ),
        *(Trace, Verification),
    )
}


def load(path: str | Path) -> Any:
    """Read a result folder, or a tensor file.

    Args:
        path: a folder that a result was saved to (returns that result); a `.pt` file, read without running any code in
            it, or a `.safetensors` file (returns its tensor, or {name: tensor} where there are several).

    Raises:
        HesscopeError: nothing there, not a result, or a `.pt` that holds more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise HesscopeError(f"Expected a result folder or a tensor file at {str(path)!r}; there is none.")
    if path.suffix == ".pt":
        return _load_pt(path)
    if path.suffix == ".safetensors":
        return _only(_read_safetensors(path))
    raise HesscopeError(f"Expected a result folder, a .pt or a .safetensors file, got {path.name!r}.")


def _load_folder(folder: Path) -> Result:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        kind = KINDS[manifest["kind"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HesscopeError(
            f"Expected {str(folder)!r} to be the folder of a result, with a readable {MANIFEST}; run it again."
        ) from error
    tensors = _read_safetensors(folder / TENSORS)
    try:
        return kind.from_parts(tensors, manifest)
    except (ValueError, TypeError) as error:
        raise HesscopeError(f"The result in {str(folder)!r} is damaged, so run it again: {error}") from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except (OSError, SafetensorError) as error:
        raise HesscopeError(f"Could not read tensors from {str(path)!r}: {error}") from error


def _load_pt(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and type errors, by what the file holds
        raise HesscopeError(
            f"Expected {path.name!r} to hold plain tensors; it holds something else, which is not loaded for safety."
        ) from error


def _only(tensors: dict[str, torch.Tensor]) -> Any:
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors
