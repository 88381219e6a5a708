"""Which fake tensors are known to be zero throughout: some engines keep these without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hesscope.dryrun.meter import tensors

_aten = torch.ops.aten
_MADE = {_aten.zeros, _aten.zeros_like, _aten.new_zeros, _aten.zero_, _aten._efficientzerotensor}
#: Zero where any operand is.
_PRODUCTS = {
    _aten.mul,
    _aten.mm,
    _aten.bmm,
    _aten.matmul,
    _aten.dot,
    _aten.mv,
    _aten.mul_,
    _aten.linalg_vecdot,
    _aten.vdot,
}
#: Zero where every operand is.
_SUMS = {_aten.add, _aten.sub, _aten.cat, _aten.stack, _aten.add_, _aten.sub_}
#: Zero where the first operand is and the values that are put into it, which come last.
_PUTS = {_aten.index_add, _aten.index_add_, _aten.index_put, _aten.index_put_, _aten.index_copy, _aten.scatter_add}
#: Linear in the first operand.
_LINEAR = {
    *(
        _aten.sum,
        _aten.neg,
        _aten.clone,
        _aten._to_copy,
        _aten.div,
        _aten.div_,
        _aten.any,
        _aten.abs,
        _aten.masked_fill,
        _aten.mean,
    ),
    *(_aten.slice_backward, _aten.select_backward, _aten.embedding_dense_backward, _aten.constant_pad_nd, _aten.copy),
    *(_aten.gather, _aten.index, _aten.index_select, _aten.tril, _aten.triu, _aten.expand_copy, _aten.reshape),
    *(_aten._unsafe_view, _aten.contiguous, _aten.cumsum, _aten.flip, _aten.roll),
}


class Zeros:
    """What is known to be zero, carried from operation to operation; not to know costs memory in the plan, no more."""

    def __init__(self) -> None:
        self._zero: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def knows(self, x: Tensor) -> bool:
        """Whether a tensor is known to be zero."""
        return x in self._zero

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note whether an operation's results are zero."""
        if not self._zero and func._overloadpacket not in _MADE:
            return
        zero = self._is_zero(func, args, kwargs)
        for x in tensors(result):
            if zero:
                self._zero[x] = True
            elif x in self._zero:
                del self._zero[x]

    def _is_zero(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        packet, inputs = func._overloadpacket, tensors(*args, *kwargs.values())
        if packet in _MADE:
            return True
        if not any(x in self._zero for x in inputs):
            return False
        if packet in _PRODUCTS:
            return True
        if packet in _SUMS:
            return all(x in self._zero for x in inputs)
        if packet in (_aten.addcmul, _aten.addcmul_):
            return inputs[0] in self._zero and any(x in self._zero for x in inputs[1:])
        if packet in _PUTS:
            return inputs[0] in self._zero and inputs[-1] in self._zero
        linear = func.is_view or packet in _LINEAR or packet.__name__.endswith(("_backward", "_backward_data"))
        first = bool(inputs) and inputs[0] in self._zero
        if packet is _aten.masked_fill:
            return first and args[2] == 0
        return linear and first
