"""Selecting parameters, and coordinates inside them: by name, by layer and block, by index."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from hesscope.errors import HesscopeError
from hesscope.exchange import own_rows
from hesscope.models import find_trunk, named_parameters, offloaded, places, sharded
from hesscope.problem.indices import coordinates, cut
from hesscope.problem.layers import Names, find_layers
from hesscope.problem.numbers import Numbers
from hesscope.problem.patterns import Pattern, choose
from hesscope.problem.problem import Problem
from hesscope.resting import folder_of
from hesscope.space import Coordinates, Rows, Space
from hesscope.space.random import stream_key, subset


def select(
    problem: Problem | nn.Module,
    *patterns: Pattern,
    layers: Names | None = None,
    blocks: Numbers | None = None,
    rows: Numbers | None = None,
    first: int | None = None,
    random: int | None = None,
    seed: int = 0,
) -> Space:
    """The space over all that the patterns match or the layers and blocks name; every trainable parameter by default.

    Args:
        problem: the problem (or the model) whose parameters are meant.
        patterns: a glob over parameter names (`*` also crosses dots); `"!glob"` takes away; `"re:<regex>"` must match a
            whole name; `"name[3]"`, `"name[0:4, :8]"` is a part, as `W[...]`, of the
            parameter, or of every parameter that the glob before the bracket matches; a function
            `(name, parameter) -> bool`; `{name: index}`, where a list, range, array or tensor of integers is flat row-major
            indices, one of booleans a mask, an int, slice or tuple is `W[index]`, and None the whole parameter.
        layers: names inside a block without `.weight`, as a list or separated by commas: `"self_attn.q_proj"`, its end
            after a dot (`"q_proj"`), a glob (`"mlp.*"`), or `"all"` weights with at least two axes, the default where
            blocks are given. What no block has is looked for outside the blocks (`"lm_head"`), and what no matrix is
            called among vectors (`"input_layernorm"`, `"q_proj.bias"`).
        blocks: which blocks of the model's trunk: an int, list, slice, range, or text such as `"0,3,11"`, `"0-5"` (both
            ends), `":3"`, `"-1"` (the last) or `"all"`, the default.
        rows: output units, in the same forms, of everything selected that has no index of its own. For a `Conv1D` a row
            is a column of the stored matrix; the rows of a stack of experts are counted through all experts.
        first: only the first so many entries of each layer (or of its `rows`), row after row.
        random: only so many entries of the whole selection, drawn without replacement, in the selection's order. The
            draw depends on `seed` and the names and shapes of what is selected.
        seed: seed of that draw.

    Returns:
        A space whose order is that of `model.named_parameters()`, tied parameters once, row-major inside a parameter;
        lists of indices and `rows` keep their order, and `rows` and `first` go row after row.

    Raises:
        HesscopeError: a pattern, layer or block that matches nothing (with the nearest names), a part given twice, an
            index out of range or repeated, more entries than there are.

    Example:
        >>> import hesscope as hs
        >>> from hesscope.assets import model_path
        >>> model = hs.causal_lm(model_path(), ["some text"]).model
        >>> hs.select(model, layers="q_proj,k_proj", blocks=":2", first=3).size
        12
        >>> hs.select(model, layers="mlp.down_proj", blocks=-1, first=1).labels
        ['model.layers.3.mlp.down_proj.weight[0, 0]']
    """
    _require_count("first", first)
    _require_count("random", random)
    model = problem.model if isinstance(problem, Problem) else problem
    trunk = find_trunk(model)
    where, is_cut = places(model, trunk), rows is not None or first is not None
    by_place = None if layers is None and blocks is None else find_layers(model, trunk, where, layers, blocks)
    chosen = choose(model, patterns, by_place, is_cut)
    found = []
    for name, parameter in named_parameters(model).items():
        if name in chosen:
            index, place = chosen[name], where[name]
            if index is None and is_cut:
                index = cut(name, tuple(parameter.shape), place.unit_axis, rows, first)
            found.append(_at_rest(problem, _beside(model, coordinates(name, parameter, index, place))))
    return Space(found if random is None else _subset(found, random, seed))


def _beside(model: nn.Module, c: Coordinates) -> Coordinates:
    """Vectors of an offloaded weight rest on the CPU, beside it; those of a whole weight that is divided are divided with it."""
    if (spread := sharded(model)) is not None and c.name in spread and c.index is None and c.parameter_shape:
        exchange = spread.exchange
        own = own_rows(c.parameter_shape[0], exchange.rank, exchange.size)
        return dataclasses.replace(c, rows=Rows(exchange, own.start, own.stop))
    store = offloaded(model)
    return c if store is None or c.name not in store else dataclasses.replace(c, device=torch.device("cpu"))


def _at_rest(problem: Problem | nn.Module, c: Coordinates) -> Coordinates:
    """Where the problem has its vectors rest."""
    if not isinstance(problem, Problem) or problem.vectors == "device":
        return c
    return dataclasses.replace(c, device=torch.device("cpu"), folder=folder_of(problem.vectors))


def _subset(whole: list[Coordinates], count: int, seed: int) -> list[Coordinates]:
    """`count` coordinates drawn without replacement from a whole selection, in its order."""
    sizes = torch.tensor([c.whole.size for c in whole])
    if count > (size := int(sizes.sum())):
        raise HesscopeError(f"Expected random to be at most the {size} selected entries, got {count}.")
    key = stream_key(seed, "subset", *(f"{c.name} {c.whole.shape}" for c in whole))
    drawn, starts = subset(key, count, size), sizes.cumsum(0) - sizes
    parts = torch.tensor_split(drawn, torch.searchsorted(drawn, starts[1:]).tolist())
    return [_only(c, part - start) for c, part, start in zip(whole, parts, starts, strict=True) if len(part)]


def _only(c: Coordinates, positions: Tensor) -> Coordinates:
    """The coordinates at some positions in the order of others."""
    index = positions if c.index is None else c.index[positions]
    return dataclasses.replace(c, index=index, index_shape=None, rows=None)


def _require_count(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise HesscopeError(f"Expected {name} to be a number of entries, at least 1, got {value!r}.")
