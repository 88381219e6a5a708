"""Algorithms: what is computed from an operator. They see products, the space and nothing of the model."""

from hesscope.algorithms.block import block
from hesscope.algorithms.density import density
from hesscope.algorithms.diagonal import diagonal
from hesscope.algorithms.diagonal_study import diagonal_study
from hesscope.algorithms.eigs import eigs
from hesscope.algorithms.exact_plan import plan_exact_diagonal
from hesscope.algorithms.groups import groups
from hesscope.algorithms.lanczos import lanczos
from hesscope.algorithms.structure import structure
from hesscope.algorithms.trace import trace
from hesscope.algorithms.tracking import track_eigs

__all__ = [
    "block",
    "density",
    "diagonal",
    "diagonal_study",
    "eigs",
    "groups",
    "lanczos",
    "plan_exact_diagonal",
    "structure",
    "trace",
    "track_eigs",
]
