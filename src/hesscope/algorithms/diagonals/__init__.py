"""Estimators of a diagonal, one a file: each is an iteration that knows its estimate and that estimate's error."""

from hesscope.algorithms.diagonals.estimate import Estimate, Estimator, Limits, relative_error
from hesscope.algorithms.diagonals.exact import exact_entries, products_needed

__all__ = ["Estimate", "Estimator", "Limits", "exact_entries", "products_needed", "relative_error"]
