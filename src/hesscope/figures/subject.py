"""What a result is about, in words, read from its provenance: operator, units, model, data."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from hesscope.results.base import Result

_NAMES = {
    "hessian": "Hessian",
    "ggn": "Gauss-Newton matrix",
    "fisher": "Fisher matrix",
    "empirical-fisher": "Empirical Fisher matrix",
    "kfac": "K-FAC",
    "ekfac": "EKFAC",
    "matrix": "Matrix",
    "function": "Operator",
}
_LETTERS = {"ggn": "G", "fisher": "F", "empirical-fisher": "E", "kfac": "K", "ekfac": "K"}
_METHODS = {
    "hutchinson": "Hutchinson's estimate",
    "gaussian": "Hutchinson's estimate, normal probes",
    "deflated": "deflation",
    "nystrom": "cross-fitted Nyström",
    "sampled": "sampled labels",
    "per-sequence": "a probe for every sequence",
    "control-variate": "the Gauss-Newton matrix as control variate",
    "auto": "automatic choice",
    "hutch++": "Hutch++",
    "xtrace": "XTrace",
    "xnystrace": "XNysTrace",
    "xdiag": "XDiag",
}
_NO_BREAK = "\N{NO-BREAK SPACE}"
_IN_NATS = ("LM", "CrossEntropy")


def operator_of(result: Result) -> dict[str, Any]:
    """What the result keeps about its operator; for a perplexity, about the one it is an update of."""
    found = result.provenance.get("operator")
    described: dict[str, Any] = found if isinstance(found, dict) else {}
    if objective_of(result) != "perplexity" or described.get("operator") != "multiple":
        return described
    terms = described.get("of", {}).get("terms", [])
    update = [term.get("operator") for term in terms][1:] == ["rank-one"]
    return terms[0] if update else described


def problem_of(result: Result) -> dict[str, Any]:
    """What the result keeps about its problem; empty for an operator that is not of a model."""
    found = _first(result.provenance, "problem")
    return found if isinstance(found, dict) else {}


def selection_of(result: Result) -> dict[str, Any]:
    """What the result keeps about its selection: `size` and, by name, `parameters`; empty where unknown."""
    found = _first(result.provenance, "selection")
    return found if isinstance(found, dict) else {}


def objective_of(result: Result) -> str:
    """ "nll", "perplexity", or nothing for an operator that is not of a model."""
    return str(problem_of(result).get("objective", ""))


def operator_name(result: Result) -> str:
    """The operator's name, as a title starts; of a Fisher matrix or EKFAC whether it is per token or per sequence."""
    per = operator_of(result).get("per")
    return _NAMES.get(_kind(result), "Operator") + (f" per {per}" if per else "")


def entry_symbol(result: Result) -> str:
    """What an entry of the matrix is called, as matplotlib writes it."""
    if _kind(result) == "hessian":
        risk = "P" if objective_of(result) == "perplexity" else "R"
        return f"∂²{risk} / ∂θ$_i$ ∂θ$_j$"
    return f"{_LETTERS.get(_kind(result), 'A')}$_{{ij}}$"


def diagonal_symbol(result: Result) -> str:
    """What an entry of the diagonal is called."""
    return entry_symbol(result).replace("∂θ$_i$ ∂θ$_j$", "∂θ$_i^2$").replace("ij", "ii")


def unit(result: Result) -> str:
    """The unit of entries, eigenvalues and traces; nothing for an operator that is not of a model."""
    problem = problem_of(result)
    if not problem:
        return ""
    if objective_of(result) == "perplexity":
        return "perplexity per squared weight"
    nats = any(part in str(problem.get("loss", "")) for part in _IN_NATS)
    return f"{'nats' if nats else 'loss'} per squared weight"


def with_unit(text: str, result: Result) -> str:
    """An axis label with its unit in brackets."""
    return f"{text}  [{unit(result)}]" if unit(result) else text


def method_name(method: str) -> str:
    """How an estimate was made, in words."""
    return _METHODS.get(method, method)


def model_name(problem: dict[str, Any]) -> str:
    """The model's name without the folders of a local path, or its class."""
    name = str(problem.get("model_name") or problem.get("model") or "")
    return PurePath(name).name if PurePath(name).is_absolute() else name


def selection_line(result: Result) -> str:
    """The selection in a few words: the parameter and its shape, or how many."""
    selection = selection_of(result)
    parameters = selection.get("parameters", {})
    if len(parameters) != 1:
        return f"{selection['size']:,} weights of {len(parameters)} parameters" if parameters else ""
    ((name, entry),) = parameters.items()
    shape = _shape(entry.get("shape", [])) or "scalar"
    whole = _shape(entry.get("of_shape", []))
    return f"{name} ({shape}{f'{_NO_BREAK}of{_NO_BREAK}{whole}' if whole else ''})"


def footer(result: Result) -> list[str]:
    """Model, data, cost and fingerprint: what a figure needs to be told apart from its like."""
    problem = problem_of(result)
    parts = [model_name(problem), str(problem.get("data") or "")]
    if "terms" in problem:
        parts.append(f"N = {problem['terms']:,} loss terms")
    parts.append(result.cost_line())
    if "fingerprint" in problem:
        parts.append(f"fingerprint {str(problem['fingerprint'])[:8]}")
    return [part for part in parts if part]


def _shape(sizes: list[int]) -> str:
    return f"{_NO_BREAK}×{_NO_BREAK}".join(map(str, sizes))


def _kind(result: Result) -> str:
    return str(operator_of(result).get("operator", "")).replace("_", "-")


def _first(tree: Any, key: str) -> Any:
    """The first value under a key, anywhere in nested dictionaries and lists."""
    if isinstance(tree, dict):
        if key in tree:
            return tree[key]
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            if (found := _first(branch, key)) is not None:
                return found
    return None
