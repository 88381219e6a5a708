"""Symmetric linear maps on a space."""

from collections.abc import Callable
from functools import partial

from hesscope.operators.base import Operator
from hesscope.operators.dense import operator
from hesscope.operators.fisher import empirical_fisher, fisher
from hesscope.operators.ggn import ggn
from hesscope.operators.hessian import hessian
from hesscope.operators.kfac import kfac

#: Operators that a command line can name: functions of a problem, a space and settings of their own.
PROBLEM_OPERATORS: dict[str, Callable[..., Operator]] = {
    "hessian": hessian,
    "ggn": ggn,
    "fisher": fisher,
    "empirical-fisher": empirical_fisher,
    "kfac": kfac,
    "ekfac": partial(kfac, corrected=True),
}

__all__ = ["PROBLEM_OPERATORS", "Operator", "empirical_fisher", "fisher", "ggn", "hessian", "kfac", "operator"]
