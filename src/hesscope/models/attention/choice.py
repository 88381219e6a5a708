"""Which attention a problem runs: what was asked for, or what the length calls for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hesscope.errors import HesscopeError
from hesscope.models.attention.registered import NAME, counting
from hesscope.models.attention.visibility import NotTiled
from hesscope.models.configs import attention_note, root_config

ATTENTIONS = ("auto", "sdpa", "eager", "tiled")
#: From so many positions on "auto" takes tiles: the scores then outweigh everything else that a layer keeps.
LONG = 1024


_NEVER = "{} never calls the attention function that it is configured with"


@dataclass(frozen=True)
class Choice:
    """The implementation that a model is switched to (None: only away from fused kernels), and that in words."""

    asked: str
    target: str | None
    note: str


#: Runs the model a little with an implementation and returns a number that depends on all of it.
Trial = Callable[[str | None], float]


def choose(model: nn.Module, asked: str, length: int, frozen_dropout: bool, trial: Trial) -> Choice:
    """The attention for sequences of at most `length` positions.

    Raises:
        HesscopeError: an unknown name, or an implementation that was asked for and that the model does not run.
    """
    if asked not in ATTENTIONS:
        *first, last = map(repr, ATTENTIONS)
        raise HesscopeError(f"Expected attention to be {', '.join(first)} or {last}, got {asked!r}.")
    if asked == "auto":
        return _automatic(model, length, frozen_dropout, trial)
    if root_config(model) is None:
        raise HesscopeError(
            f"Expected a model of transformers with attention={asked!r}, got {type(model).__name__}, whose attention is its own; "
            "leave attention='auto'."
        )
    if asked == "tiled":
        reason = "dropout='frozen' has masks of every pair of positions" if frozen_dropout else _refusal(model, trial)
        if reason is not None:
            raise HesscopeError(f"Expected a model that runs tiled attention, but {reason}; use attention='auto'.")
        return Choice(asked, NAME, "tiled (memory linear in the length), as asked")
    if asked == "sdpa" and not getattr(model, "_supports_sdpa", False):
        raise HesscopeError(
            f"Expected a model that has SDPA, but {type(model).__name__} does not; use attention='eager' or 'auto'."
        )
    return Choice(asked, asked, f"{'sdpa (mathematical form)' if asked == 'sdpa' else asked}, as asked")


def _automatic(model: nn.Module, length: int, frozen_dropout: bool, trial: Trial) -> Choice:
    usual = attention_note(model)
    if length < LONG or root_config(model) is None:
        return Choice("auto", None, usual)
    reason = "dropout='frozen' has masks of every pair of positions" if frozen_dropout else _refusal(model, trial)
    if reason is not None:
        return Choice("auto", None, f"{usual}; not tiled, for {reason}")
    return Choice("auto", NAME, f"tiled (memory linear in the length), for sequences of {length} positions")


def _refusal(model: nn.Module, trial: Trial) -> str | None:
    """Why a model does not run tiled attention, or None where it does and means the same by it."""
    if any(p.is_meta for p in model.parameters()):
        # There is nothing to try it with, but the class says whether it goes by what is registered.
        declared = getattr(model, "_supports_attention_backend", False)
        return None if declared else f"{type(model).__name__} does not say that it takes registered attention functions"
    try:
        with counting() as calls:
            found = trial(NAME)
    except torch.OutOfMemoryError:
        raise
    except NotTiled as error:
        return str(error)
    except Exception as error:  # a model may do anything with a mask that is no tensor
        return _in_words(model, error, bool(calls), trial)
    if not calls:
        return _NEVER.format(type(model).__name__)
    expected = trial(None)
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    # Models that are float64 may cast to float32 inside.
    if not abs(found - expected) <= min(max(100 * eps, 1e-5), 0.05) * max(abs(expected), 1e-30):
        return f"its loss on a few tokens is {found:.7g} with tiles and {expected:.7g} without"
    return None


def _in_words(model: nn.Module, error: Exception, called: bool, trial: Trial) -> str:
    try:
        trial(None)
    except Exception:
        return f"its loss does not run on a few tokens alone ({type(error).__name__})"
    if not called:
        return _NEVER.format(type(model).__name__)
    return f"{type(model).__name__} stops with {type(error).__name__}: {str(error).strip()[:160]}"
