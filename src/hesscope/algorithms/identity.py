"""Everything that decides a run's numbers, by name, so that a run never continues another's."""

from __future__ import annotations

import hashlib
from typing import Any

from hesscope.operators import Operator

#: What an operator's description says of how a run went, or derives from the problem, and not what the operator is.
_VOLATILE = frozenset(
    {"graphs_kept", "graph_bytes", "engine_choice", "engine_error", "head", "kernel", "perplexity", "composed"}
)
#: What a problem's description says of it beyond where it came from.
_PROBLEM = {
    "model": "model",
    "weights_fingerprint": "weights",
    "data_fingerprint": "data",
    "loss": "loss",
    "objective": "objective",
    "dropout": "dropout",
    "attention": "attention",
    "fingerprint": "problem",
}
_PACKAGES = ("hesscope", "torch", "transformers")


def identity(H: Operator, algorithm: str, options: dict[str, Any], versions: dict[str, str]) -> dict[str, str]:
    """{what: which} for the algorithm, its options, the operator, problem and selection, and the packages' versions.

    An operator without a problem behind it, a matrix or function, is told by one product with a fixed sign vector.
    """
    origin = H.origin()
    found = {"algorithm": algorithm} | {key: _words(value) for key, value in options.items()}
    found |= {"operator": _words(H.describe()), "selection": _selection(H)}
    found |= {"dtype": str(H.dtype).removeprefix("torch."), "device": H.space.device.type}
    found |= {name: _words(origin[key]) for key, name in _PROBLEM.items() if key in origin} if origin else _sample(H)
    return found | {f"version of {name}": versions[name] for name in _PACKAGES if name in versions}


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """`what before -> now` for everything that differs; the fingerprint of the whole only where no part of it does."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if len(names) > 1 and "problem" in names:
        names.remove("problem")
    return [f"{name} {_short(before.get(name))} -> {_short(now.get(name))}" for name in names]


def _selection(H: Operator) -> str:
    coordinates = H.space.coordinates
    digest = hashlib.sha256(repr([(*c.key(), str(c.dtype)) for c in coordinates]).encode()).hexdigest()
    others = f" and {len(coordinates) - 1} more" if len(coordinates) > 1 else ""
    return f"{H.space.size} weights of {coordinates[0].name}{others} [{digest[:12]}]"


def _sample(H: Operator) -> dict[str, str]:
    z = H.space.rademacher(0, ["identity"])
    Az = H.matmat(z)
    # Five digits: a device that sums in any order repeats itself no better.
    return {"matrix": f"|Az| = {float(H.space.norms(Az)):.4e}, <z, Az> = {float(H.space.inner(z, Az)):.4e}"}


def _words(value: Any) -> str:
    """A value in words; a number that was computed, such as a norm, to five digits."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_words(_rounded(v))}" for k, v in value.items() if k not in _VOLATILE)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_words, value)) + "]"
    return str(value)


def _rounded(value: Any) -> Any:
    return f"{value:.4e}" if isinstance(value, float) else value


def _short(text: str | None) -> str:
    if text is None:
        return "nothing"
    fingerprint = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if fingerprint else text
