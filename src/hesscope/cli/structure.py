"""`hesscope structure`: one case into one folder, or several cases into folders of one folder, with their comparison."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from hesscope.cli.cases import Case, cases
from hesscope.cli.options import CommonOptions
from hesscope.cli.ranks import comm
from hesscope.cli.resuming import checkpoint, stopped_in_words
from hesscope.cli.running import make_problem, operator_of, output_folder, write_run
from hesscope.errors import HesscopeError

if TYPE_CHECKING:
    from hesscope.operators import Operator
    from hesscope.problem import Problem
    from hesscope.results import Structure


def run_structure(common: CommonOptions, losses: str | None, keep_block: bool) -> None:
    """Run every model with every loss. A finished case is a result of its own: the same command goes on after it, or inside one."""
    planned = cases(common, losses)
    folder = output_folder(common, "structure")
    several = sum(map(len, planned)) > 1
    console = Console(highlight=False, soft_wrap=True)
    found: dict[str, Structure] = {}
    for of_model in planned:
        problem = make_problem(of_model[0].common)
        for case in of_model:
            where = folder / case.folder if several else folder
            found[case.name] = _run(case, operator_of(case.common, _under(problem, case.common)), where, keep_block)
            console.print(f"{case.name}: " * several + found[case.name].summary(), markup=False)
        del problem  # a model goes before the next is loaded
    if several:
        from hesscope.algorithms import structure

        comparison = structure(found)
        options = {**dataclasses.asdict(common), "losses": losses, "block": keep_block}
        write_run(comparison, folder, options, overwrite=common.overwrite)
        console.print(comparison.summary(), markup=False)
    console.print(f"written to {folder}", markup=False)


def _under(problem: Problem, common: CommonOptions) -> Problem:
    """The problem itself, or the same model and batches under the case's loss and objective."""
    from hesscope.problem.causal_lm import with_loss

    return with_loss(problem, common.loss, common.objective)


def _run(case: Case, H: Operator, folder: Path, keep_block: bool) -> Structure:
    from hesscope.algorithms import block
    from hesscope.algorithms.structure import of_block

    overwrite = case.common.overwrite
    if not overwrite and (earlier := _finished(folder, H)) is not None:
        return earlier
    options = dataclasses.asdict(case.common)
    kept = checkpoint(case.common, folder)
    with stopped_in_words(folder):
        exact = block(H, checkpoint=kept)
    if keep_block:
        # Written first: it is what took the time.
        write_run(exact, folder / "block", options, overwrite=True, also_pt=case.common.also_pt)
    result = of_block(exact, H.comm)
    write_run(result, folder, options, overwrite=overwrite)
    comm().on_first(kept.discard)
    return result


def _finished(folder: Path, H: Operator) -> Structure | None:
    """An earlier run of this very case; raises HesscopeError where the folder holds another."""
    from hesscope.algorithms.driver import provenance
    from hesscope.algorithms.identity import differences, recorded
    from hesscope.results import Structure, load
    from hesscope.results.base import MANIFEST

    if not comm().on_first(lambda: (folder / MANIFEST).exists()):
        return None
    earlier: Structure = load(folder)
    changed = ["it is no structure"]
    if isinstance(earlier, Structure):
        changed = differences(recorded(earlier.provenance), recorded(provenance(H, {})))
    if not changed:
        return earlier
    raise HesscopeError(
        f"The folder {str(folder)!r} already holds another run: {'; '.join(changed)}. Choose another --output-dir, or pass --overwrite."
    )
