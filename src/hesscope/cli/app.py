"""All verbs, in the order of the help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hesscope.cli import entries, spectra, studies  # noqa: F401  # their verbs come first
from hesscope.cli.application import app
from hesscope.cli.options import Absolute, CommonOptions, with_common_options

__all__ = ["app"]


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
    absolute: Absolute = False,
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
