"""Everything that decides a run's numbers, by name, so that a run never continues another's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hesscope.operators import Operator
from hesscope.results.base import jsonable
from hesscope.space import Space

#: What an operator's description says of how a run went, or derives from the problem, and not what the operator is.
_VOLATILE = frozenset(
    {
        "graphs_kept",
        "graph_bytes",
        "engine_asked",
        "engine_choice",
        "engine_error",
        "head",
        "kernel",
        "perplexity",
        "composed",
    }
)
#: What a problem's description says of it beyond where it came from.
_PROBLEM = {
    "model": "model",
    "architecture": "architecture",
    "weights_fingerprint": "weights",
    "data_fingerprint": "data",
    "loss_fingerprint": "loss",
    "objective": "objective",
    "dropout": "dropout",
    "attention": "attention",
    "fingerprint": "problem",
}
#: What an operator's description says of how its products are made, which leaves its matrix the same but for rounding.
_HOW = frozenset({"engine", "engine_asked", "microbatch"})
#: Numbers in descriptions that were computed, and may come out otherwise in the last digits.
_COMPUTED = frozenset({"norm"})
_PACKAGES = ("hesscope", "torch", "transformers")


def identity(H: Operator, algorithm: str, options: dict[str, Any], versions: dict[str, str]) -> dict[str, str]:
    """{what: which} for the algorithm, its options, the operator, problem and selection, and the packages' versions.

    An operator without a problem behind it, a matrix or function, is told by one product with a fixed random vector.
    """
    origin = H.origin()
    found = {"algorithm": algorithm} | in_words(options)
    found |= {"operator": _words(H.describe()), "selection": selected(H.space)}
    found |= {"dtype": str(H.dtype).removeprefix("torch."), "device": H.space.device.type}
    found |= _problem(origin) if origin else _sample(H)
    return found | {f"version of {name}": versions[name] for name in _PACKAGES if name in versions}


def in_words(options: Mapping[str, Any]) -> dict[str, str]:
    """Options as an identity has them."""
    return {key: _words(value) for key, value in options.items()}


def recorded(made: Mapping[str, Any]) -> dict[str, str]:
    """What a result's record says of its operator, problem and selection, by name."""
    found = {"operator": _words(made.get("operator") or {}), "selection": _digested(made.get("selection"))}
    return found | _problem(made.get("problem") or {})


def other_matrix(made: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`what before -> now` for all that makes another matrix of two records; nothing of what either does not say.

    An operator is what it is of, with its labels, seeds, factors and precision; engine and micro-batches are not looked at, nor whether
    it is a restriction of one on more weights.
    """
    before, after = (_matrix(record) for record in (made, now))
    return differences(*({name: one[name] for name in before.keys() & after.keys()} for one in (before, after)))


def _matrix(made: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    if made.get("operator"):
        found["operator"] = _words(_defined(made["operator"])).removeprefix("operator ")
    if made.get("selection"):
        found["selection"] = _digested(made["selection"])
    return found | {"fingerprint": str((made.get("problem") or {}).get("fingerprint"))}


def _defined(described: Any) -> Any:
    if isinstance(described, Mapping):
        if described.get("operator") == "restriction":
            return _defined(described["of"])
        return {key: _defined(value) for key, value in described.items() if key not in _HOW}
    return [_defined(part) for part in described] if isinstance(described, (list, tuple)) else described


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """`what before -> now` for everything that differs; the fingerprint of the whole only where no part of it does."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if len(names) > 1 and "problem" in names:
        names.remove("problem")
    return [f"{name} {_short(before.get(name))} -> {_short(now.get(name))}" for name in names]


def _problem(origin: Mapping[str, Any]) -> dict[str, str]:
    return {name: _words(origin[key]) for key, name in _PROBLEM.items() if key in origin}


def _digested(selection: Any) -> str:
    """A recorded selection, short."""
    digest = hashlib.sha256(json.dumps(jsonable(selection), sort_keys=True).encode()).hexdigest()
    return f"{(selection or {}).get('size')} weights [{digest[:12]}]"


def selected(space: Space) -> str:
    """What is selected, short: which parameters' coordinates, in which order."""
    coordinates = space.coordinates
    digest = hashlib.sha256(repr([(*c.key(), str(c.dtype)) for c in coordinates]).encode()).hexdigest()
    others = f" and {len(coordinates) - 1} more" if len(coordinates) > 1 else ""
    return f"{space.size} weights of {coordinates[0].name}{others} [{digest[:12]}]"


def _sample(H: Operator) -> dict[str, str]:
    # Normal and not signs, for which <z, Az> and |Az| of any two diagonal matrices with the same entries are equal.
    z, w = (H.space.gaussian(0, [name]) for name in ("identity", "identity, against"))
    Az = H.matmat(z)
    # Five digits: a device that sums in any order repeats itself no better.
    found = {"|Az|": H.space.norms(Az), "<z, Az>": H.space.inner(z, Az), "<w, Az>": H.space.inner(w, Az)}
    return {"matrix": ", ".join(f"{name} = {float(value):.4e}" for name, value in found.items())}


def _words(value: Any) -> str:
    """A value in words; a number that was computed, such as a norm, to five digits, and one that was given to all of them.

    An engine that nobody asked for by name is "auto": memory and layout decide which it is, and may decide otherwise later.
    """
    if isinstance(value, dict):
        if "engine_asked" in value:
            value = {**value, "engine": value["engine_asked"]}
        return ", ".join(f"{k} {_words(_rounded(k, v))}" for k, v in value.items() if k not in _VOLATILE)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_words, value)) + "]"
    return str(value)


def _rounded(key: str, value: Any) -> Any:
    return f"{value:.4e}" if key in _COMPUTED and isinstance(value, float) else value


def _short(text: str | None) -> str:
    if text is None:
        return "nothing"
    fingerprint = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if fingerprint else text
