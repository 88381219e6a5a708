"""The vector space over a selection of parameters."""

from hesscope.space.coordinates import Coordinates, Rows
from hesscope.space.division import Division
from hesscope.space.space import Space
from hesscope.space.vectors import Vectors

__all__ = ["Coordinates", "Division", "Rows", "Space", "Vectors"]
