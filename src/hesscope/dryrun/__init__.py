"""Runs without numbers: what a run would take, found by running it on tensors that have shapes only."""

from hesscope.dryrun.allocator import THRESHOLD, Resident, resident
from hesscope.dryrun.kinds import Kind
from hesscope.dryrun.meter import Meter, Work
from hesscope.dryrun.shadow import META, Shadow, shadow_model, shadow_problem

__all__ = [
    "META",
    "THRESHOLD",
    "Kind",
    "Meter",
    "Resident",
    "Shadow",
    "Work",
    "resident",
    "shadow_model",
    "shadow_problem",
]
