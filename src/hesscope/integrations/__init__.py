"""hesscope inside other people's loops."""

from hesscope.integrations.trainer import CurvatureCallback

__all__ = ["CurvatureCallback"]
