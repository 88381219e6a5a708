"""`hesscope demo`: five looks at the curvature of the model that comes with the package."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from hesscope.cli.running import write_run
from hesscope.errors import HesscopeError

if TYPE_CHECKING:
    from hesscope.problem import Problem
    from hesscope.results import Result

_LENGTH, _SEQUENCES = 128, 4
_ROWS = "model.layers.3.self_attn.q_proj.weight[0:2]"
_LAYER = "model.layers.3.self_attn.k_proj.weight"
_TITLES = {
    "eigs": "Leading eigenvalues at both ends",
    "trace": "Trace",
    "density": "Spectral density",
    "block": "An exact block",
    "diagonal": "One layer's diagonal",
}


def run_demo(folder: Path, seed: int = 0) -> None:
    """Compute, draw and report into a folder that is new, empty or an earlier demonstration."""
    _require_own(folder)
    began = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    from hesscope.results.base import MANIFEST, jsonable, staged

    problem = demo_problem()
    console.print(
        f"a byte-level Llama of {sum(p.numel() for p in problem.model.parameters()):,} weights on {problem.N} bytes of "
        f"held-out English: mean loss {problem.risk():.3f} nats a byte"
    )
    with staged(folder) as stage:
        results = dict(_results(problem, seed, console))
        for name, result in results.items():
            write_run(result, stage / name, {"verb": "demo", "seed": seed})
        report = _report(stage, results)
        manifest = {"kind": "demo", "results": list(results), "seed": seed, "seconds": time.perf_counter() - began}
        (stage / MANIFEST).write_text(json.dumps(jsonable(manifest), indent=2) + "\n", encoding="utf-8")
    from hesscope.report import key_number_table

    console.print(key_number_table(list(results.values())))
    console.print(f"report: {folder / report.name}  ({time.perf_counter() - began:.0f} s)", markup=False)


def demo_problem() -> Problem:
    """The embedded model on the held-out prose."""
    from hesscope.assets import model_path, prose
    from hesscope.problem import causal_lm

    return causal_lm(model_path(), [prose("held_out")], length=_LENGTH, sequences=_SEQUENCES, batch_size=4, pack=True)


def _results(problem: Problem, seed: int, console: Console) -> list[tuple[str, Result]]:
    import hesscope as hs

    everything = hs.hessian(problem, hs.select(problem))
    found: list[tuple[str, Result]] = []

    def add(name: str, result: Result) -> None:
        found.append((name, result))
        console.print(f"  {name:9s} {result.cost_line()}", markup=False)

    add("eigs", hs.eigs(everything, k=6, which="BE", tol=1e-3, seed=seed))
    add("trace", hs.trace(everything, budget=40, seed=seed))
    add("density", hs.density(everything, probes=4, steps=25, seed=seed))
    add("block", hs.block(hs.hessian(problem, hs.select(problem, _ROWS))))
    add("diagonal", hs.diagonal(hs.hessian(problem, hs.select(problem, _LAYER)), budget=400, seed=seed))
    return found


def _report(stage: Path, results: dict[str, Result]) -> Path:
    from hesscope.report import section, write_report

    figures = {name: stage / name / f"{result.kind}.png" for name, result in results.items()}
    return write_report(stage, [section(result, figures[n], _TITLES[n]) for n, result in results.items()])


def _require_own(folder: Path) -> None:
    """Only a new, empty or earlier demonstration's folder is written to."""
    from hesscope.results.base import MANIFEST

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        own = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("kind") == "demo"
    except (OSError, ValueError, AttributeError):
        own = False
    if not own:
        raise HesscopeError(
            f"The folder {str(folder)!r} holds something that is not a demonstration; choose another --output-dir."
        )
