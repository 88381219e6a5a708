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

    `passes_kept` and `passes_anew` are forward passes over the data: with every batch's graph kept between products, and
    with none. `matrix_bytes` is the block itself; `peak_bytes` the most that matrices hold at once, while the block is
    symmetrised or its eigenvalues are found.
    """

    size: int
    products: int
    probe_products: int
    passes_kept: float
    passes_anew: float
    matrix_bytes: int
    peak_bytes: int


def plan_block(size: int, itemsize: int, engine: Engine) -> BlockPlan:
    """The plan for n coordinates whose vectors take `itemsize` bytes a number."""
    probe = _PROBE if size >= LONG_RUN else 0
    products = size + probe
    matrix = size * size * itemsize
    return BlockPlan(
        size=size,
        products=size,
        probe_products=probe,
        passes_kept=engine.build_units + engine.product_units * products,
        passes_anew=(engine.build_units + engine.product_units) * products,
        matrix_bytes=matrix,
        peak_bytes=max(COPIES * matrix, matrix + _FLOAT64 * size * size),
    )
