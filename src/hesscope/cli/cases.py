"""The cases of one command: every model with every loss."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path, PurePath

from hesscope.cli.options import CommonOptions
from hesscope.errors import HesscopeError

#: {name on the command line: loss and objective of `hesscope.causal_lm`}
LOSSES = {
    "log-perplexity": ("next_token", "nll"),
    "perplexity": ("next_token", "perplexity"),
    "classification": ("classification", "nll"),
    "regression": ("regression", "nll"),
}


@dataclass(frozen=True)
class Case:
    """One model with one loss: its options, a name that tells it from the others, and a folder's name."""

    name: str
    loss: str
    common: CommonOptions

    @property
    def folder(self) -> str:
        """The name, as a folder."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-.") or "case"


def cases(common: CommonOptions, losses: str | None) -> list[list[Case]]:
    """The cases of each model, in order.

    Raises HesscopeError for a model or a loss given twice, an unknown loss, or --losses beside --loss or --objective.
    """
    models = _models(common.model)
    chosen = _losses(common, losses)
    names = titles(models)
    found = []
    for model in models:
        of_model = [
            Case(
                ", ".join(p for p in (names[model] if len(models) > 1 else "", loss if len(chosen) > 1 else "") if p),
                loss,
                dataclasses.replace(common, model=model, loss=pair[0], objective=pair[1]),
            )
            for loss, pair in chosen.items()
        ]
        found.append(of_model)
    _require_own_folders([case for of_model in found for case in of_model])
    return found


def _models(given: str | None) -> list[str]:
    if given is None:
        raise HesscopeError("Expected --model: a Hub id, a folder, or 'demo' for the small model that comes along.")
    return [given] if Path(given).exists() else _distinct("model", given)


def _losses(common: CommonOptions, given: str | None) -> dict[str, tuple[str, str]]:
    own = (common.loss, common.objective)
    if given is None:
        return {next((name for name, pair in LOSSES.items() if pair == own), " of ".join(own[::-1])): own}
    if own != ("next_token", "nll"):
        raise HesscopeError(
            "Expected either --losses or --loss and --objective; --losses names both, so leave them out."
        )
    names = _distinct("losses", given)
    unknown = [name for name in names if name not in LOSSES]
    if unknown:
        raise HesscopeError(f"Expected --losses to be some of {', '.join(LOSSES)}, got {unknown[0]!r}.")
    return {name: LOSSES[name] for name in names}


def _distinct(option: str, given: str) -> list[str]:
    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise HesscopeError(f"Expected --{option} to name different things separated by commas, got {given!r}.")
    return names


def titles(models: list[str]) -> dict[str, str]:
    """Names without folders, where these still tell the models apart."""
    short = {model: PurePath(model).name for model in models}
    return short if len(set(short.values())) == len(models) else {model: model for model in models}


def _require_own_folders(found: list[Case]) -> None:
    folders = [case.folder for case in found]
    if len(set(folders)) < len(folders):
        raise HesscopeError("Expected models whose names give different folders; run those that do not one at a time.")
