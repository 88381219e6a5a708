"""What an exact block and its structure will take, before anything is run."""

from __future__ import annotations

from dataclasses import dataclass

from hesscope.algorithms.block import COPIES
from hesscope.algorithms.driver import LONG_RUN
from hesscope.engines import Engine

_PROBE = 3  # products, before a long run
_FLOAT64 = 8  # bytes


@dataclass(frozen=True)
class BlockPlan:
    """Cost of n products and memory of n x n matrices, from the size alone; nothing here is measured.

    `products` is the most: rows of linear layers may take fewer, through positions. `passes` are forward passes over the
    data for all of them, at the engine's price on a graph that is kept, the probe before a long run included.
    `matrix_bytes` is the block itself; `peak_bytes` the most that matrices hold at once, while the block is found or
    written, or while its eigenvalues are found.
    """

    size: int
    products: int
    probe_products: int
    passes: float
    matrix_bytes: int
    peak_bytes: int


def plan_block(size: int, itemsize: int, engine: Engine) -> BlockPlan:
    """The plan for n coordinates whose vectors take `itemsize` bytes a number."""
    probe = _PROBE if size >= LONG_RUN else 0
    matrix = size * size * itemsize
    return BlockPlan(
        size=size,
        products=size,
        probe_products=probe,
        passes=engine.build_units + engine.product_units * size + (engine.build_units + engine.product_units) * probe,
        matrix_bytes=matrix,
        peak_bytes=max(COPIES * matrix, matrix + _FLOAT64 * size * size),
    )
