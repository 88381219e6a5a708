"""`hesscope show`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from hesscope.errors import HesscopeError


def show_folder(folder: Path, plot: Path | None, absolute: bool = False) -> None:
    """Summary and provenance of a saved result; with `plot`, its figure once more, a block's in magnitudes if wanted."""
    from hesscope.results import Block, Result, load

    result = load(folder)
    if not isinstance(result, Result):
        raise HesscopeError(f"Expected the folder of a run, got the tensor file {str(folder)!r}.")
    if absolute and (plot is None or not isinstance(result, Block)):
        raise HesscopeError(f"Expected --absolute with --plot and the run of a block, got a run of {result.kind!r}.")
    console = Console(highlight=False, soft_wrap=True)
    console.print(result.summary(), markup=False)
    facts = _facts(result.provenance)
    width = max((len(key) for key, _ in facts), default=0)
    for key, value in facts:
        console.print(f"{key:{width}}  {value}", markup=False)
    if plot is not None:
        drawn = result.plot(plot, absolute=absolute) if isinstance(result, Block) else result.plot(plot)
        console.print(f"drawn to {drawn}", markup=False)


def _facts(provenance: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested provenance as dotted rows; what was not set is left out."""
    rows: list[tuple[str, str]] = []
    for key, value in provenance.items():
        if isinstance(value, dict):
            rows += _facts(value, f"{prefix}{key}.")
        elif value is not None and value != [] and value != "":
            rows.append((prefix + key, str(value)))
    return rows
