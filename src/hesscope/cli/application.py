"""The command line, to which the modules of verbs add theirs."""

from __future__ import annotations

import typer

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
