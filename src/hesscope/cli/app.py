"""The verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hesscope.cli.options import CommonOptions, with_common_options
from hesscope.cli.resuming import checkpoint
from hesscope.cli.running import (
    eigenpairs_of,
    finish,
    make_operator,
    make_problem,
    make_space,
    number_or_word,
    output_folder,
)
from hesscope.cli.separate import separable
from hesscope.cli.tracking import models_of, run_track

app = typer.Typer(
    name="hesscope",
    help="The curvature of a language model's loss: exact Hessian blocks, diagonals, eigenpairs, traces, densities.\n\n"
    "Start with [bold]hesscope demo[/bold]. Every other verb takes a model, some text and some of the model's "
    "parameters, and writes a folder with result.safetensors, manifest.json and a figure.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Method = Annotated[
    str,
    typer.Option(
        help="auto, exact, hutchinson, hutch++, xtrace or xnystrace (semidefinite). auto is exact where that costs no more."
    ),
]
_BasisDevice = Annotated[
    str | None, typer.Option(help="Keep the basis there, such as cpu; with the weights by default.")
]
_BasisFolder = Annotated[Path | None, typer.Option(help="Keep the basis in files of this folder.")]
_Estimator = Annotated[
    str,
    typer.Option(
        "--method",
        help="auto, exact, hutchinson, gaussian, deflated, xdiag, nystrom, sampled, per-sequence or control-variate; auto "
        "chooses by a pilot.",
    ),
]
_Budget = Annotated[int | None, typer.Option(help="Operator products at most; 100 by default.")]
_Absolute = Annotated[bool, typer.Option("--absolute", help="Draw a block's magnitudes |H| instead of its signs.")]
_Target = Annotated[
    float | None, typer.Option(help="Stop at this relative error, such as 0.1; never before 30 probes.")
]


@app.command()
@with_common_options
@separable
def block(
    common: CommonOptions,
    route: Annotated[
        str, typer.Option(help="auto, weights or positions: auto takes the one that needs fewer products.")
    ] = "auto",
    absolute: _Absolute = False,
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
    method: _Estimator = "auto",
    budget: _Budget = None,
    target_error: _Target = None,
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


@app.command()
@with_common_options
@separable
def eigs(
    common: CommonOptions,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Further models after that of --model: checkpoints to track."),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="How many eigenpairs.")] = 6,
    which: Annotated[str, typer.Option(help="LM largest magnitude, LA largest, SA smallest, BE both ends.")] = "LM",
    tol: Annotated[float, typer.Option(help="|Av - lambda v| at most tol |lambda|, measured.")] = 1e-3,
    max_products: Annotated[int | None, typer.Option(help="Operator products at most; 300 by default.")] = None,
    start: Annotated[Path | None, typer.Option(help="Folder of an earlier eigs run to begin from.")] = None,
    max_basis: Annotated[int | None, typer.Option(help="Vectors kept at most; a full basis restarts.")] = None,
    basis_device: _BasisDevice = None,
    basis_folder: _BasisFolder = None,
    basis_dtype: Annotated[
        str | None, typer.Option(help="float16 or bfloat16: keep the basis rounded, in half the memory.")
    ] = None,
    method: Annotated[str, typer.Option(help="lanczos, or power: power iteration with deflation.")] = "lanczos",
    momentum: Annotated[str, typer.Option(help="For power: a number, or auto; 0 is the plain form.")] = "0",
    batches: Annotated[int | None, typer.Option(help="For power: every product on so many batches drawn anew.")] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Several models: also search from random, to count what warm starts save.")
    ] = False,
) -> None:
    """The leading eigenvalues and eigenvectors by Lanczos, with measured residuals.

    Several models, --model A B C (or by commas), are checkpoints: each search begins with the vectors of the one before,
    and the overlap of consecutive leading subspaces is reported.

    Example: hesscope eigs --model gpt2 --data wikitext --data-config wikitext-2-raw-v1 --split test --length 1024
    --sequences 64 --params 'transformer.h.*.attn.*' -k 10 --output-dir runs/gpt2-attn
    """
    import hesscope as hs

    models = models_of(common, more)
    folder = output_folder(common, "eigs")
    how: dict[str, Any] = {
        "start": start,
        "max_basis": max_basis,
        "basis_device": basis_device,
        "basis_folder": basis_folder,
        "basis_dtype": basis_dtype,
    }
    how |= {"method": method, "momentum": momentum, "batches": batches}
    own = {"k": k, "which": which, "tol": tol, "max_products": max_products, **how}
    how |= {"start": None if start is None else eigenpairs_of(start), "momentum": number_or_word(momentum)}
    if len(models) > 1:
        run_track(models, common, cold, {"k": k, "which": which, "tol": tol, "max_products": max_products} | how, own)
        return
    kept = checkpoint(common, folder)
    pairs = hs.eigs(make_operator(common), k, which, tol, max_products, common.seed, kept, **how, gather=False)
    finish(pairs, common, folder, kept, **own)


@app.command()
@with_common_options
@separable
def trace(
    common: CommonOptions, method: _Method = "auto", budget: _Budget = None, target_error: _Target = None
) -> None:
    """The trace, exact or estimated with its standard error."""
    import hesscope as hs

    folder = output_folder(common, "trace")
    own = {"method": method, "budget": budget, "target_error": target_error}
    kept = checkpoint(common, folder)
    finish(
        hs.trace(make_operator(common), method, budget, target_error, common.seed, kept), common, folder, kept, **own
    )


@app.command()
@with_common_options
@separable
def density(
    common: CommonOptions,
    probes: Annotated[int, typer.Option(help="Random start vectors; the error bars come from their spread.")] = 10,
    steps: Annotated[int, typer.Option(help="Lanczos steps a probe: more resolve the spectrum finer.")] = 60,
    bandwidth: Annotated[
        float | None, typer.Option(help="Width of the smoothing, in units of the eigenvalues.")
    ] = None,
    basis: Annotated[
        bool, typer.Option("--basis/--no-basis", help="Keep each probe's basis, or three vectors only.")
    ] = True,
    basis_device: _BasisDevice = None,
    basis_folder: _BasisFolder = None,
) -> None:
    """The spectral density by stochastic Lanczos quadrature: probes x steps products."""
    import hesscope as hs

    folder = output_folder(common, "density")
    own = {"probes": probes, "steps": steps, "bandwidth": bandwidth}
    where: dict[str, Any] = {"basis": basis, "basis_device": basis_device, "basis_folder": basis_folder}
    kept = checkpoint(common, folder)
    found = hs.density(make_operator(common), probes, steps, bandwidth, common.seed, kept, **where)
    finish(found, common, folder, kept, **own, **where)


@app.command()
@with_common_options
@separable
def lanczos(
    common: CommonOptions,
    steps: Annotated[int, typer.Option(help="Lanczos steps, a product each.")] = 60,
    reorthogonalize: Annotated[
        bool, typer.Option("--reorthogonalize/--three-term", help="Keep a basis, or three vectors only.")
    ] = True,
    keep_basis: Annotated[bool, typer.Option("--keep-basis", help="Write the basis with the result.")] = False,
    basis_device: _BasisDevice = None,
    basis_folder: _BasisFolder = None,
    form: Annotated[str, typer.Option(help="The picture: stem, binned or smoothed.")] = "stem",
    bandwidth: Annotated[
        float | None, typer.Option(help="Width of the smoothing, in units of the eigenvalues.")
    ] = None,
    grid: Annotated[int | None, typer.Option(help="Bins, or points of the smoothed curve.")] = None,
    log: Annotated[bool, typer.Option("--log/--linear", help="The picture's vertical axis.")] = True,
) -> None:
    """A raw Lanczos run from a random start: T, nodes and first-row weights, and the basis if asked.

    Example: hesscope lanczos --model demo --data demo --length 32 --sequences 2 --params 'model.layers.3.mlp.*'
    --steps 30 --form smoothed
    """
    import hesscope as hs

    folder = output_folder(common, "lanczos")
    own: dict[str, Any] = {"steps": steps, "reorthogonalize": reorthogonalize, "keep_basis": keep_basis}
    where: dict[str, Any] = {"basis_device": basis_device, "basis_folder": basis_folder}
    picture = {"form": form, "bandwidth": bandwidth, "grid": grid, "log": log}
    kept = checkpoint(common, folder)
    run = hs.lanczos(make_operator(common), **own, seed=common.seed, checkpoint=kept, **where)
    finish(run, common, folder, kept, drawn=picture, **own, **where, **picture)


@app.command()
@with_common_options
def groups(
    common: CommonOptions,
    by: Annotated[str, typer.Option(help="block, layer, or kind: all layers of one name together.")] = "block",
    probes: Annotated[int, typer.Option(help="Sign vectors a group; the error bars come from their spread.")] = 10,
    steps: Annotated[int, typer.Option(help="Lanczos steps a probe, for the density.")] = 30,
    max_products: Annotated[int, typer.Option(help="Products at most for a group's extreme eigenvalues.")] = 60,
    tol: Annotated[float, typer.Option(help="|Av - lambda v| at most tol |lambda|, measured.")] = 1e-3,
    basis_device: _BasisDevice = None,
    basis_folder: _BasisFolder = None,
) -> None:
    """Trace, extreme eigenvalues and density of every block, layer or kind of layer, and the norms between them.

    Costs, a group: probes products with the whole selection, and probes x steps + max-products on the group alone.
    """
    import hesscope as hs

    folder = output_folder(common, "groups")
    own: dict[str, Any] = {"by": by, "probes": probes, "steps": steps, "max_products": max_products, "tol": tol}
    where: dict[str, Any] = {"basis_device": basis_device, "basis_folder": basis_folder}
    kept = checkpoint(common, folder)
    found = hs.groups(make_operator(common), **own, seed=common.seed, checkpoint=kept, **where)
    finish(found, common, folder, kept, **own, **where)


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


@app.command()
@with_common_options
def plan(
    common: CommonOptions,
    what: Annotated[
        str,
        typer.Option(help="eigs, lanczos, block, diagonal, trace, density or product: how many products there are."),
    ] = "eigs",
    products: Annotated[int | None, typer.Option(help="That number itself.")] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure/--no-measure", help="Time operations and a short sequence: seconds are more certain."),
    ] = True,
    ranks: Annotated[int | None, typer.Option(help="Plan for so many ranks of a cluster, with --layout.")] = None,
    ranks_per_node: Annotated[int, typer.Option(help="Ranks of a machine, for --layout hsdp.")] = 8,
    batches: Annotated[int | None, typer.Option(help="Batches in all; one a rank by default.")] = None,
    basis: Annotated[int, typer.Option(help="Vectors that the algorithm keeps, on --ranks.")] = 30,
    flops: Annotated[float, typer.Option(help="Operations a second of a rank, as reached.")] = 4e14,
    bandwidth: Annotated[float, typer.Option(help="Bytes a second that a rank sends.")] = 5e10,
    device_memory: Annotated[str, typer.Option(help="Memory of a rank's device.")] = "80GB",
) -> None:
    """Memory and time with every engine, before anything heavy is run, and what would fit.

    Without --data no weights are loaded: the configuration, --length and --batch-size are enough.

    Example: hesscope plan --model demo --length 64 --batch-size 2 --what block --params 'model.layers.3.mlp.*'
    """
    from hesscope.cli.planning import run_cluster_plan, run_plan

    if ranks is None:
        run_plan(common, what, products, measure)
    else:
        run_cluster_plan(
            common, ranks, ranks_per_node=ranks_per_node, batches=batches, basis=basis, flops=flops, bandwidth=bandwidth,
            device_memory=device_memory,
        )  # fmt: skip


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of an earlier run.")],
    plot: Annotated[Path | None, typer.Option(help="Draw its figure again, to a .png, .pdf or .svg file.")] = None,
    absolute: _Absolute = False,
) -> None:
    """Print what an earlier run found, what it cost and what it was run on."""
    from hesscope.cli.showing import show_folder

    show_folder(folder, plot, absolute)


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder to write; a demonstration in it is replaced.")] = Path(
        "hesscope-demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of every random vector.")] = 0,
) -> None:
    """Look at the curvature of the small language model that comes with hesscope: no network, under a minute."""
    from hesscope.cli.demo import run_demo

    run_demo(output_dir, seed)
