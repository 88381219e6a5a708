"""Results: frozen values with their error, their cost and their provenance."""

from hesscope.results.approximations import Approximations
from hesscope.results.base import Result
from hesscope.results.block import Block
from hesscope.results.convergence import Convergence
from hesscope.results.density import Density
from hesscope.results.diagonal import Diagonal
from hesscope.results.diagonal_study import DiagonalStudy
from hesscope.results.eigs import Eigenpairs
from hesscope.results.eigs_track import EigsTrack
from hesscope.results.groups import Groups
from hesscope.results.lanczos import LanczosRun
from hesscope.results.loading import load
from hesscope.results.perplexity import PerplexityStudy
from hesscope.results.plan import Plan
from hesscope.results.structure import Structure
from hesscope.results.structure_comparison import StructureComparison
from hesscope.results.trace import Trace
from hesscope.results.verification import Verification

__all__ = [
    "Approximations",
    "Block",
    "Convergence",
    "Density",
    "Diagonal",
    "DiagonalStudy",
    "Eigenpairs",
    "EigsTrack",
    "Groups",
    "LanczosRun",
    "PerplexityStudy",
    "Plan",
    "Result",
    "Structure",
    "StructureComparison",
    "Trace",
    "Verification",
    "load",
]
