"""Engines: how the product of one batch's Hessian with vectors is computed."""

from hesscope.engines.auto import Auto
from hesscope.engines.base import Engine, Linearization
from hesscope.engines.choice import ENGINES, make_engine

__all__ = ["ENGINES", "Auto", "Engine", "Linearization", "make_engine"]
