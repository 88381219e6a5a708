"""Problems: a model, a loss and a frozen list of batches."""

from hesscope.problem.causal_lm import causal_lm
from hesscope.problem.problem import Problem
from hesscope.problem.selection import select
from hesscope.problem.seq2seq_lm import seq2seq_lm
from hesscope.problem.supervised import supervised

__all__ = ["Problem", "causal_lm", "select", "seq2seq_lm", "supervised"]
