"""What products of a problem's curvature take with every engine: `hesscope.plan`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hesscope.algorithms.driver import versions
from hesscope.arithmetic import in_words, multiplying
from hesscope.engines import ENGINES, Engine, make_engine, make_output_engine
from hesscope.engines.dry import DryProduct, DryRuns, NotDry, elements, largest_batch
from hesscope.errors import HesscopeError
from hesscope.memory import available_together, memory_limit, parse_bytes
from hesscope.models import is_shadow, offloaded
from hesscope.operators.asked import APART, own_precision, own_space, sum_dtype
from hesscope.operators.output_hessian import OutputHessian
from hesscope.planning.extrapolation import extrapolated
from hesscope.planning.fitting import Room, largest_batch_size, largest_length, largest_vectors
from hesscope.planning.speed import Clock, Trial, measure_rates, trial
from hesscope.problem import Problem
from hesscope.results.plan import Plan
from hesscope.space import Space

#: Linearizations below this share of a product's peak change nothing by staying.
_WORTH_A_LOOK = 0.1
OPERATORS = ("hessian", "ggn")
#: Products of a computation at its defaults, for n coordinates.
WHAT: dict[str, Callable[[int], int]] = {
    "product": lambda n: 1,
    "eigs": lambda n: min(300, 2 * n),
    "lanczos": lambda n: min(60, n),
    "block": lambda n: n,
    "diagonal": lambda n: min(100, n),
    "trace": lambda n: min(100, n),
    "density": lambda n: 10 * min(60, n),
}


def plan(
    problem: Problem,
    space: Space | None = None,
    operator: str = "hessian",
    what: str = "eigs",
    products: int | None = None,
    engines: Sequence[str] | None = None,
    memory: int | str | None = None,
    measure: bool = True,
    precision: str | None = None,
) -> Plan:
    """Memory and time of a computation with every engine, predicted before anything heavy is run, and what would fit.

    The product's own code is run on tensors without data, which gives the bytes alive at any time and the work; on a CPU the
    allocations are replayed through the system's allocator for what that wastes. Seconds are those of its operations, each timed
    by itself, and of what a product on a short sequence takes beyond its own. The model is left alone.

    Args:
        problem, space: as for `hesscope.hessian`.
        operator: "hessian" or "ggn".
        what: "eigs", "lanczos", "block", "diagonal", "trace", "density" or "product": how many products there will be, at
            their defaults.
        products: that number itself.
        engines: names of some; all by default.
        memory: plan for so much in place of what is free here, the model included: bytes, or text such as "8GB".
        measure: run the operations and the short sequence. Without it, or where it does not fit, seconds come from rates of the
            machine alone.
        precision: of the products, as for `hesscope.hessian`.

    Raises:
        HesscopeError: an unknown operator, computation or engine; a model that asks for numbers as it runs, such as which
            expert a token goes to.

    Example:
        >>> import torch, hesscope as hs
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> found = hs.plan(hs.supervised(model, [(torch.ones(4, 2), torch.zeros(4, 1))], loss="mse"), what="block")
        >>> found.chosen, found.wanted_products
        ('reverse-over-reverse', 2)
    """
    began = time.perf_counter()
    space = own_space(problem, space)
    precision, engines = _own_precision(precision, problem, engines)
    makers = _makers(operator, engines)
    if what not in WHAT:
        raise HesscopeError(f"Expected what to be one of {', '.join(WHAT)}, got {what!r}.")
    wanted = WHAT[what](space.size) if products is None else _positive(products)
    devices = (torch.device("cpu"),) if problem.device.type == "meta" else problem.devices
    device = devices[0]
    model_bytes = sum(x.nbytes for x in [*problem.model.parameters(), *problem.model.buffers()])
    free = _free(memory, devices, model_bytes if problem.device.type == "meta" else 0)
    runs = DryRuns(problem, space, device, sum_dtype(precision, space.dtype))
    shape, batches = _shape(problem), len(problem.batches)
    with multiplying(precision):
        found, rows = _dry(runs, makers, problem, space)
        measure = measure and not is_shadow(problem.model)
        clock = Clock(measure_rates(device, space.dtype), device, each=measure)
        measured = _trials(problem, space, makers, found, clock, shape) if measure else {}
        for name, product in found.items():
            kept = _with_graphs(runs, makers[name], product, free, batches)
            rows[name] = _row(product, kept, free, clock, measured.get(name), shape["passes"], wanted, batches)
        chosen = _chosen({"streamed": rows["streamed"]} if offloaded(problem.model) and "streamed" in rows else rows)
        would_fit = _would_fit(runs, makers, chosen or _smallest(rows), rows, free, space)
    return Plan(
        products=0,
        units=0.0,
        seconds=time.perf_counter() - began,
        provenance=_provenance(problem, space, operator, precision),
        engines=rows,
        chosen=chosen,
        what=f"{what} of the {operator}" + (f", precision {precision}" if precision else ""),
        wanted_products=wanted,
        memory=free,
        model_bytes=model_bytes,
        vector_bytes=space.size * space.dtype.itemsize,
        shape=shape,
        would_fit=would_fit,
        basis_of_time=_basis_of_time(found, measured),
    )


def _own_precision(
    precision: str | None, problem: Problem, engines: Sequence[str] | None
) -> tuple[str | None, Sequence[str] | None]:
    """The precision and the engines that have it."""
    found = None
    for engine in engines or ["auto"]:
        found = own_precision(precision, problem, engine)
    return found, engines or (APART if found == "bfloat16" else None)


def _makers(operator: str, engines: Sequence[str] | None) -> dict[str, Callable[[], Engine]]:
    if operator not in OPERATORS:
        raise HesscopeError(f"Expected operator to be one of {', '.join(OPERATORS)} for a plan, got {operator!r}.")
    names = list(engines) if engines else list(ENGINES)
    if operator == "hessian":
        for name in names:
            make_engine(name)
        return {name: partial(make_engine, name) for name in names if name != "auto"} or {
            name: partial(make_engine, name) for name in ENGINES
        }
    known = [name for name in names if name in ("reverse-over-reverse", "streamed")]
    return {
        name: partial(make_output_engine, name, OutputHessian())
        for name in known or ("reverse-over-reverse", "streamed")
    }


def _positive(products: int) -> int:
    if isinstance(products, bool) or not isinstance(products, int) or products < 1:
        raise HesscopeError(f"Expected products to be a whole number, 1 or more, got {products!r}.")
    return products


def _free(memory: int | str | None, devices: Collection[torch.device], model_bytes: int) -> int:
    if memory is None:
        return max(0, available_together(devices) - model_bytes)
    with memory_limit(parse_bytes(memory)):
        return max(0, available_together(devices) - model_bytes)


def _dry(
    runs: DryRuns, makers: dict[str, Callable[[], Engine]], problem: Problem, space: Space
) -> tuple[dict[str, DryProduct], dict[str, dict[str, Any]]]:
    """What every engine takes; and a row with the reason for one that does not run, in the engines' order."""
    found: dict[str, DryProduct] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        rows[name] = {}
        try:
            found[name] = _one(runs, make, problem, space)
        except HesscopeError as error:
            rows[name] = {"remark": str(error)}
    if not found:
        raise HesscopeError(f"No engine could be planned for: {next(iter(rows.values()))['remark']}")
    return found, rows


def _one(runs: DryRuns, make: Callable[[], Engine], problem: Problem, space: Space) -> DryProduct:
    try:
        return runs.product(make)
    except NotDry:
        if is_shadow(problem.model):
            raise
        return extrapolated(problem, space, make)


def _shape(problem: Problem) -> dict[str, Any]:
    """Of the largest batch, and how many of it all batches make."""
    sizes = [elements(batch) for batch in problem.batches]
    largest = problem.batches[largest_batch(problem)]
    ids = largest.get("input_ids") if isinstance(largest, dict) else None
    rows, length = ids.shape if ids is not None and ids.dim() == 2 else (None, None)
    return {"batch_size": rows, "length": length, "batches": len(sizes), "passes": sum(sizes) / max(sizes)}


def _trials(
    problem: Problem,
    space: Space,
    makers: dict[str, Callable[[], Engine]],
    found: dict[str, DryProduct],
    clock: Clock,
    shape: dict[str, Any],
) -> dict[str, Trial]:
    length = (shape["length"] or 1) * (shape["batch_size"] or 1)
    made = {name: trial(problem, space, makers[name], found[name], clock, length) for name in found}
    return {name: known for name, known in made.items() if known is not None}


def _row(
    dry: DryProduct,
    kept: DryProduct,
    free: int,
    clock: Clock,
    measured: Trial | None,
    passes: float,
    wanted: int,
    batches: int,
) -> dict[str, Any]:
    pace, touch = measured or Trial(), clock.rates.first_touch
    check = pace.product.seconds(clock, dry.prepare)
    build = passes * pace.build.seconds(clock, dry.build)
    product = passes * pace.product.seconds(clock, dry.product)
    graphs = _graphs(dry, free, batches)
    first = check + build + product + touch * (dry.fresh[0] + (passes - 1) * dry.fresh[1])
    anew = build + product + touch * passes * dry.fresh[1]
    again = product + touch * passes * kept.fresh[1]
    further = again if graphs == batches else again + (anew - again) * (1 - graphs / batches)
    return {
        "peak_bytes": kept.resident,
        "least_bytes": dry.resident,
        "tensor_bytes": dry.peak,
        "kept_bytes": graphs * dry.kept,
        "fits": dry.resident <= free,
        "first_seconds": first,
        "further_seconds": further,
        "anew_seconds": anew,
        "total_seconds": first + (wanted - 1) * further,
        "measured": measured is not None,
        "remark": dry.remark,
    }


def _graphs(dry: DryProduct, free: int, batches: int) -> int:
    """How many linearizations are kept between products, so that they take at most half of the memory."""
    return min(batches, (free // 2) // max(dry.kept, 1))


def _with_graphs(runs: DryRuns, make: Callable[[], Engine], dry: DryProduct, free: int, batches: int) -> DryProduct:
    """A product with the linearizations that are kept between products."""
    graphs = _graphs(dry, free, batches)
    if dry.kept < _WORTH_A_LOOK * dry.peak or graphs == 0 or dry.resident > free:
        return dry
    try:
        one = runs.product(make, kept=True)
    except NotDry:
        one = replace(dry, resident=dry.resident + dry.kept // 2)
    return replace(one, resident=max(dry.resident, one.resident) + (graphs - 1) * dry.kept)


def _chosen(rows: dict[str, dict[str, Any]]) -> str | None:
    """Of the engines that engine="auto" begins with, the first that fits."""
    fitting = [name for name in ("reverse-over-reverse", "streamed") if rows.get(name, {}).get("fits")]
    others = [name for name, row in rows.items() if row.get("fits")]
    return next(iter(fitting + others), None)


def _smallest(rows: dict[str, dict[str, Any]]) -> str:
    return min((name for name in rows if "peak_bytes" in rows[name]), key=lambda name: int(rows[name]["least_bytes"]))


def _would_fit(
    runs: DryRuns,
    makers: dict[str, Callable[[], Engine]],
    name: str,
    rows: dict[str, dict[str, Any]],
    free: int,
    space: Space,
) -> dict[str, Any]:
    left = free - rows[name]["least_bytes"]
    basis = max(0, left // (space.size * space.dtype.itemsize))
    room = Room(runs, makers[name], free, rows[name]["least_bytes"] / max(rows[name]["tensor_bytes"], 1))
    batch = runs.problem.batches[0]
    try:
        shapes = {"length": largest_length(room, batch), "batch_size": largest_batch_size(room, batch)}
        return {**shapes, "vectors": largest_vectors(room), "basis": basis}
    except NotDry:  # other shapes are not known without running them
        return {"length": None, "batch_size": None, "vectors": None, "basis": basis}


def _basis_of_time(found: dict[str, DryProduct], measured: dict[str, Trial]) -> str:
    if not measured:
        return "rates of this machine alone; nothing of this model was run"
    timed = [name for name, known in measured.items() if known.product.timed]
    ways = {
        "operations timed one by one, and a product on a short sequence": timed,
        "rates of this machine, and a product on a short sequence": [name for name in measured if name not in timed],
        "the operations alone": [name for name in found if name not in measured],
    }
    used = {way: names for way, names in ways.items() if names}
    first = next(iter(used))
    return "; ".join([first, *(f"of {', '.join(names)} from {way}" for way, names in used.items() if way != first)])


def _provenance(problem: Problem, space: Space, operator: str, precision: str | None) -> dict[str, Any]:
    described = {
        "model": type(problem.model).__name__,
        "loss": type(problem.loss).__name__,
        "objective": problem.objective,
    }
    return {
        "problem": {**described, "batches": len(problem.batches), "terms": problem.N, **problem.source},
        "selection": space.describe(),
        "operator": {"operator": operator, "precision": in_words(precision, problem.device)},
        "options": {},
        "versions": versions(),
    }
