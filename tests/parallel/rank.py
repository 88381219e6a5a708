"""One rank of a test: `rank.py OUT NAME...` runs programs of `programs.py` and saves what they return as OUT/RANK.pt."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import programs
import torch
import torch.distributed as dist

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits one that is ignored
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    found = {name: getattr(programs, name)(folder) for name in sys.argv[2:]}
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    if not found.keys() & set(programs.LAST):
        dist.barrier()
