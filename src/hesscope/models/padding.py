"""The padding row of an embedding, differentiated like any other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


@contextmanager
def whole_embeddings(model: nn.Module) -> Iterator[None]:
    """Inside, embeddings with a `padding_idx` have a gradient in that row too.

    The loss depends on the row wherever its token is seen, but torch's reverse derivative leaves it out, for training is not to
    change it, and the forward derivative does not: Hessians that mix the two are not symmetric. Where padding is masked and is no
    target both are zero.
    """
    if not any(isinstance(m, nn.Embedding) and m.padding_idx is not None for m in model.modules()):
        yield
        return
    with _EveryRow():
        yield


class _EveryRow(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.embedding:
            kwargs.pop("padding_idx", None)
            args = (*args[:2], None, *args[3:])
        return func(*args, **kwargs)
