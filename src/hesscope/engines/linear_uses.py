"""How a forward pass uses the selected weights, and a perturbation put beside a linear layer instead of into its weight.

y = x W^T  becomes  y = x W^T + x (dW)^T + dy  with dW = 0, dy = 0: derivatives in dW are those in W, but only of the rows and
columns that are selected, and one for each group of sequences where they are wanted apart. Derivatives in dy are those in the
layer's output at every position. Legend: G groups of sequences, T positions of a group, r output units, c inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hesscope.space import Coordinates


@dataclass(frozen=True)
class Use:
    """One call of a linear function with a weight: when, the axis of its output units, and how large its input was."""

    order: int
    unit_axis: int
    elements: int


class WatchUses(TorchFunctionMode):
    """Notes every call that takes one of the given weights; `uses[name]` is None once a call was not linear in it.

    Where gradients are off, as inside an autograd function with a backward pass of its own, no call is linear: what would be
    put beside its output would have no derivative. So gradients are to be on outside.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self.uses: dict[str, list[Use] | None] = {name: [] for name in weights}
        self._calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        linear = as_linear(func, args, kwargs) if torch.is_grad_enabled() else None
        weight = None if linear is None else linear[1]
        for leaf in tree_leaves((args, kwargs)):
            name = self._names.get(id(leaf))
            if name is not None and any(isinstance(x, Tensor) for x in tree_leaves(result)):
                self._note(name, linear if leaf is weight else None)
        return result

    def _note(self, name: str, linear: tuple[Tensor, Tensor, int] | None) -> None:
        uses = self.uses[name]
        self._calls += 1
        if linear is None or uses is None:
            self.uses[name] = None
        else:
            uses.append(Use(self._calls, linear[2], linear[0].numel()))


def as_linear(func: Any, args: tuple[Any, ...], kwargs: Any = None) -> tuple[Tensor, Tensor, int] | None:
    """Input, weight and axis of output units where a call is a linear layer: `F.linear`, or the `addmm` of a Conv1D.

    None for a call that is anything but y = x W^T + something without W: where a keyword scales x W^T or is unknown, and
    where W is the input or the bias as well.
    """
    if func is F.linear:
        names, unit_axis = ("input", "weight", "bias"), 0
    elif func is torch.addmm:
        names, unit_axis = ("input", "mat1", "mat2"), 1
    else:
        return None
    given = dict(zip(names, args, strict=False)) | (kwargs or {})
    if unit_axis == 1:
        given.pop("beta", None)  # scales what comes without W
        if given.pop("alpha", 1) != 1:
            return None
    x, weight = given.get(names[unit_axis]), given.get(names[unit_axis + 1])
    known = len(args) <= len(names) and given.keys() <= set(names)
    if not known or not isinstance(x, Tensor) or not isinstance(weight, Tensor):
        return None
    return (x, weight, unit_axis) if sum(y is weight for y in given.values()) == 1 else None


class Box:
    """The smallest sub-matrix [r units, c inputs] of a linear layer's weight that holds the selected entries.

    It is on the device on which the layer computes, where vectors over the selection may not be.
    """

    def __init__(self, c: Coordinates, unit_axis: int, device: torch.device) -> None:
        row, column = torch.unravel_index(c.flat_indices(), c.parameter_shape)
        unit, inputs = (row, column) if unit_axis == 0 else (column, row)
        self.device = device
        self.out_features = c.parameter_shape[unit_axis]
        self.in_features = c.parameter_shape[1 - unit_axis]
        self.units, unit_at = (x.to(device) for x in torch.unique(unit, return_inverse=True))
        self.inputs, input_at = (x.to(device) for x in torch.unique(inputs, return_inverse=True))
        #: Of every selected coordinate, in the selection's order: its unit and input inside the box, and its flat place.
        self.unit_at, self.input_at = unit_at, input_at
        self.place = unit_at * len(self.inputs) + input_at

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.units), len(self.inputs)

    def inputs_of(self, x: Tensor) -> Tensor:
        """The selected inputs, without a copy where all are."""
        return x if len(self.inputs) == self.in_features else x.index_select(-1, self.inputs)

    def add(self, y: Tensor, extra: Tensor) -> Tensor:
        """y with `extra` [..., r] added to the selected units."""
        return y + extra if len(self.units) == self.out_features else y.index_add(-1, self.units, extra)


class Perturbation:
    """Leaves dW [G, r, c] and, on request, dy [G, T, r] of one weight, and the input that its layer received."""

    def __init__(self, box: Box, groups: int, weight: Tensor, outputs: bool) -> None:
        self.box, self._groups, self._outputs = box, groups, outputs
        self.dW = torch.zeros(groups, *box.shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
        self.dy: Tensor | None = None
        self.inputs: Tensor | None = None

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output, perturbed."""
        x_GTc = self.box.inputs_of(x).reshape(self._groups, -1, self.box.shape[1])
        extra_GTr = x_GTc @ self.dW.mT
        if self._outputs:
            self.inputs = x_GTc.detach()
            self.dy = torch.zeros_like(extra_GTr, requires_grad=True)
            extra_GTr = extra_GTr + self.dy
        return self.box.add(y, extra_GTr.reshape(*y.shape[:-1], self.box.shape[0]))


class AddsToOutput(Protocol):
    """What is put beside a linear layer y = x W^T."""

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The output that takes the place of y."""


class PerturbLinears(TorchFunctionMode):
    """Adds each weight's perturbation wherever a linear layer uses that weight."""

    def __init__(self, perturbations: Mapping[str, AddsToOutput], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self._by_weight = {id(weights[name]): p for name, p in perturbations.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        linear = as_linear(func, args, kwargs)
        found = None if linear is None else self._by_weight.get(id(linear[1]))
        return result if linear is None or found is None else found.add_to(result, linear[0])
