"""Symmetric linear maps on a space."""

from hesscope.operators.base import Operator
from hesscope.operators.dense import operator
from hesscope.operators.hessian import hessian

#: Operators that a command line can name.
PROBLEM_OPERATORS = {"hessian": hessian}

__all__ = ["PROBLEM_OPERATORS", "Operator", "hessian", "operator"]
