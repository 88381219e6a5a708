"""One result per layer in one run."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from hesscope.cli.options import CommonOptions
from hesscope.cli.running import make_problem, make_space, output_folder, prepared
from hesscope.cli.showing import list_runs

_Separately = Annotated[
    bool, typer.Option("--separately", help="One result per layer of the selection, each in a folder of its own.")
]


def separable(command: Callable[..., None]) -> Callable[..., None]:
    """Give a verb `(common, **own)` the flag `--separately`: then it runs once a layer, with model and data loaded once."""

    def verb(common: CommonOptions, separately: bool = False, **own: Any) -> None:
        if separately:
            _run_each(common, command, own)
        else:
            command(common, **own)

    flag = inspect.Parameter("separately", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Separately)
    common, *own = inspect.signature(command).parameters.values()
    parameters = [common, *(p.replace(kind=p.KEYWORD_ONLY) for p in own), flag]
    verb.__name__, verb.__doc__ = command.__name__, command.__doc__
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = get_type_hints(command, include_extras=True) | {"separately": _Separately}
    return verb


def _run_each(common: CommonOptions, command: Callable[..., None], own: dict[str, Any]) -> None:
    """Run the verb for every layer, into `OUTPUT/block00-LAYER`, and list what came out.

    Every layer's folder appears complete or not at all, as soon as it is computed.
    """
    from hesscope.results import load

    folder = output_folder(common, command.__name__)
    problem = make_problem(common)
    layers = make_space(common, problem).separately()
    runs = {name: dataclasses.replace(common, output_dir=folder / name) for name in layers}
    for one in runs.values():
        output_folder(one, command.__name__)
    summaries: dict[str, str] = {}
    try:
        for name, one in runs.items():
            with prepared(problem, layers[name]):
                command(one, **own)
            summaries[name] = load(folder / name).summary()
    finally:
        # After an error or an interrupt as well: the layers before it are on disk.
        list_runs(f"{len(summaries)} of {len(runs)} layers in {folder}:", summaries)
