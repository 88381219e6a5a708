"""The command line: one verb a result."""

from hesscope.cli.main import main

__all__ = ["main"]
