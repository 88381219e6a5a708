"""What goes in and out of a linear layer, forwards and backwards, within reach of derivatives.

A weight W has two uses in the graph of a gradient: y = x W^T on the way forward, and gx = gy W on the way back, where gy and gx
are the loss's derivatives in y and x. A tap holds x and gives places (dy, gx) at which derivatives in y and gx can be taken.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hesscope.engines.linear_uses import Box


class Tap:
    """One layer: its `inputs` x, `dy`, a leaf added to the selected outputs, and, after a backward pass, `gx`.

    Where others use x as well, `gx` is the sum over all of them: a derivative in a sum is that in each of its terms.
    """

    def __init__(self, box: Box) -> None:
        self.box = box
        self.inputs: Tensor | None = None
        self.dy: Tensor | None = None
        self.gx: Tensor | None = None
        self._hook: RemovableHandle | None = None

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output, with the leaf."""
        self.inputs = x
        if x.requires_grad:
            self._hook = x.register_hook(self._keep)  # type: ignore[no-untyped-call]
        self.dy = torch.zeros(*y.shape[:-1], self.box.shape[0], dtype=y.dtype, device=y.device, requires_grad=True)
        return self.box.add(y, self.dy)

    def close(self) -> None:
        """Take in nothing more: later passes are derivatives of this one."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _keep(self, gx: Tensor) -> None:
        self.gx = gx
