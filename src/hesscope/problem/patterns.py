"""Parameters by glob, regular expression, function, or name with an index."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from hesscope.errors import HesscopeError
from hesscope.models import aliases, named_parameters
from hesscope.problem.indices import Index, parse_index

Pattern = str | Callable[[str, nn.Parameter], bool] | Mapping[str, Index | None]
#: {first name: its index, or None for the whole parameter}
Chosen = dict[str, Index | None]

_INDEXED = re.compile(r"(?P<name>.+)\[(?P<index>[^\[\]]+)\]")


def choose(model: nn.Module, patterns: Sequence[Pattern], also: Iterable[str] | None, cut: bool) -> Chosen:
    """What the patterns choose, united with the first names in `also`; all that is trainable where neither is given.

    `cut` says that whole parameters are going to be cut down: then one with an index as well is ambiguous.
    """
    parameters, first_name = named_parameters(model), aliases(model)
    chosen: Chosen = dict.fromkeys(also or ())
    takes_away = [p[1:] for p in patterns if isinstance(p, str) and p.startswith("!")]
    adds = [p for p in patterns if not (isinstance(p, str) and p.startswith("!"))]
    if also is None and not adds:
        chosen = {name: None for name, p in parameters.items() if p.requires_grad}
    for pattern in adds:
        for name, index in _matches(pattern, parameters, first_name).items():
            _add(chosen, name, index, cut)
    for pattern in takes_away:
        for name in _matches(pattern, parameters, first_name):
            chosen.pop(name, None)
    if not chosen:
        raise HesscopeError("Expected a selection of at least one parameter; none is left (or none is trainable).")
    return chosen


def _matches(pattern: Pattern, parameters: dict[str, nn.Parameter], first_name: dict[str, str]) -> Chosen:
    """{first name: index or None} of what one pattern selects."""
    found: Chosen
    if isinstance(pattern, Mapping):
        unknown = [name for name in pattern if name not in first_name]
        if unknown:
            raise HesscopeError(_no_match(unknown[0], first_name))
        found = {}
        for name, index in pattern.items():
            _add(found, first_name[name], index)
    elif callable(pattern):
        found = {name: None for name, p in parameters.items() if pattern(name, p)}
    elif not isinstance(pattern, str):
        raise HesscopeError(
            f"Expected a glob, a function of (name, parameter) or {{name: index}}, got {type(pattern).__name__}."
        )
    else:
        found = _matches_text(pattern, first_name)
    if not found:
        raise HesscopeError(_no_match(str(pattern), first_name))
    return found


def _matches_text(pattern: str, first_name: dict[str, str]) -> Chosen:
    indexed = _INDEXED.fullmatch(pattern)
    if indexed and indexed["name"] in first_name:
        return {first_name[indexed["name"]]: parse_index(indexed["index"])}
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as error:
            raise HesscopeError(f"Expected a regular expression after 're:', got {pattern[3:]!r}: {error}.") from error
        return {first: None for name, first in first_name.items() if regex.fullmatch(name)}
    found: Chosen = {f: None for name, f in first_name.items() if fnmatchcase(name, pattern)}
    if not found and indexed:
        index = parse_index(indexed["index"])
        found = {first: index for name, first in first_name.items() if fnmatchcase(name, indexed["name"])}
    return found


def _add(chosen: Chosen, name: str, index: Index | None, cut: bool = False) -> None:
    """A whole parameter swallows its parts; two parts of one parameter are ambiguous in order."""
    if name in chosen and cut and (index is None) != (chosen[name] is None):
        raise HesscopeError(f"Expected rows or first, or an index of its own, for {name}, got both; leave one out.")
    if index is not None and chosen.get(name) is not None:
        raise HesscopeError(f"Expected one index for {name}, got two; join them in one list of flat indices.")
    if name not in chosen or index is None:
        chosen[name] = index


def _no_match(pattern: str, first_name: dict[str, str]) -> str:
    stem = _INDEXED.fullmatch(pattern)
    wanted = stem["name"] if stem else pattern
    near = difflib.get_close_matches(wanted.removeprefix("re:"), first_name, n=3, cutoff=0.3) or list(first_name)[:3]
    return f"No parameter matches {pattern!r}; the nearest names are {', '.join(near)}."
