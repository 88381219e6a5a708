"""A selection divided into the groups that a model's own names suggest."""

from __future__ import annotations

from collections.abc import Callable

from hesscope.errors import HesscopeError
from hesscope.space import Coordinates, Space

BY = ("block", "layer", "kind")


def grouped(space: Space, by: str | Callable[[str], str]) -> dict[str, Space]:
    """{name: the group's part of the space}, in the order of each group's first parameter.

    "block": `block 3`. "layer": `3.mlp.up_proj`, a weight together with its bias. "kind": `mlp.up_proj` of all blocks.
    What is outside the blocks goes by its module's own name (`lm_head`; a tied embedding by its first one), and where no
    blocks are known by its parameter's. A function names the group of every parameter.

    Raises HesscopeError for another `by`.
    """
    if not callable(by) and by not in BY:
        raise HesscopeError(f"Expected by to be one of {', '.join(BY)}, or a function of a name, got {by!r}.")
    found: dict[tuple[bool, str], list[Coordinates]] = {}
    for c in space.coordinates:
        inside = c.block is not None
        found.setdefault((inside, str(by(c.name)) if callable(by) else _name(c, by)), []).append(c)
    if callable(by):
        return {name: Space(_joined(found, name)) for _, name in found}
    twice = {name for inside, name in found if not inside} & {name for inside, name in found if inside}
    return {
        name + " (outside blocks)" * (not inside and name in twice): Space(parts)
        for (inside, name), parts in found.items()
    }


def _name(c: Coordinates, by: str) -> str:
    layer = (c.layer or c.name).removesuffix(".bias")
    if c.block is None or by == "kind":
        return layer
    return f"block {c.block}" if by == "block" else f"{c.block}.{layer}"


def _joined(found: dict[tuple[bool, str], list[Coordinates]], wanted: str) -> list[Coordinates]:
    return [c for (_, name), parts in found.items() if name == wanted for c in parts]
