"""Estimators of a trace: one a file, each an iteration with an estimate and its error."""

from hesscope.algorithms.traces.exchangeable import XNysTrace, XTrace
from hesscope.algorithms.traces.hutchinson import Hutchinson
from hesscope.algorithms.traces.hutchpp import HutchPlusPlus
from hesscope.algorithms.traces.interface import TraceEstimator
from hesscope.algorithms.traces.until_exact import UntilExact

__all__ = ["HutchPlusPlus", "Hutchinson", "TraceEstimator", "UntilExact", "XNysTrace", "XTrace"]
