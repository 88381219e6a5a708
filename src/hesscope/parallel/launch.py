"""The ranks that a launcher such as torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from hesscope.errors import HesscopeError
from hesscope.parallel.ranks import Ranks


@contextmanager
def launched(timeout: float, probe_groups: int = 1) -> Iterator[Ranks]:
    """The default process group; made from the launcher's environment, with NCCL where every local rank has a GPU of its own."""
    if not timeout > 0:
        raise HesscopeError(f"Expected --timeout to be a number of seconds above 0, got {timeout}.")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local % gpus)
    made = not dist.is_initialized()
    own = 0 < int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= gpus and dist.is_nccl_available()
    try:
        if made:
            dist.init_process_group("nccl" if own else "gloo")
    except (RuntimeError, ValueError) as error:
        raise HesscopeError(
            f"Could not join the other processes ({str(error).strip().splitlines()[0]}); start the command with torchrun."
        ) from error
    ranks = Ranks(None, timeout, probe_groups)
    try:
        yield ranks
        ranks.any(False)  # nobody leaves, and takes the store along, while another still reads
    finally:
        ranks.close()
    if made:
        dist.destroy_process_group()
