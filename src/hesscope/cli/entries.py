"""Verbs of single entries: exact blocks and diagonals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hesscope.cli.application import app
from hesscope.cli.options import Absolute, Budget, CommonOptions, Estimator, Target, with_common_options
from hesscope.cli.resuming import checkpoint
from hesscope.cli.running import finish, make_operator, output_folder
from hesscope.cli.separate import separable


@app.command()
@with_common_options
@separable
def block(
    common: CommonOptions,
    route: Annotated[
        str, typer.Option(help="auto, weights or positions: auto takes the one that needs fewer products.")
    ] = "auto",
    absolute: Absolute = False,
) -> None:
    """The exact matrix of the operator over the selected weights: at most n products for n weights.

    Example: hesscope block --model gpt2 --data wikitext --data-config wikitext-2-raw-v1 --split test --length 256
    --sequences 8 --params 'transformer.h.0.attn.c_proj.weight[0]'
    """
    import hesscope as hs

    folder = output_folder(common, "block")
    kept = checkpoint(common, folder)
    finish(
        hs.block(make_operator(common), route, kept),
        common,
        folder,
        kept,
        drawn={"absolute": absolute},
        route=route,
        absolute=absolute,
    )


@app.command()
@with_common_options
@separable
def diagonal(
    common: CommonOptions,
    method: Estimator = "auto",
    budget: Budget = None,
    target_error: Target = None,
    max_seconds: Annotated[float | None, typer.Option(help="Stop after so many seconds of work.")] = None,
    directions: Annotated[int | None, typer.Option(help="How many --method deflated removes; half by default.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Run a few columns, say what the exact diagonal would take, and stop.")
    ] = False,
) -> None:
    """The diagonal: exact, or estimated with a standard error for every entry.

    Example: hesscope diagonal --model gpt2 --data wikitext --data-config wikitext-2-raw-v1 --split test --length 256
    --sequences 16 --params 'transformer.h.0.attn.c_proj.weight' --target-error 0.1
    """
    import hesscope as hs

    if plan:
        typer.echo(hs.plan_exact_diagonal(make_operator(common)).summary())
        return
    folder = output_folder(common, "diagonal")
    own = {"method": method, "budget": budget, "target_error": target_error}
    own |= {"max_seconds": max_seconds, "directions": directions}
    kept = checkpoint(common, folder)
    result = hs.diagonal(make_operator(common), **own, seed=common.seed, checkpoint=kept)  # type: ignore[arg-type]
    finish(result, common, folder, kept, **own)


@app.command("diagonal-study")
@with_common_options
def diagonal_study(
    common: CommonOptions,
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method of diagonal; may be repeated. All but auto and gaussian by default."),
    ] = None,
    budget: Annotated[
        list[int] | None, typer.Option(help="Products; may be repeated. 30, 60, 120 and 240 by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Repetitions with successive seeds.")] = 3,
    exact: Annotated[
        Path | None, typer.Option(help="Folder of a run that found the exact diagonal; computed by default.")
    ] = None,
    reference: Annotated[
        list[Path] | None, typer.Option(help="Folder of another diagonal to draw as a line; may be repeated.")
    ] = None,
    over_sequences: Annotated[
        str | None, typer.Option(help="A study for each of several numbers of sequences, such as 4,16,64.")
    ] = None,
    over_blocks: Annotated[
        str | None, typer.Option(help="A study for each of several blocks of the model, such as 0,5,-1 or all.")
    ] = None,
) -> None:
    """Error against products: estimators of a diagonal held to the exact one, with their figure.

    With --over-sequences and --over-blocks a grid of studies in folders of their own, and one figure of all.

    Example: hesscope diagonal-study --model gpt2 --data wikitext --data-config wikitext-2-raw-v1 --split test --length 256
    --sequences 16 --params 'transformer.h.0.attn.c_proj.weight[0]' --budget 60 --budget 240
    """
    from hesscope.cli.study_grid import run_study_grid
    from hesscope.cli.studying import run_diagonal_study

    own: dict[str, Any] = {"method": method, "budget": budget, "seeds": seeds}
    own |= {"exact": exact, "reference": reference}
    if over_sequences is None and over_blocks is None:
        run_diagonal_study(common, **own)
    else:
        run_study_grid(common, over_sequences, over_blocks, run_diagonal_study, own)
