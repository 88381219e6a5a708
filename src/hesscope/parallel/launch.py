"""The ranks that a launcher such as torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from hesscope.errors import HesscopeError, RankLost
from hesscope.parallel.ranks import Ranks
from hesscope.parallel.watch import LONGEST, PATIENCE


@contextmanager
def launched(timeout: float, probe_groups: int = 1) -> Iterator[Ranks]:
    """The default process group; made from the launcher's environment, with NCCL where every local rank has a GPU of its own.

    Raises RankLost where not all ranks have come after ten times `timeout`.
    """
    if not timeout > 0:
        raise HesscopeError(f"Expected --timeout to be a number of seconds above 0, got {timeout}.")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local % gpus)
    made = not dist.is_initialized()
    own = 0 < int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= gpus and dist.is_nccl_available()
    limit = PATIENCE * timeout
    try:
        if made:
            dist.init_process_group("nccl" if own else "gloo", timeout=timedelta(seconds=limit))
            _set_pg_timeout(LONGEST)
    except ValueError as error:
        raise HesscopeError(
            f"Could not join the other processes ({_line(error)}); start the command with torchrun."
        ) from error
    except RuntimeError as error:
        raise RankLost(
            f"Could not join the other processes within {limit:g} seconds ({_line(error)}): one has not come, or has stopped; start "
            "all of them again, and the command continues from its last checkpoint."
        ) from error
    ranks = Ranks(None, timeout, probe_groups)
    try:
        yield ranks
        ranks.any(False)  # nobody leaves, and takes the store along, while another still reads
    finally:
        ranks.close()
    if made:
        dist.destroy_process_group()


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
