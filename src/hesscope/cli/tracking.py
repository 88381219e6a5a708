"""`hesscope eigs` with several models: the checkpoints of one training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hesscope.cli.cases import cases, titles
from hesscope.cli.options import CommonOptions
from hesscope.cli.resuming import Stopped, say
from hesscope.cli.running import finish, make_operator, one_of_several, output_folder
from hesscope.errors import HesscopeError


def models_of(common: CommonOptions, more: Sequence[str] | None) -> list[CommonOptions]:
    """The options of every model: of `--model A B C`, or of `--model A,B,C`; a single one's are the options as given."""
    if common.model is None or (not more and ("," not in common.model or Path(common.model).exists())):
        return [common]
    listed = ",".join([common.model, *(more or ())])
    return [case.common for of_model in cases(dataclasses.replace(common, model=listed), None) for case in of_model]


def run_track(models: list[CommonOptions], common: CommonOptions, cold: bool, how: dict[str, Any], own: dict[str, Any]) -> None:  # fmt: skip
    """Every model's eigenpairs into a folder of its own, and their track into the folder of these."""
    import hesscope as hs
    from hesscope.results.base import MANIFEST

    if one_of_several():
        raise HesscopeError("Expected one --model with --separately; track one selection of several models at a time.")
    folder = output_folder(common, "eigs")
    names = titles([str(one.model) for one in models])
    operators = {names[str(one.model)]: _later(one) for one in models}
    restart = common.restart or common.overwrite
    try:
        result = hs.track_eigs(operators, **how, seed=common.seed, folder=folder, cold=cold, restart=restart,
                               every=common.checkpoint_every, say=say)  # fmt: skip
    except KeyboardInterrupt as interrupt:
        if any(folder.glob(f"*/{MANIFEST}")) or any(folder.glob("*.partial")):
            raise Stopped(f"Stopped; run the same command again to continue in {folder}.") from interrupt
        raise
    finish(result, common, folder, None, **own, models=[str(one.model) for one in models])


def _later(common: CommonOptions) -> Any:
    return lambda: make_operator(common)
