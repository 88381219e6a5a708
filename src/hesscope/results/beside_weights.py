"""A diagonal in files that read like the checkpoint's own: its names, its shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from hesscope.results.diagonal import Diagonal

VALUES, ERRORS = "diagonal.safetensors", "diagonal_standard_error.safetensors"


def files_beside_weights(diagonal: Diagonal) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    """{file name: (tensors, metadata)}: one tensor a parameter that is selected whole, named as in `model.state_dict()`.

    Parameters of which only a part is selected, and operators that are no model's, have none. The metadata says what the
    numbers are: kind, what (value or standard error), unit, objective, N, method, relative error and fingerprints.
    """
    from hesscope.figures.subject import operator_name, problem_of, selection_of, unit

    problem, parameters = problem_of(diagonal), selection_of(diagonal).get("parameters", {})
    whole = [name for name in diagonal.values if name in parameters and "of_shape" not in parameters[name]]
    if not problem or not whole:
        return {}
    facts = {
        "format": "pt",
        "kind": f"diagonal of the {operator_name(diagonal)}",
        "unit": unit(diagonal),
        "objective": problem.get("objective"),
        "N": problem.get("terms"),
        "method": diagonal.method,
        "relative_error": diagonal.relative_error,
        "degrees_of_freedom": diagonal.degrees_of_freedom,
        "model": problem.get("model_name") or problem.get("model"),
        "data": problem.get("data"),
        "fingerprint": problem.get("fingerprint"),
        "weights_fingerprint": problem.get("weights_fingerprint"),
    }
    said = {name: str(fact) for name, fact in facts.items() if fact is not None}
    return {
        file: ({name: parts[name] for name in whole}, said | {"what": what})
        for file, what, parts in (
            (VALUES, "value", diagonal.values),
            (ERRORS, "standard error", diagonal.standard_error),
        )
    }
