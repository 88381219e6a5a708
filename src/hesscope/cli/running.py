"""From common options to a problem and an operator, and from a result to a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hesscope.cli.options import CommonOptions
from hesscope.errors import HesscopeError

if TYPE_CHECKING:
    from hesscope.operators import Operator
    from hesscope.problem import Problem
    from hesscope.results import Result
    from hesscope.space import Space

#: Fields of the common options that go to `hesscope.causal_lm` as they are.
_PROBLEM_FIELDS = (
    *("model", "revision", "tokenizer", "length", "sequences", "batch_size", "dtype", "device"),
    *("split", "data_config", "text_column", "pack", "objective", "dropout", "seed"),
)
_DEMO = "demo"


def output_folder(common: CommonOptions, verb: str) -> Path:
    """The folder to write, known to be free before anything is computed."""
    from hesscope.results.base import require_free

    folder = common.output_dir or Path("runs") / verb
    require_free(folder, common.overwrite)
    return folder


def make_problem(common: CommonOptions) -> Problem:
    """The problem that the options describe."""
    from hesscope.problem import causal_lm

    if common.model is None:
        raise HesscopeError("Expected --model: a Hub id, a folder, or 'demo' for the small model that comes along.")
    if common.data is None:
        raise HesscopeError("Expected --data: a Hub dataset, a .txt, .jsonl or .parquet file, or 'demo'.")
    keywords = {name: getattr(common, name) for name in _PROBLEM_FIELDS}
    data: Any = common.data
    if common.model == _DEMO:
        from hesscope.assets import model_path

        keywords["model"] = str(model_path())
    if common.data == _DEMO:
        from hesscope.assets import prose

        data, keywords["pack"] = [prose("held_out")], True
    return causal_lm(data=data, **keywords)


def make_space(common: CommonOptions, problem: Problem) -> Space:
    """The selection that --params describes."""
    from hesscope.problem import select

    return select(problem, *(common.params or ()))


def make_operator(common: CommonOptions) -> Operator:
    """The operator that --operator names, over --params."""
    from hesscope.operators import PROBLEM_OPERATORS

    if common.operator not in PROBLEM_OPERATORS:
        known = ", ".join(PROBLEM_OPERATORS)
        raise HesscopeError(f"Expected --operator to be one of {known}, got {common.operator!r}.")
    problem = make_problem(common)
    return PROBLEM_OPERATORS[common.operator](problem, make_space(common, problem), common.engine)


def finish(result: Result, common: CommonOptions, folder: Path, *, drawn: Any = None, **own: Any) -> None:
    """Write the folder with its figure, all at once, and say what came out and where it is.

    `drawn` goes to the result's `plot`, `own` into the record.
    """
    options = {**dataclasses.asdict(common), **own}
    write_run(result, folder, options, overwrite=common.overwrite, also_pt=common.also_pt, drawn=drawn)
    console = Console(highlight=False, soft_wrap=True)
    console.print(result.summary(), markup=False)
    console.print(f"written to {folder}", markup=False)


def write_run(
    result: Result,
    folder: Path,
    options: dict[str, Any],
    *,
    overwrite: bool = False,
    also_pt: bool = False,
    drawn: dict[str, Any] | None = None,
) -> Path:
    """Result, manifest with the resolved options, and figure in one folder, all or nothing."""
    from hesscope.results.base import require_free, staged

    resolved = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    result = dataclasses.replace(result, provenance={**result.provenance, "command": resolved})
    require_free(folder, overwrite)
    with staged(folder) as stage:
        result.write(stage, also_pt)
        result.plot(stage / f"{result.kind}.png", **(drawn or {}))
    return folder
