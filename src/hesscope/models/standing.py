"""Tensors that stand in for parameters while a module runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Standing:
    """A stack of stand-ins: what came last goes first."""

    def __init__(self) -> None:
        self._stack: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self._stack)

    def put(self, owner: nn.Module, name: str, value: Tensor) -> None:
        """Let a value stand in for one of the owner's own parameters."""
        holder: dict[str, Any] = owner._parameters
        self._stack.append((holder, name, holder[name], value))
        holder[name] = value

    def leave(self, depth: int = 0) -> None:
        """Take back what stands in, down to a depth of calls; what has been replaced since is left alone."""
        while len(self._stack) > depth:
            holder, name, before, value = self._stack.pop()
            if holder[name] is value:
                holder[name] = before
