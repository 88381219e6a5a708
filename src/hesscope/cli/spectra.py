"""Verbs of the spectrum: eigenpairs, trace, density."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from hesscope.cli.application import app
from hesscope.cli.options import BasisDevice, BasisFolder, Budget, CommonOptions, Method, Target, with_common_options
from hesscope.cli.resuming import checkpoint
from hesscope.cli.running import eigenpairs_of, finish, make_operator, number_or_word, output_folder
from hesscope.cli.separate import separable
from hesscope.cli.tracking import models_of, run_track
from hesscope.errors import HesscopeError


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
    basis_device: BasisDevice = None,
    basis_folder: BasisFolder = None,
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
def trace(common: CommonOptions, method: Method = "auto", budget: Budget = None, target_error: Target = None) -> None:
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
    shift: Annotated[
        float | None, typer.Option(help="Say log det(|A| + shift I), too; 0 where no eigenvalue is near zero.")
    ] = None,
    basis: Annotated[
        bool, typer.Option("--basis/--no-basis", help="Keep each probe's basis, or three vectors only.")
    ] = True,
    basis_device: BasisDevice = None,
    basis_folder: BasisFolder = None,
) -> None:
    """The spectral density by stochastic Lanczos quadrature: probes x steps products."""
    import hesscope as hs

    if shift is not None and not 0 <= shift < math.inf:
        raise HesscopeError(f"Expected --shift to be 0 or more, got {shift}.")
    folder = output_folder(common, "density")
    own = {"probes": probes, "steps": steps, "bandwidth": bandwidth}
    where: dict[str, Any] = {"basis": basis, "basis_device": basis_device, "basis_folder": basis_folder}
    kept = checkpoint(common, folder)
    found = hs.density(make_operator(common), probes, steps, bandwidth, common.seed, kept, **where)
    finish(found, common, folder, kept, **own, **where)
    if shift is not None:
        value, error = found.log_determinant(shift)
        typer.echo(f"log det(|A| + {shift:g} I) = {value:.6g} +- {error:.2g}")


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
    basis_device: BasisDevice = None,
    basis_folder: BasisFolder = None,
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
    from hesscope.figures.lanczos import require_picture

    require_picture(form, bandwidth, grid)
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
    basis_device: BasisDevice = None,
    basis_folder: BasisFolder = None,
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
