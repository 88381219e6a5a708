"""Runs that are stopped and continued: where their state is, and what is said about it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hesscope.algorithms.checkpoint import Checkpoint
    from hesscope.cli.options import CommonOptions

#: Options that leave the numbers as they are.
DECIDE_NOTHING = frozenset(
    {
        "output_dir",
        "overwrite",
        "also_pt",
        "config",
        "checkpoint_every",
        "restart",
        "timeout",
        "memory",
        "force",
        "check",
    }
)


class Stopped(Exception):
    """An interrupt after which the same command continues; its text says so."""


def result_folder(common: CommonOptions, verb: str) -> Path:
    """The folder that a verb writes."""
    return common.output_dir or Path("runs") / verb


def checkpoint(common: CommonOptions, folder: Path) -> Checkpoint:
    """The checkpoint of the run that is to write `folder`: beside it, so that the folder is complete or not there."""
    from hesscope.algorithms.checkpoint import Checkpoint

    return Checkpoint(partial_folder(folder), every=common.checkpoint_every, restart=common.restart, say=say)


def partial_folder(folder: Path) -> Path:
    """`runs/eigs.partial` for `runs/eigs`."""
    if folder.name in ("", ".."):
        folder = Path(os.path.abspath(folder))
    return folder.parent / f"{folder.name}.partial"


@contextmanager
def stopped_in_words(folder: Path) -> Iterator[None]:
    """Raise Stopped for an interrupt that leaves a checkpoint behind."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        from hesscope.algorithms.checkpoint import Checkpoint

        partial = partial_folder(folder)
        if Checkpoint(partial).exists:
            raise Stopped(f"Stopped; run the same command again to continue from {partial}.") from interrupt
        raise


def say(line: str) -> None:
    """One line on the error stream."""
    print(f"hesscope: {line}", file=sys.stderr, flush=True)
