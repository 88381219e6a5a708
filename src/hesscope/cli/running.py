"""From common options to a problem and an operator, and from a result to a folder."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hesscope.cli.config import read_indices
from hesscope.cli.options import CommonOptions
from hesscope.cli.ranks import comm, divided_model, require_layout, shared
from hesscope.cli.resuming import result_folder
from hesscope.errors import HesscopeError

if TYPE_CHECKING:
    from torch import nn

    from hesscope.algorithms.checkpoint import Checkpoint
    from hesscope.operators import Operator
    from hesscope.problem import Problem
    from hesscope.results import Eigenpairs, Result
    from hesscope.space import Space

#: Fields of the common options that go to `hesscope.causal_lm` as they are.
_PROBLEM_FIELDS = (
    *(
        "model",
        "revision",
        "tokenizer",
        "length",
        "sequences",
        "batch_size",
        "dtype",
        "device",
        "device_map",
        "offload_folder",
        "borders",
        "vectors",
    ),
    *("split", "data_config", "text_column", "pack", "objective", "loss", "dropout", "seed", "attention"),
)
#: Fields that go to `hesscope.select`.
_SELECTION_FIELDS = ("layers", "blocks", "rows", "first", "random", "seed")
_DEMO = "demo"

#: The problem, loaded already, and the layer whose turn it is, where one command computes several results.
_PREPARED: ContextVar[tuple[Problem, Space] | None] = ContextVar("prepared", default=None)


@contextmanager
def prepared(problem: Problem, space: Space) -> Iterator[None]:
    """Inside, options stand for this problem and this selection: nothing is loaded again."""
    token = _PREPARED.set((problem, space))
    try:
        yield
    finally:
        _PREPARED.reset(token)


def one_of_several() -> bool:
    """Whether the verb runs for one layer of several, under --separately."""
    return _PREPARED.get() is not None


def output_folder(common: CommonOptions, verb: str) -> Path:
    """The folder to write, known to be free before anything is computed."""
    from hesscope.results.base import require_free

    folder = result_folder(common, verb)
    require_free(folder, common.overwrite)
    return folder


def make_problem(common: CommonOptions) -> Problem:
    """The problem that the options describe."""
    from hesscope.problem import causal_lm

    if ready := _PREPARED.get():
        return ready[0]
    if common.model is None:
        raise HesscopeError("Expected --model: a Hub id, a folder, or 'demo' for the small model that comes along.")
    if common.data is None:
        raise HesscopeError("Expected --data: a Hub dataset, a .txt, .jsonl or .parquet file, or 'demo'.")
    require_layout(common.layout)
    keywords = {name: getattr(common, name) for name in _PROBLEM_FIELDS}
    data: Any = common.data
    keywords["model"] = model_source(common)
    if comm().ranks > 1 and common.offload_folder is not None:
        keywords["offload_folder"] = str(Path(common.offload_folder) / f"rank{comm().rank}")  # all write there
    if common.layout != "data":
        keywords |= {"model": _divided_model(common)}
        keywords |= dict.fromkeys(("dtype", "device", "device_map", "offload_folder"))
    if common.data == _DEMO:
        from hesscope.assets import prose

        data, keywords["pack"] = [prose("held_out")], True
    return shared(causal_lm(data=data, **keywords), dataclasses.asdict(common))


def _divided_model(common: CommonOptions) -> nn.Module:
    """The model that --model names, its weights divided among the ranks."""
    from hesscope.models import load_model, load_skeleton
    from hesscope.models.loading import resolve_dtype

    if common.device_map not in (None, "disk"):
        raise HesscopeError(f"Expected no --device-map but disk with --layout {common.layout}: leave it out.")
    if common.device_map is None and common.offload_folder is not None:
        raise HesscopeError("Expected --device-map disk with --offload-folder.")
    name, dtype = model_source(common), resolve_dtype(common.dtype)
    hub: dict[str, Any] = {} if common.revision is None else {"revision": common.revision}
    places: dict[str, Any] = {"device": "cpu"}
    if common.device_map == "disk":
        places = {"device_map": "disk", "offload_folder": common.offload_folder}
    return divided_model(
        common.layout, lambda: load_model(name, dtype, **places, **hub), lambda: load_skeleton(name, dtype, **hub)
    )


def make_space(common: CommonOptions, problem: Problem | nn.Module) -> Space:
    """The selection that the options describe."""
    from hesscope.problem import select

    if ready := _PREPARED.get():
        return ready[1]
    patterns: list[Any] = list(common.params or ())
    if common.indices is not None:
        patterns.append(read_indices(common.indices))
    keywords = {name: getattr(common, name) for name in _SELECTION_FIELDS}
    return select(problem, *patterns, **keywords)


def make_operator(common: CommonOptions) -> Operator:
    """The operator that --operator names, over the selection."""
    return operator_of(common, make_problem(common))


def operator_of(common: CommonOptions, problem: Problem) -> Operator:
    """The same, of a problem that was made before."""
    from hesscope.operators import PROBLEM_OPERATORS

    if common.operator not in PROBLEM_OPERATORS:
        known = ", ".join(PROBLEM_OPERATORS)
        raise HesscopeError(f"Expected --operator to be one of {known}, got {common.operator!r}.")
    make = PROBLEM_OPERATORS[common.operator]
    own = _settings(common, set(inspect.signature(make).parameters))
    return make(problem, make_space(common, problem), **own)


def _settings(common: CommonOptions, taken: set[str]) -> dict[str, Any]:
    """The operator's own keywords; raises HesscopeError for an option that this operator does not have."""
    given: dict[str, Any] = {"per": common.per, "samples": common.samples, "kernel": common.kernel}
    for name, value in given.items():
        if value is not None and name not in taken:
            whose = "--operator ggn" if name == "kernel" else "a Fisher matrix"
            raise HesscopeError(f"Expected --{name} only with {whose}, got it with --operator {common.operator}.")
    if common.precision is not None and "precision" not in taken:
        raise HesscopeError(
            f"Expected --precision with an operator that is made of products, got it with --operator {common.operator}."
        )
    settings = given | {"engine": common.engine, "seed": common.seed}
    return {name: value for name, value in settings.items() if name in taken and value is not None}


def model_source(common: CommonOptions) -> str:
    """Where the model that --model names is loaded from."""
    from hesscope.assets import model_path

    return str(model_path()) if common.model == _DEMO else str(common.model)


def eigenpairs_of(folder: Path) -> Eigenpairs:
    """The eigenpairs that an earlier run wrote to a folder."""
    from hesscope.results import Eigenpairs, load

    found = load(folder)
    if not isinstance(found, Eigenpairs):
        raise HesscopeError(f"Expected --start to be the folder of an eigs run, got one of kind {found.kind!r}.")
    return found


def number_or_word(text: str) -> float | str:
    """A number where it is one; the word itself otherwise."""
    try:
        return float(text)
    except ValueError:
        return text


def finish(
    result: Result,
    common: CommonOptions,
    folder: Path,
    kept: Checkpoint | None = None,
    *,
    drawn: Any = None,
    **own: Any,
) -> None:
    """Write the folder with its figure, all at once, let go of the run's checkpoint, and say what came out.

    `drawn` goes to the result's `plot`, `own` into the record.
    """
    options = {**dataclasses.asdict(common), "separately": _PREPARED.get() is not None, **own}
    write_run(result, folder, options, overwrite=common.overwrite, also_pt=common.also_pt, drawn=drawn)
    if kept is not None:
        comm().on_first(kept.discard)
    console = Console(highlight=False, soft_wrap=True)
    console.print(result.summary(), markup=False)
    if error := result.product_error_line():
        console.print(error, markup=False)
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
    """Result, manifest with the resolved options, and figure in one folder, all or nothing.

    Rank 0 does it; the others give it their rows of what is divided, and wait.
    """
    from hesscope.results.base import require_free, staged

    resolved = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    result = dataclasses.replace(result, provenance={**result.provenance, "command": resolved})
    with comm().summed(), result.outgoing() as outgoing:
        if comm().rank > 0:
            return folder
        require_free(folder, overwrite)
        with staged(folder) as stage:
            result.write(stage, outgoing, also_pt)
            result.plot(stage / f"{result.kind}.png", **(drawn or {}))
            for name, options_of_view in result.views().items():
                result.plot(stage / f"{name}.png", **options_of_view)
    return folder
