"""Data parallel: every rank holds the model and runs its share of the frozen batches; sums are reduced once a product."""

from __future__ import annotations

import atexit
from collections.abc import Mapping

import torch.distributed as dist

from hesscope.algorithms.driver import versions
from hesscope.communicator import Communicator
from hesscope.errors import HesscopeError
from hesscope.models import sharded
from hesscope.parallel.ranks import TIMEOUT, Ranks
from hesscope.problem import Problem

#: What has to be the same on every rank, in words.
_SAME = {"weights": "model", "data": "data", "settings": "loss, objective, dropout and seed", "versions": "packages"}


def data_parallel(
    problem: Problem, group: dist.ProcessGroup | None = None, timeout: float = TIMEOUT, probe_groups: int = 1
) -> Problem:
    """The problem with its batches divided among the ranks of a process group.

    Every rank makes the whole problem, with the same model and the same data, and calls this. What is made of the problem it
    returns needs no further change: every operator sums over this rank's batches, adds up over the ranks by one reduction
    a product (of all vectors of a product together, in at least float32), and divides by the count N of all data once:

        A v = (1/N) sum over ranks r of  sum over batches b of r of  A_b v.

    Shares may be uneven, and empty where there are fewer batches than ranks. Every rank gets every result; all have to make
    the same calls in the same order, with the same arguments. Seeds give the same numbers on any number of ranks, up to
    rounding. Of a model that `fully_shard` (FSDP2, hybrid sharding), a tensor-parallel plan, with replicas or not, or both have
    divided, a rank holds its part of the weights, and its rows of vectors over whole weights and of Krylov bases; the streamed engine gathers a
    block at a time. A model wrapped in DistributedDataParallel is taken out of its wrapper by `causal_lm` and its like.

    Args:
        group: a process group; the default one for None (`torch.distributed.init_process_group`).
        timeout: seconds of silence after which a rank counts as lost; ten times that before it has come. Waiting for a rank that
            is at work has no limit but the process group's own.
        probe_groups: divide the ranks into so many groups of one size; where a product has as many vectors or more (probes of a
            trace, a diagonal or a density, columns), each group takes a part of the vectors, and its ranks divide the batches.
            For more ranks than batches.

    Raises:
        HesscopeError: torch.distributed is not initialised, `probe_groups` does not divide the number of ranks, the ranks have different models, data, settings or packages, or
            (later, from every call) a rank has failed; its text names the rank and the cause.

    Example:
        >>> import torch, torch.distributed as dist, hesscope as hs
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)    # torchrun: without arguments
        >>> batch = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> problem = hs.supervised(torch.nn.Linear(2, 1, bias=False), [batch], loss="mse")
        >>> hs.hessian(hs.data_parallel(problem)) @ torch.ones(2)
        tensor([1., 4.])
        >>> dist.destroy_process_group()
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise HesscopeError(
            "Expected an initialised process group; start the script with torchrun and call "
            "torch.distributed.init_process_group first."
        )
    if not timeout > 0:
        raise HesscopeError(f"Expected timeout to be a number of seconds above 0, got {timeout}.")
    ranks = Ranks(group, timeout, probe_groups)
    atexit.register(ranks.close)
    return divided(problem, ranks)


def divided(problem: Problem, comm: Communicator, options: Mapping[str, str] | None = None) -> Problem:
    """The problem with its batches divided among the ranks, once all are known to have the same one.

    Raises HesscopeError, on every rank, where they have not.
    """
    with comm.connected():
        store = sharded(problem.model)
        comm.join(None if store is None else store.exchange)
    own = {
        "architecture": problem.architecture,
        "weights": problem.describe()["weights_fingerprint"],
        "data": problem.data_fingerprint,
        "settings": f"{problem.loss_fingerprint}, {problem.objective}, {problem.dropout}, {problem.seed}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    own |= {f"--{name.replace('_', '-')}": value for name, value in (options or {}).items()}
    require_same(comm.gathered(own))
    result = problem.related()
    result.comm = comm
    return result


def require_same(found: list[dict[str, str]]) -> None:
    """Raise HesscopeError, naming what differs and the ranks where it does, unless all ranks hold the same."""
    for name, first in found[0].items():
        others = [rank for rank, own in enumerate(found) if own.get(name) != first]
        if others:
            ranks = f"rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))}"
            short = len(first) < 60
            came = f" ({found[others[0]].get(name)} in place of {first})" if short else ""
            raise HesscopeError(
                f"Expected the same {_SAME.get(name, name)} on every rank, but {ranks} differ{'' if len(others) > 1 else 's'} "
                f"from rank 0{came}; start all ranks with the same model, data and options."
            )
