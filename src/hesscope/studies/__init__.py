"""Studies: questions about exact blocks that take more than one of them."""

from hesscope.studies.approximations import approximations
from hesscope.studies.convergence import convergence
from hesscope.studies.cross_check import cross_check
from hesscope.studies.perplexity import perplexity_study

__all__ = ["approximations", "convergence", "cross_check", "perplexity_study"]
