"""For a model that cannot be run without numbers: three short real runs under the same meter, and what follows for the full length.

Which expert a token goes to is not known without the weights. With T tokens a sequence, every quantity of a product is
a + b T + c T^2 (weights, tokens, attention); three lengths of an eighth to a quarter of T give a, b and c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from hesscope.dryrun import Meter, Work
from hesscope.engines import Engine
from hesscope.engines.dry import DryProduct, largest_batch, run_product
from hesscope.errors import HesscopeError
from hesscope.planning.fitting import batch_shape, reshaped
from hesscope.problem import Problem
from hesscope.space import Space

#: What the allocator takes for a byte of tensors, about.
_WASTE = 1.25
#: Below so many tokens a sequence the batch is run as it is.
_SHORT = 24


def extrapolated(problem: Problem, space: Space, make: Callable[[], Engine]) -> DryProduct:
    """What a product takes on the largest batch, from runs of its sequences' first tokens.

    Raises HesscopeError where the batch has no length to vary.
    """
    batch = problem.batches[largest_batch(problem)]
    rows, length = batch_shape(batch)
    if length is None:
        raise HesscopeError("Expected batches of token sequences in order to extrapolate from shorter ones.")
    if length < _SHORT:
        return _run(problem.related(batches=[batch]), space, make)
    lengths = [length // 8, 3 * length // 16, length // 4]
    short = [problem.related(batches=[reshaped(batch, rows, T)]) for T in lengths]
    runs = [_run(part, space, make, checked=False) for part in short]
    checked = _run(short[-1], space, make)

    def at(values: Sequence[float]) -> float:
        return _parabola(lengths, values, length)

    def work(parts: Sequence[Work]) -> Work:
        flops, touched, operations = (
            at([getattr(part, name) for part in parts]) for name in ("flops", "bytes", "operations")
        )
        return Work(flops, touched, operations)

    peak = max(int(at([run.peak for run in runs])), checked.peak)
    return replace(
        checked,
        peak=peak,
        resident=checked.resident + int(_WASTE * (peak - checked.peak)),
        kept=int(at([run.kept for run in runs])),
        build=work([run.build for run in runs]),
        product=work([run.product for run in runs]),
        fresh=(max(0, int(at([run.fresh[0] for run in runs]))), max(0, int(at([run.fresh[1] for run in runs])))),
        remark=f"extrapolated from real runs of {', '.join(map(str, lengths))} tokens: the model asks for numbers as it runs",
    )


def _run(problem: Problem, space: Space, make: Callable[[], Engine], checked: bool = True) -> DryProduct:
    V = {name: part.fill_(1.0) for name, part in space.zeros().items()}
    engine = make()
    with Meter() as meter:
        found = run_product(engine, problem, space, V, meter, checked=checked)
    return found.replayed(meter, problem.device)


def _parabola(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """The value at a point of the parabola through three points (Lagrange)."""
    (a, b, c), (u, v, w) = x, y
    return (
        u * (at - b) * (at - c) / ((a - b) * (a - c))
        + v * (at - a) * (at - c) / ((b - a) * (b - c))
        + w * (at - a) * (at - b) / ((c - a) * (c - b))
    )
