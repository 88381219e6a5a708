"""`hesscope show`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from hesscope.errors import HesscopeError

T = TypeVar("T")


def load_kind(folder: Path, kind: type[T]) -> T:
    """The result of that kind in a folder.

    Raises HesscopeError where something else is in it.
    """
    from hesscope.results import load

    result = load(folder)
    if not isinstance(result, kind):
        raise HesscopeError(f"Expected {str(folder)!r} to hold a {kind.__name__}, got a {type(result).__name__}.")
    return result


def show_folder(folder: Path, plot: Path | None, absolute: bool = False) -> None:
    """Summary and provenance of a saved result, or a line for each run in a folder of several; with `plot`, its figure."""
    from hesscope.results import Block, Result, load

    if plot is None and (runs := _runs_inside(folder)):
        list_runs(f"{len(runs)} runs in {folder}:", {run.name: load(run).summary() for run in runs})
        return
    result = load(folder)
    if not isinstance(result, Result):
        raise HesscopeError(f"Expected the folder of a run, got the tensor file {str(folder)!r}.")
    if absolute and (plot is None or not isinstance(result, Block)):
        raise HesscopeError(f"Expected --absolute with --plot and the run of a block, got a run of {result.kind!r}.")
    console = Console(highlight=False, soft_wrap=True)
    console.print(result.summary(), markup=False)
    if error := result.product_error_line():
        console.print(error, markup=False)
    facts = _facts(result.provenance)
    width = max((len(key) for key, _ in facts), default=0)
    for key, value in facts:
        console.print(f"{key:{width}}  {value}", markup=False)
    if plot is not None:
        drawn = result.plot(plot, absolute=absolute) if isinstance(result, Block) else result.plot(plot)
        console.print(f"drawn to {drawn}", markup=False)


def list_runs(title: str, summaries: dict[str, str]) -> None:
    """A line for each run: the name of its folder and the first line of its summary."""
    console, width = Console(highlight=False, soft_wrap=True), max(map(len, summaries), default=0)
    console.print(title, markup=False)
    for name, summary in summaries.items():
        console.print(f"  {name:{width}}  {summary.splitlines()[0]}", markup=False)


def _runs_inside(folder: Path) -> list[Path]:
    """The runs of a folder that is not one itself."""
    from hesscope.results.base import MANIFEST

    return [] if (folder / MANIFEST).exists() else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))


def _facts(provenance: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested provenance as dotted rows; what was not set is left out."""
    rows: list[tuple[str, str]] = []
    for key, value in provenance.items():
        if isinstance(value, dict):
            rows += _facts(value, f"{prefix}{key}.")
        elif value is not None and value != [] and value != "":
            rows.append((prefix + key, str(value)))
    return rows
