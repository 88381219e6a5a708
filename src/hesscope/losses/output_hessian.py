"""The product with the Hessian of the summed cross-entropy in its logits, for many rows: eager, compiled, or one kernel.

    H_t u_t = p_t * (u_t - <p_t, u_t>),    p_t = softmax(z_t);    zero where the target does not count

H is one block a row, positive semidefinite, and the constant vector is in its null space. The tensors are the largest that a
language model has, so the work goes in chunks of rows, with one chunk's probabilities at a time. Sums are float64 where an
input is, float32 otherwise. Legend: T rows (tokens), V classes (vocabulary), K vectors.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from hesscope.errors import HesscopeError, HesscopeWarning
from hesscope.losses.cross_entropy import IGNORED

KERNELS = ("auto", "eager", "compile", "triton")

#: Entries of [K, rows, V] that a chunk may have: 64 MiB in float32.
_CHUNK_ENTRIES = 2**24
#: Rows on which a compiled or hand-written kernel is held to the eager one, the first time that it runs on a kind of input.
_CHECKED_ROWS = 8

_Rows = Callable[[Tensor, Tensor, Tensor], Tensor]
_trusted: dict[tuple[object, ...], str | None] = {}


class Kernel:
    """A kernel that was asked for by name, and a note of what has run; a warning of what stands in for it comes once.

    Raises HesscopeError for an unknown name.
    """

    def __init__(self, asked: str = "auto") -> None:
        if asked not in KERNELS:
            raise HesscopeError(f"Expected kernel to be {', '.join(KERNELS[:-1])} or {KERNELS[-1]}, got {asked!r}.")
        self.asked = asked
        self._ran: dict[str, None] = {}

    @property
    def note(self) -> str:
        """What has run and why, each once; what was asked for where nothing has."""
        return "; ".join(self._ran) or f"{self.asked}, not run yet"

    def run(self, name: str, reason: str, stands_in_for: str | None = None) -> None:
        """To be told of every run."""
        said = f"{name}: {reason}" if stands_in_for is None else f"{name}, for {stands_in_for}: {reason}"
        if said not in self._ran:
            self._ran[said] = None
            if stands_in_for is not None:
                text = f"The {name} kernel stands in for {stands_in_for}: {reason}."
                warnings.warn(text, HesscopeWarning, stacklevel=4)


def cross_entropy_hessian_product(
    logits: Tensor, targets: Tensor, u: Tensor, kernel: str | Kernel = "auto", chunk: int | None = None
) -> Tensor:
    """H u for the sum over rows of -log softmax(logits)[target]. Not differentiable itself.

    Args:
        logits: [T, V] in any floating dtype.
        targets: [T] classes; rows of -100 give zeros. Which class it is does not matter to H.
        u: [T, V], or [K, T, V] for K vectors.
        kernel: "eager", "compile" (`torch.compile`), "triton", or "auto": triton for logits on a GPU where it is installed,
            eager otherwise. A kernel that does not run here, or differs from the eager one on the first rows, gives way to
            it with a HesscopeWarning that says why. A `Kernel` for calls that belong together.
        chunk: rows at a time; by default so many that a chunk of u has 2^24 entries. The triton kernel needs no chunks.

    Returns:
        A tensor of u's shape and dtype.

    Raises:
        HesscopeError: an unknown kernel, a chunk below 1, or shapes that do not match.

    Example:
        >>> import torch
        >>> z, y = torch.zeros(2, 2), torch.tensor([1, -100])
        >>> cross_entropy_hessian_product(z, y, torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
        tensor([[ 0.5000, -0.5000],
                [ 0.0000,  0.0000]])
    """
    _require_shapes(logits, targets, u, chunk)
    kernel = kernel if isinstance(kernel, Kernel) else Kernel(kernel)
    u_KTV = u if u.dim() == 3 else u[None]
    with torch.no_grad():
        # On shapes alone there is nothing to run, and nothing to say of it.
        run = _function(kernel, logits, u) if logits.numel() and u.numel() and not logits.is_meta else _eager
        found = run(logits, targets, u_KTV) if run is _triton else _in_chunks(run, logits, targets, u_KTV, chunk)
    return found.reshape(u.shape)


def choose_kernel(kernel: str, device: torch.device) -> tuple[str, str]:
    """The kernel that will run for logits on a device, and why."""
    if kernel in ("eager", "compile"):
        return kernel, "as asked"
    missing = _no_triton(device)
    if missing is None:
        return "triton", "as asked" if kernel == "triton" else "the logits are on a GPU"
    return "eager", missing


def _no_triton(device: torch.device) -> str | None:
    """Why the triton kernel cannot run; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"triton needs logits on a GPU, not on {device.type}, or its interpreter (TRITON_INTERPRET=1)"
    return None


# ---- the kernels


def _eager(z_TV: Tensor, y_T: Tensor, u_KTV: Tensor) -> Tensor:
    wide = _accumulation(z_TV, u_KTV)
    p_TV, u_KTV = torch.softmax(z_TV.to(wide), -1), u_KTV.to(wide)
    mean_KT1 = (p_TV * u_KTV).sum(-1, keepdim=True)
    return (p_TV * (u_KTV - mean_KT1)).masked_fill((y_T == IGNORED)[:, None], 0.0)


@cache
def _compiled() -> _Rows:
    compiled: _Rows = torch.compile(_eager, dynamic=True)
    return compiled


def _compile(z_TV: Tensor, y_T: Tensor, u_KTV: Tensor) -> Tensor:
    with warnings.catch_warnings():
        # Torch's compiler uses what torch has deprecated.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        return _compiled()(z_TV, y_T, u_KTV)


def _triton(z_TV: Tensor, y_T: Tensor, u_KTV: Tensor) -> Tensor:
    from hesscope.losses.triton_kernels import output_hessian_product

    return output_hessian_product(z_TV, y_T != IGNORED, u_KTV, _accumulation(z_TV, u_KTV))


def _accumulation(z: Tensor, u: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (z.dtype, u.dtype) else torch.float32


def _in_chunks(run: _Rows, z_TV: Tensor, y_T: Tensor, u_KTV: Tensor, chunk: int | None) -> Tensor:
    K, T, V = u_KTV.shape
    rows = chunk or max(1, _CHUNK_ENTRIES // max(K * V, 1))
    result = torch.empty_like(u_KTV, memory_format=torch.contiguous_format)
    for start in range(0, T, rows):
        part = slice(start, start + rows)
        result[:, part] = run(z_TV[part], y_T[part], u_KTV[:, part])
    return result


# ---- trust


def _function(kernel: Kernel, logits: Tensor, u: Tensor) -> _Rows:
    """The kernel that was asked for if it runs and agrees with the eager one, which stands in for it otherwise."""
    name, reason = choose_kernel(kernel.asked, logits.device)
    if name == "eager":
        kernel.run(name, reason, None if kernel.asked in ("auto", name) else kernel.asked)
        return _eager
    run = _compile if name == "compile" else _triton
    kind = (name, logits.device.type, logits.dtype, u.dtype)
    if kind not in _trusted:
        _trusted[kind] = _objection(run, logits, u)
    objection = _trusted[kind]
    if objection is not None:
        kernel.run("eager", objection, name)
        return _eager
    kernel.run(name, reason)
    return run


def _objection(run: _Rows, logits: Tensor, u: Tensor) -> str | None:
    """What speaks against a kernel: it fails, or differs from the eager one on the first rows; None where nothing does."""
    z, u_KTV = logits[:_CHECKED_ROWS], (u if u.dim() == 3 else u[None])[:1, :_CHECKED_ROWS]
    y = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    try:
        found = run(z, y, u_KTV).to(u.dtype)
    except Exception as error:  # compilers fail in ways of their own
        reason = (str(error).strip() or "no reason given").splitlines()[0][:160]
        return f"it does not run here ({type(error).__name__}: {reason})"
    expected = _eager(z, y, u_KTV).to(u.dtype)
    # Relative to p |u|: entries of the difference u - <p, u> may cancel.
    size = (torch.softmax(z.to(expected.dtype), -1) * u_KTV.abs().amax(-1, keepdim=True)).abs() + expected.abs()
    # What is below the row's rounding does not count: exponentials far down underflow in different places.
    size = torch.maximum(size, torch.finfo(_accumulation(z, u)).eps * size.amax(-1, keepdim=True))
    limit = max(100 * torch.finfo(u.dtype).eps, 1e-4 if _accumulation(z, u) == torch.float32 else 0.0)
    gap = float(((found - expected).abs() / size.clamp(min=torch.finfo(u.dtype).tiny)).max())
    return (
        None
        if not math.isfinite(float(size.max())) or gap <= limit
        else f"it differs from the eager kernel by {gap:.1e}"
    )


def _require_shapes(logits: Tensor, targets: Tensor, u: Tensor, chunk: int | None) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise HesscopeError(f"Expected logits [T, V] in a floating dtype, got {list(logits.shape)} in {logits.dtype}.")
    if targets.shape != logits.shape[:1]:
        raise HesscopeError(f"Expected one target for each of {len(logits)} rows of logits, got {list(targets.shape)}.")
    if u.dim() not in (2, 3) or u.shape[-2:] != logits.shape or not u.is_floating_point():
        raise HesscopeError(
            f"Expected u to be {list(logits.shape)} as the logits, or [K, ...] of them, in a floating dtype, got "
            f"{list(u.shape)} in {u.dtype}."
        )
    if chunk is not None and chunk < 1:
        raise HesscopeError(f"Expected chunk to be at least 1 row, got {chunk}.")
