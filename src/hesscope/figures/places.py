"""Where in a model a matrix's coordinates sit: runs of the same trunk block, and of the same layer inside it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from hesscope.figures import segments, subject
from hesscope.figures.segments import Segment
from hesscope.results.base import Result


@dataclass(frozen=True)
class Places:
    """Borders of a matrix, the strongest first: trunk blocks (and what stands beside the trunk), layers, parameters.

    `layers` holds the layers inside blocks only; it is what an inner row of names would say. Both are empty where the
    selection's record knows of no trunk.
    """

    blocks: list[Segment]
    layers: list[Segment]
    parameters: list[Segment]

    @property
    def several_blocks(self) -> bool:
        """Whether there is more than one name to write at the trunk's level."""
        return len(self.blocks) > 1

    def layers_of(self, block: Segment) -> list[str]:
        """The names of a block's layers, in order."""
        return [s.name for s in self.layers if block.start <= s.start < block.stop]


def places_of(result: Result, labels: list[str]) -> Places:
    """Read the places of a result's coordinates from its record."""
    entries = subject.selection_of(result).get("parameters", {})
    found = [(run, _place(run.name, entries.get(run.name, {}))) for run in segments.parameters(labels)]
    parameters = [run for run, _ in found]
    if all(block is None for _, (block, _) in found):
        return Places([], [], parameters)
    short = _short([layer for _, (block, layer) in found if block is not None])
    blocks = [_joined(name, list(runs)) for name, runs in groupby(found, lambda one: _block_name(*one))]
    layers = [
        _joined(short[layer], list(runs))
        for (block, layer), runs in groupby(found, lambda one: one[1])
        if block is not None
    ]
    return Places(blocks, layers, parameters)


def _place(name: str, entry: dict[str, object]) -> tuple[int | None, str]:
    block, layer = entry.get("block"), entry.get("layer")
    return (block if isinstance(block, int) else None), (str(layer) if layer else name)


def _block_name(run: Segment, place: tuple[int | None, str]) -> str:
    """ "block 3", or the module's own last name beside the trunk."""
    block, _ = place
    module = run.name.rpartition(".")[0] or run.name
    return f"block {block}" if block is not None else module.rpartition(".")[2]


def _joined(name: str, runs: list[tuple[Segment, tuple[int | None, str]]]) -> Segment:
    return Segment(name, runs[0][0].start, runs[-1][0].stop)


def _short(layers: list[str]) -> dict[str, str]:
    """The last part of each layer's dotted name, where that still tells all layers apart."""
    last = {layer: layer.rpartition(".")[2] for layer in layers}
    return last if len(set(last.values())) == len(last) else {layer: layer for layer in layers}
