"""Verbs that check and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hesscope.cli.application import app
from hesscope.cli.options import CommonOptions, with_common_options
from hesscope.cli.running import finish, make_problem, make_space, output_folder
from hesscope.errors import HesscopeError


@app.command()
@with_common_options
def structure(
    common: CommonOptions,
    losses: Annotated[
        str | None,
        typer.Option(help="Compare losses: log-perplexity, perplexity, classification, regression, by commas."),
    ] = None,
    block: Annotated[bool, typer.Option(help="Keep the exact matrix of each case in a folder beside it.")] = True,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it would take; loads no weights, runs nothing.")
    ] = False,
) -> None:
    """Is the Hessian block-diagonal? Energy by rows, layers and blocks against chance, and all eigenvalues.

    Costs n products for n weights. Several models by commas in --model, and several losses, give a folder each and one
    table of all.

    Example: hesscope structure --model demo --data demo --length 64 --sequences 4 --losses log-perplexity,regression
    --params 'model.layers.*_proj.weight[0:2, 0:2]'
    """
    from hesscope.cli.planning import plan_structure
    from hesscope.cli.structure import run_structure

    if plan:
        plan_structure(common, losses)
    else:
        run_structure(common, losses, keep_block=block)


@app.command()
@with_common_options
def verify(common: CommonOptions) -> None:
    """Check the Hessian on your own problem: symmetry, repeatability, token weighting, a finite difference.

    Exits with status 1 if a check fails.
    """
    import hesscope as hs

    if common.operator != "hessian":
        raise HesscopeError(
            f"Expected --operator hessian for verify, which checks that, got {common.operator!r}; leave it out."
        )
    folder = output_folder(common, "verify")
    problem = make_problem(common)
    result = hs.verify(problem, make_space(common, problem), common.engine, common.seed)
    finish(result, common, folder)
    if not result.passed:
        raise typer.Exit(1)


@app.command("cross-check")
@with_common_options
def cross_check(
    common: CommonOptions,
    columns: Annotated[int, typer.Option(help="Columns to hold to differences of the gradient.")] = 6,
    entries: Annotated[int, typer.Option(help="Entries to hold to differences of the loss.")] = 12,
    block: Annotated[
        Path | None, typer.Option(help="Check the block of this earlier run, made with the same options.")
    ] = None,
) -> None:
    """Hold an exact block to finite differences of the gradient and of the loss, in float64.

    Computes the block in float64, or checks the one that an earlier run wrote. Exits with status 1 if a check fails.
    """
    from hesscope.cli.studying import run_cross_check

    if not run_cross_check(common, columns, entries, block):
        raise typer.Exit(1)


@app.command()
@with_common_options
def convergence(
    common: CommonOptions,
    keep: Annotated[
        str, typer.Option(help="Running estimates to keep: auto, all, none, or numbers as in 1,2,4.")
    ] = "auto",
) -> None:
    """The exact block after 1, 2, ..., S sequences, and how far each one moved it; costs one block in all."""
    from hesscope.cli.studying import run_convergence

    run_convergence(common, keep)


@app.command()
@with_common_options
def approximations(
    common: CommonOptions,
    kinds: Annotated[
        str | None,
        typer.Option(
            help="diagonal, rows, layers, blocks, ggn, fisher, kfac, ekfac, by commas; all but fisher by default."
        ),
    ] = None,
    exact: Annotated[Path | None, typer.Option(help="Folder of a run that found the exact block.")] = None,
) -> None:
    """How good are diagonal, block-diagonal, Gauss-Newton and Kronecker-factored approximations? Errors and a picture.

    Example: hesscope approximations --model demo --data demo --length 32 --sequences 2
    --params 'model.layers.3.mlp.*_proj.weight[0:4, 0:8]'
    """
    from hesscope.cli.studying import run_approximations

    run_approximations(common, kinds, exact)


@app.command("perplexity-study")
@with_common_options
def perplexity_study(common: CommonOptions) -> None:
    """The Hessians of the mean loss R and of the perplexity exp(R), their spectra, and the check of what they differ by."""
    from hesscope.cli.studying import run_perplexity_study

    run_perplexity_study(common)
