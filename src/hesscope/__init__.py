"""hesscope: the curvature of a language model's loss."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Importing torch takes seconds; `hesscope --help` should not. Names are resolved when they are first used.
_HOMES = {
    "CurvatureCallback": "hesscope.integrations",
    "HesscopeError": "hesscope.errors",
    "HesscopeWarning": "hesscope.errors",
    "Operator": "hesscope.operators",
    "Problem": "hesscope.problem",
    "Space": "hesscope.space",
    "approximations": "hesscope.studies",
    "block": "hesscope.algorithms",
    "causal_lm": "hesscope.problem",
    "convergence": "hesscope.studies",
    "cross_check": "hesscope.studies",
    "data_parallel": "hesscope.parallel",
    "fully_shard_model": "hesscope.parallel",
    "density": "hesscope.algorithms",
    "diagonal": "hesscope.algorithms",
    "diagonal_study": "hesscope.algorithms",
    "eigs": "hesscope.algorithms",
    "empirical_fisher": "hesscope.operators",
    "fisher": "hesscope.operators",
    "ggn": "hesscope.operators",
    "groups": "hesscope.algorithms",
    "hessian": "hesscope.operators",
    "kfac": "hesscope.operators",
    "lanczos": "hesscope.algorithms",
    "load": "hesscope.results",
    "memory_limit": "hesscope.memory",
    "operator": "hesscope.operators",
    "perplexity_study": "hesscope.studies",
    "plan": "hesscope.planning",
    "plan_cluster": "hesscope.planning",
    "plan_exact_diagonal": "hesscope.algorithms",
    "precision": "hesscope.arithmetic",
    "select": "hesscope.problem",
    "seq2seq_lm": "hesscope.problem",
    "structure": "hesscope.algorithms",
    "supervised": "hesscope.problem",
    "trace": "hesscope.algorithms",
    "track_eigs": "hesscope.algorithms",
    "verify": "hesscope.verification",
}

if TYPE_CHECKING:
    from hesscope.algorithms import (
        block,
        density,
        diagonal,
        diagonal_study,
        eigs,
        groups,
        lanczos,
        plan_exact_diagonal,
        structure,
        trace,
        track_eigs,
    )
    from hesscope.arithmetic import precision
    from hesscope.errors import HesscopeError, HesscopeWarning
    from hesscope.integrations import CurvatureCallback
    from hesscope.memory import memory_limit
    from hesscope.operators import Operator, empirical_fisher, fisher, ggn, hessian, kfac, operator
    from hesscope.parallel import data_parallel, fully_shard_model
    from hesscope.planning import plan, plan_cluster
    from hesscope.problem import Problem, causal_lm, select, seq2seq_lm, supervised
    from hesscope.results import load
    from hesscope.space import Space
    from hesscope.studies import approximations, convergence, cross_check, perplexity_study
    from hesscope.verification import verify

__all__ = [
    "CurvatureCallback",
    "HesscopeError",
    "HesscopeWarning",
    "Operator",
    "Problem",
    "Space",
    "approximations",
    "block",
    "causal_lm",
    "convergence",
    "cross_check",
    "data_parallel",
    "density",
    "diagonal",
    "diagonal_study",
    "eigs",
    "empirical_fisher",
    "fisher",
    "fully_shard_model",
    "ggn",
    "groups",
    "hessian",
    "kfac",
    "lanczos",
    "load",
    "memory_limit",
    "operator",
    "perplexity_study",
    "plan",
    "plan_cluster",
    "plan_exact_diagonal",
    "precision",
    "select",
    "seq2seq_lm",
    "structure",
    "supervised",
    "trace",
    "track_eigs",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hesscope' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
