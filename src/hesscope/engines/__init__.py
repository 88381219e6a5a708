"""Engines: how the product of one batch's Hessian with vectors is computed."""

from hesscope.engines.auto import Auto
from hesscope.engines.base import Differential, Engine, Linearization
from hesscope.engines.choice import ENGINES, make_engine, make_output_engine
from hesscope.engines.output_tails import Middle

__all__ = ["ENGINES", "Auto", "Differential", "Engine", "Linearization", "Middle", "make_engine", "make_output_engine"]
