"""`hesscope diagonal-study` over numbers of sequences and blocks of the model: a study each, and one figure of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hesscope.cli.options import CommonOptions
from hesscope.cli.ranks import comm
from hesscope.cli.running import make_problem, make_space, output_folder, prepared
from hesscope.cli.separate import is_done
from hesscope.cli.showing import list_runs, load_kind
from hesscope.errors import HesscopeError

if TYPE_CHECKING:
    from torch import nn

FIGURE = "diagonal-study-grid.png"


def run_study_grid(
    common: CommonOptions, sequences: str | None, blocks: str | None, study: Callable[..., None], own: dict[str, Any]
) -> None:
    """Run `study` for every number of sequences in every block, into `OUTPUT/sequences0016-block00`.

    Studies that this very command has finished before are not run again, and one that was stopped goes on.
    """
    from hesscope.figures.diagonal_study_grid import draw_study_grid
    from hesscope.problem.microbatches import count_rows
    from hesscope.results import DiagonalStudy

    if own.get("exact") or own.get("reference"):
        raise HesscopeError(
            "Expected no --exact and --reference with --over-sequences or --over-blocks: every study has its own."
        )
    folder = output_folder(common, "diagonal-study")
    found: dict[tuple[int, str], DiagonalStudy] = {}
    try:
        for count in _counts(sequences, common.sequences):
            problem = make_problem(dataclasses.replace(common, sequences=count))
            total = sum(count_rows(batch) or 1 for batch in problem.batches)
            for block in _blocks(blocks, common.blocks, problem.model):
                name = f"sequences{total:04d}" + ("" if block is None else f"-block{block:02d}")
                where = common.blocks if block is None else str(block)
                one = dataclasses.replace(common, sequences=count, blocks=where, output_dir=folder / name)
                space = make_space(one, problem)
                if not is_done(one, own, problem, space):
                    with prepared(problem, space):
                        study(one, **own)
                found[total, "" if block is None else f"block {block}"] = load_kind(folder / name, DiagonalStudy)
    finally:
        lines = {", ".join([f"{n} sequences", where]): run.summary() for (n, where), run in found.items()}
        list_runs(f"{len(found)} studies in {folder}:", {key: text.splitlines()[-1] for key, text in lines.items()})
    if comm().rank == 0:
        draw_study_grid(found, folder / FIGURE)


def _blocks(wanted: str | None, otherwise: str | None, model: nn.Module) -> Sequence[int | None]:
    """The blocks by number; [None], the selection as it is, where no blocks are asked for."""
    from hesscope.models import find_trunk
    from hesscope.problem.numbers import numbers

    wanted = wanted or otherwise
    if wanted is None:
        return [None]
    trunk = find_trunk(model)
    if trunk is None:
        raise HesscopeError(
            f"Expected a model with a list of like blocks, but {type(model).__name__} has none; leave --over-blocks out."
        )
    return numbers(wanted, len(trunk.blocks), "blocks", type(model).__name__)


def _counts(text: str | None, otherwise: int | None) -> Sequence[int | None]:
    """`4,16` as numbers; the one of --sequences where there is none."""
    if text is None:
        return [otherwise]
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise HesscopeError(f"Expected --over-sequences to be numbers by commas, such as 4,16,64, got {text!r}.")
    return sorted({int(part) for part in parts})
