"""One result per layer in one run."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from hesscope.cli.options import CommonOptions
from hesscope.cli.ranks import comm
from hesscope.cli.resuming import DECIDE_NOTHING, Stopped, checkpoint
from hesscope.cli.running import make_problem, make_space, output_folder, prepared
from hesscope.cli.showing import list_runs

if TYPE_CHECKING:
    from hesscope.problem import Problem
    from hesscope.space import Space

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

    Every layer's folder appears complete or not at all, as soon as it is computed. Layers that this very command has
    done already, before it was stopped, are not done again.
    """
    from hesscope.results import load

    folder = output_folder(common, command.__name__)
    problem = make_problem(common)
    layers = make_space(common, problem).separately()
    runs = {name: dataclasses.replace(common, output_dir=folder / name) for name in layers}
    finished = {name for name, one in runs.items() if is_done(one, own, problem, layers[name])}
    if len(finished) == len(runs):
        finished = set()  # the whole run is there: refused, as any other
    for name in runs.keys() - finished:
        output_folder(runs[name], command.__name__)
    summaries: dict[str, str] = {}
    try:
        for name, one in runs.items():
            if name not in finished:
                with prepared(problem, layers[name]):
                    command(one, **own)
            summaries[name] = load(folder / name).summary()
    except KeyboardInterrupt as interrupt:
        if summaries or any(checkpoint(one, folder / name).exists for name, one in runs.items()):
            raise Stopped(f"Stopped; run the same command again to continue in {folder}.") from interrupt
        raise
    finally:
        # After an error or an interrupt as well: the layers before it are on disk.
        list_runs(f"{len(summaries)} of {len(runs)} layers in {folder}:", summaries)


def is_done(common: CommonOptions, own: dict[str, Any], problem: Problem, space: Space) -> bool:
    """Whether the folder holds this layer's result of this very command, on the same problem and with the same packages."""
    return comm().on_first(lambda: _is_done(common, own, problem, space))


def _is_done(common: CommonOptions, own: dict[str, Any], problem: Problem, space: Space) -> bool:
    from hesscope.algorithms.driver import versions
    from hesscope.results.base import MANIFEST, jsonable

    assert common.output_dir is not None
    if common.overwrite or common.restart or not (common.output_dir / MANIFEST).exists():
        return False
    try:
        made = json.loads((common.output_dir / MANIFEST).read_text(encoding="utf-8"))["provenance"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    options = jsonable({**dataclasses.asdict(common), "separately": True, **own})
    before = made.get("command") or {}
    same = all(before.get(name) == value for name, value in options.items() if name not in DECIDE_NOTHING)
    now = {"selection": space.describe(), "versions": versions()}
    return (
        same
        and (made.get("problem") or {}).get("fingerprint") == problem.fingerprint
        and all(made.get(key) == jsonable(value) for key, value in now.items())
    )
