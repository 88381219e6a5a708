"""The vector space over a selection of parameters."""

from hesscope.space.coordinates import Coordinates
from hesscope.space.space import Space
from hesscope.space.vectors import Vectors

__all__ = ["Coordinates", "Space", "Vectors"]
