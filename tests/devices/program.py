"""Every operator and algorithm, to be run on a model that is somewhere and on one on the CPU.

As a script it runs a few on the device of `elsewhere`.

Prints {what: relative difference or error} as JSON.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import hesscope as hs
from architectures import ragged_batches, tiny
from devices.elsewhere import another_device
from hesscope.engines import auto, stages
from hesscope.engines.forward_context import NotInForwardMode

#: Of a selection, a pattern or {name: index}.
Part = Any
Run = Callable[[hs.Problem, Part], Any]


def refused(*_: Any) -> Any:
    raise NotInForwardMode("tensors made of others do not run in forward mode")


def vectors(space: hs.Space) -> Tensor:
    return space.flatten(space.rademacher(0, [0, 1]))


def product(make: Callable[..., hs.Operator], **how: Any) -> Run:
    def run(problem: hs.Problem, _: Part) -> Tensor:
        space = hs.select(problem)
        return make(problem, space, **how) @ vectors(space)

    return run


def of_part(find: Callable[[hs.Operator], Tensor], make: Any = hs.hessian) -> Run:
    return lambda problem, part: find(make(problem, hs.select(problem, part)))


RUNS: dict[str, Run] = {
    "reverse-over-reverse": product(hs.hessian),
    "streamed": product(hs.hessian, engine="streamed"),
    "finite-difference": product(hs.hessian, engine="finite-difference"),
    "float32": product(hs.hessian, precision="float32"),
    "bfloat16": product(hs.hessian, precision="bfloat16"),
    "ggn": product(hs.ggn),
    "ggn, streamed": product(hs.ggn, engine="streamed"),
    "fisher": product(hs.fisher, per="sequence", samples=2),
    "empirical fisher": product(hs.empirical_fisher),
    "kfac": of_part(lambda A: A @ vectors(A.space), hs.kfac),
    "ekfac": of_part(lambda A: A @ vectors(A.space), lambda p, s: hs.kfac(p, s, corrected=True)),
    "block": of_part(lambda A: hs.block(A, "weights").matrix),
    "block, positions": of_part(lambda A: hs.block(A, "positions").matrix),
    "ggn block": of_part(lambda A: hs.block(A).matrix, hs.ggn),
    "eigs": of_part(lambda A: hs.eigs(A, k=2, tol=1e-2).eigenvalues),
    "eigs, restarted": of_part(lambda A: hs.eigs(A, k=1, tol=1e-2, max_basis=6).eigenvalues),
    "eigs, power": of_part(lambda A: hs.eigs(A, k=1, tol=0.3, max_products=100, method="power").eigenvalues),
    "lanczos": of_part(lambda A: hs.lanczos(A, 5).T),
    "lanczos, three terms": of_part(lambda A: hs.lanczos(A, 5, reorthogonalize=False).T),
    "density": of_part(lambda A: hs.density(A, probes=2, steps=4).nodes),
    "groups": of_part(lambda A: hs.groups(A, by="layer", probes=2, steps=3, max_products=6).nodes),
    **{
        f"trace, {method}": of_part(lambda A, method=method: torch.tensor(hs.trace(A, method, budget=18).estimate))
        for method in ("hutchinson", "hutch++", "xtrace")
    },
    **{
        f"diagonal, {method}": of_part(lambda A, method=method: hs.diagonal(A, method, budget=40).flat())
        for method in ("auto", "hutchinson", "gaussian", "deflated", "xdiag", "per-sequence", "control-variate")
    },
    **{
        f"diagonal, {method}": of_part(lambda A, method=method: hs.diagonal(A, method, budget=40).flat(), hs.ggn)
        for method in ("sampled", "nystrom")
    },
    "trace, exact": of_part(lambda A: torch.tensor(hs.trace(A, "exact").estimate)),
    "diagonal, exact": of_part(lambda A: hs.diagonal(A, "exact").flat()),
    "vectors on the CPU": lambda p, part: (
        hs.hessian(resting(p), hs.select(resting(p), part)) @ vectors(hs.select(p, part)).cpu()
    ),
    "vectors on the CPU, kept graphs": lambda p, part: (
        hs.eigs(hs.hessian(resting(p), engine="reverse-over-reverse"), k=1).eigenvalues
    ),
    "vectors on the CPU, ggn": lambda p, part: (
        hs.ggn(resting(p), hs.select(resting(p), part)) @ vectors(hs.select(p, part)).cpu()
    ),
    "perplexity": lambda p, part: (
        hs.hessian(p.related(objective="perplexity"), hs.select(p, part)) @ vectors(hs.select(p, part))
    ),
    "flat indices": lambda p, part: product_of(hs.select(p, {hs.select(p, part).names[0]: [0, 3, 5]}), p),
    "verify": lambda p, part: torch.tensor(float(hs.verify(p, hs.select(p, part)).passed)),
    "product error": lambda p, _: torch.tensor(float(1e-8 < hs.hessian(p).product_error().relative < 1e-4)),
}


def resting(problem: hs.Problem) -> hs.Problem:
    """The problem with vectors on the CPU."""
    return hs.Problem(problem.model, problem.loss, problem.batches, vectors="cpu")


#: A quick look.
FEW = ("ggn, streamed", "fisher", "vectors on the CPU, ggn", "eigs", "diagonal, per-sequence")


def product_of(space: hs.Space, problem: hs.Problem) -> Tensor:
    return hs.hessian(problem, space) @ vectors(space)


#: A part of each model: linear layers, some with rows apart.
PARTS = {"gpt2": "transformer.h.1.attn.c_proj.weight", "llama": "model.layers.1.self_attn.v_proj.weight"}


def difference(run: Run, here: hs.Problem, cpu: hs.Problem, part: Part) -> float | str:
    """How far results on the two devices are apart, or what went wrong."""
    try:
        found, expected = run(here, part), run(cpu, part)
        return float((found.cpu() - expected).norm() / expected.norm().clamp(min=1e-30))
    except Exception as error:
        where = [f for f in traceback.extract_tb(error.__traceback__) if "hesscope" in f.filename]
        place = f"{Path(where[-1].filename).name}:{where[-1].lineno}" if where else ""
        return f"{type(error).__name__} in {place}: {str(error).splitlines()[0][:200]}"


def leave_out() -> None:
    """What tensors made of others cannot do: forward mode, and saying where their memory is."""
    stages._forward = refused
    hs.Space._joined = lambda self, V: None
    auto.Auto.candidates = ()
    warnings.simplefilter("ignore")


def main(name: str) -> None:
    """Compare on one model."""
    leave_out()
    models = [tiny(name, torch.float32) for _ in range(2)]
    with another_device() as device:
        models[1].to(device)
        cpu, here = (hs.causal_lm(model, ragged_batches()) for model in models)
        assert here.device == device
        assert [p.shape for p in here.model.parameters()] == [p.shape for p in cpu.model.parameters()]
        print(json.dumps({what: difference(RUNS[what], here, cpu, PARTS[name]) for what in FEW}))


if __name__ == "__main__":
    main(sys.argv[1])
