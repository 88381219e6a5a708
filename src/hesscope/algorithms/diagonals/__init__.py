"""Estimators of a diagonal, one a file: each is an iteration that knows its estimate and that estimate's error."""

from hesscope.algorithms.diagonals.estimate import Estimate, Estimator, Limits, relative_error
from hesscope.algorithms.diagonals.exact import Entries

__all__ = ["Entries", "Estimate", "Estimator", "Limits", "relative_error"]
