"""What every rank of a test runs. A program gets the test's folder and returns what can be saved."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from divided_runs import ELSEWHERE, FEW, LAYOUTS, MULTIPLY, continued, held_and_gathered, stopped
from shared_cases import (
    ARCHITECTURES,
    DIVIDED,
    QUICK,
    cases,
    few_cases,
    grouped_cases,
    more_diagonals,
    tensor_cases,
    whole_cases,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope import exchange
from hesscope.algorithms import checkpoint, driver
from hesscope.algorithms.checkpoint import Checkpoint
from hesscope.algorithms.krylov import Krylov
from hesscope.algorithms.traces import Hutchinson
from hesscope.cli.main import run
from hesscope.engines import make_engine
from hesscope.engines.dry import DryRuns
from hesscope.engines.reverse_over_reverse import ReverseOverReverse
from hesscope.engines.streaming import Streamed
from hesscope.errors import RankLost
from hesscope.models import is_sharded, load_model, load_skeleton
from hesscope.models.offload import Offloaded
from hesscope.operators import free, kronecker_factors, room
from hesscope.operators.batch_columns import BatchColumns
from hesscope.operators.composed import RankOne
from hesscope.operators.congruence import DiagonalCongruence
from hesscope.parallel.ranks import Ranks
from hesscope.parallel.watch import Watch
from hesscope.space import vectors
from hesscope.tensor_file import Outgoing
from oracles import relative

TIMEOUT = 4.0
#: The engines that "auto" begins with, and takes where memory is short.
ENDS = ("reverse-over-reverse", "streamed")
DEMO = [
    "--model",
    "demo",
    "--data",
    "demo",
    "--length",
    "16",
    "--sequences",
    "3",
    "--dtype",
    "float64",
    "--params",
    "model.layers.3.mlp.*",
]
STREAMED = ["--engine", "streamed", "--basis"]
#: Also run by the test itself, in one process.
DENSITY = ["density", *DEMO, "--probes", "2", "--steps", "6", "--checkpoint-every", "0"]


def numbers(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The quick cases, on a group that is given."""
    group = dist.new_group()
    return dict(cases(lambda problem: hs.data_parallel(problem, group), QUICK))


def grouped(problem: hs.Problem) -> hs.Problem:
    return hs.data_parallel(problem, probe_groups=2)


def in_groups(folder: Path) -> dict[str, Any]:
    """Vectors divided between groups of ranks; also how many vectors each rank's engine was given."""
    given: list[int] = []
    real = ReverseOverReverse.linearize

    def linearize(self: Any, problem: hs.Problem, b: int, space: hs.Space) -> Any:
        made = real(self, problem, b, space)
        add = made.add_product
        made.add_product = lambda V, into, last=False: (given.append(vectors.count(V)), add(V, into, last))  # type: ignore[method-assign]
        return made

    ReverseOverReverse.linearize = linearize  # type: ignore[method-assign]
    try:
        found: dict[str, Any] = {"numbers": dict(grouped_cases(grouped)), "given": given[:1]}
    finally:
        ReverseOverReverse.linearize = real  # type: ignore[method-assign]
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    found["three"] = _complaint(lambda: hs.data_parallel(problem, probe_groups=3))
    return found


def all_in_groups(folder: Path) -> dict[str, dict[str, Tensor]]:
    """All cases, and those of groups."""
    return dict(cases(grouped, ARCHITECTURES)) | dict(grouped_cases(grouped))


def all_numbers(folder: Path) -> dict[str, dict[str, Tensor]]:
    """All cases."""
    return dict(cases(hs.data_parallel, ARCHITECTURES))


def fully_sharded(problem: hs.Problem) -> hs.Problem:
    """The problem, its model's blocks and the rest of it divided among the ranks."""
    return _divided(problem, hs.fully_shard_model)


def _divided(problem: hs.Problem, divide: Callable[[nn.Module], nn.Module], **options: Any) -> hs.Problem:
    """The problem, its model divided unless it is."""
    if not any(is_sharded(p) for p in problem.model.parameters()):
        divide(problem.model)
    return hs.data_parallel(problem.related(), **options)


def sharded(folder: Path) -> dict[str, dict[str, Tensor]]:
    """A few cases, with weights divided among the ranks."""
    return dict(few_cases(fully_sharded))


def divided_runs(folder: Path) -> dict[str, Any]:
    """What a rank has of vectors at once; runs that stop here, and those that one process has begun."""
    stopped(fully_sharded, folder / "by-two")
    return {
        "most": held_and_gathered(fully_sharded, list(MULTIPLY)[:FEW]),
        "from one": continued(fully_sharded, folder / "by-one"),
    }


def gone_on_elsewhere(folder: Path) -> dict[str, Any]:
    """Runs that stop on one layout and go on with another; those of one process stand in folder `one`, and what is for one stays."""
    shares = {"data": hs.data_parallel, "fsdp": fully_sharded}
    missing, Watch.missing = Watch.missing, lambda self: None  # type: ignore[method-assign]  # nobody is: seconds for every run
    for name, share in shares.items():
        stopped(share, folder / name, ELSEWHERE)
    Watch.missing = missing  # type: ignore[method-assign]
    pairs = [(name, to) for name in LAYOUTS for to in shares if to != name]
    if dist.get_rank() == 0:
        for name, to in pairs:
            shutil.copytree(folder / name, folder / f"{name} to {to}")
    dist.barrier()
    return {f"{name} to {to}": continued(shares[to], folder / f"{name} to {to}", ELSEWHERE) for name, to in pairs}


def diagonals_divided(folder: Path) -> dict[str, Any]:
    """The first of these, and every way to a diagonal."""
    return {"most": held_and_gathered(fully_sharded, list(MULTIPLY)), "numbers": dict(more_diagonals(fully_sharded))}


def given_out(folder: Path) -> dict[str, Any]:
    """Models that rank 0 alone has loaded: what each rank then holds, how much of it at once, and what is refused."""
    first = dist.get_rank() == 0
    found: dict[str, Any] = {}
    for name in ("qwen2", "gpt2"):  # buffers and no tied weights; tied weights
        model = hs.fully_shard_model(tiny(name) if first else _empty(name))
        found[name] = {key: x.full_tensor() if is_sharded(x) else x for key, x in model.state_dict().items()}  # type: ignore[attr-defined]
        found[f"{name}, buffers"] = dict(model.named_buffers())
        found[f"{name}, names"] = [key for key, _ in model.named_parameters()]
        problem = hs.data_parallel(hs.causal_lm(model, ragged_batches()))
        found[f"{name}, product"] = hs.hessian(problem) @ torch.ones(hs.hessian(problem).shape[0], dtype=torch.float64)
    found["all empty"] = _complaint(lambda: hs.fully_shard_model(_empty("llama")))
    other = tiny("llama") if first else _empty("llama").float()
    found["another dtype"] = _complaint(lambda: hs.fully_shard_model(other))
    with _most_at_once() as most:
        hs.fully_shard_model(tiny("llama") if first else _empty("llama"))
    found["most"] = most[0]
    for name in ("qwen2", "gpt2"):
        if first:
            tiny(name).save_pretrained(folder / name)
        dist.barrier()
        with _most_from_disk() as most:
            model = hs.fully_shard_model(
                _on_disk(name, folder) if first else load_skeleton(folder / name, torch.float64)
            )
        found[f"{name} from disk"] = {key: x.full_tensor() for key, x in model.state_dict().items()}  # type: ignore[attr-defined]
        found[f"{name} from disk, most"] = most[0]
        problem = hs.data_parallel(hs.causal_lm(model, ragged_batches()))
        found[f"{name} from disk, product"] = hs.hessian(problem) @ torch.ones(
            hs.hessian(problem).shape[0], dtype=torch.float64
        )
    return found


def _on_disk(name: str, folder: Path) -> nn.Module:
    """The same with its weights left in files."""
    return load_model(folder / name, torch.float64, device_map="disk", offload_folder=folder / f"{name} weights")


def _empty(name: str) -> nn.Module:
    """An architecture of the test matrix on the meta device."""
    model = tiny(name)
    config = model.config
    with torch.device("meta"):
        made: nn.Module = type(model)(config)
    return made.to(next(model.parameters()).dtype).eval()


@contextmanager
def _most_from_disk() -> Iterator[list[int]]:
    """The most weights read from disk that a process has at a time."""
    most, alive = [0], []
    real = Offloaded.load

    def load(self: Any, name: str) -> Tensor:
        value = real(self, name)
        alive.append((StorageWeakRef(value.untyped_storage()), value.numel()))
        most[0] = max(most[0], sum(count for storage, count in alive if not storage.expired()))
        return value

    Offloaded.load = load  # type: ignore[method-assign]
    try:
        yield most
    finally:
        Offloaded.load = real  # type: ignore[method-assign]


@contextmanager
def _most_at_once() -> Iterator[list[int]]:
    """The most weights that were given out and not yet divided at a time."""
    most = [0]
    real = Ranks.on

    def on(self: Any, rank: int, find: Any) -> Any:
        values = real(self, rank, find)
        most[0] = max(most[0], sum(x.numel() for x in values))
        return values

    Ranks.on = on  # type: ignore[method-assign]
    try:
        yield most
    finally:
        Ranks.on = real  # type: ignore[method-assign]


def all_sharded(folder: Path) -> dict[str, dict[str, Tensor]]:
    """All cases, and those over all weights."""
    return all_divided(fully_sharded)


def all_divided(share: Callable[[hs.Problem], hs.Problem]) -> dict[str, dict[str, Tensor]]:
    return dict(cases(share, DIVIDED)) | dict(whole_cases(share))


def twice(model: nn.Module) -> nn.Module:
    """The model divided among two ranks, and that twice."""
    return hs.fully_shard_model(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))


def hybrid(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Divided among two ranks, and that twice."""
    return dict(few_cases(lambda problem: _divided(problem, twice)))


def hybrid_groups(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The same, the replicas dividing the vectors of a product."""
    return dict(few_cases(lambda problem: _divided(problem, twice, probe_groups=2)))


def otherwise_placed(folder: Path) -> dict[str, Any]:
    """A vector of DTensors that are divided along the mesh's other dimension; one that differs between replicas, and one after it."""
    problem = _divided(_problem(), twice)
    H = hs.hessian(problem, hs.select(problem, "transformer.h.1.mlp.c_fc.weight"))
    (name,) = H.space.names
    p: Any = dict(problem.model.named_parameters())[name]
    given = p.detach().redistribute(placements=[Shard(0), Replicate()])
    product: Any = (H @ {name: given})[name]
    found = {"product": product.full_tensor(), "placed": product.placements == given.placements}
    v = torch.ones(H.shape[0], dtype=torch.float64)
    found["differs"] = _complaint(lambda: H @ (v + 1e-12 * (dist.get_rank() == 3)))
    return found | {"after": H @ v}


def layouts(folder: Path) -> dict[str, Any]:
    """What the record of a result says of four ranks."""
    ways = {
        "fsdp": hs.fully_shard_model,
        "hsdp": twice,
        "plan": in_parallel,
        "twice": planned_twice,
        "two axes": along_two_axes,
    }
    return {name: _divided(_problem(tiny("qwen2")), divide).comm.describe() for name, divide in ways.items()}


def in_parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
    """The model under a tensor-parallel plan, over all ranks by default: some layers divided by outputs, some by inputs."""
    by_outputs = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")
    by_inputs = ("o_proj", "down_proj", "dense", "fc2")
    plan: dict[str, Any] = {}
    for name, _ in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in by_outputs:
            plan[name] = ColwiseParallel()
        elif kind in by_inputs:
            plan[name] = RowwiseParallel()
        elif kind == "embed_tokens":
            plan[name] = RowwiseParallel(input_layouts=Replicate())
        elif kind == "lm_head":
            plan[name] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh or init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def along_two_axes(model: nn.Module) -> nn.Module:
    """The same among two ranks, and `fully_shard` on top of that among two times two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return hs.fully_shard_model(in_parallel(model, mesh["tensor"]), mesh["data"])


def planned_twice(model: nn.Module) -> nn.Module:
    """The plan among two ranks, and among two others."""
    return in_parallel(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))["tensor"])


def tensor_parallel(problem: hs.Problem) -> hs.Problem:
    """The problem of the model under such a plan."""
    return _divided(problem, in_parallel)


def tensor(folder: Path) -> dict[str, Any]:
    """The numbers of a model under a plan; and its own forward pass, before and after it was borrowed."""
    return _numbers_and_facts(in_parallel)


def two_axes(folder: Path) -> dict[str, Any]:
    """The same of one whose weights are divided along two axes."""
    return _numbers_and_facts(along_two_axes)


def plan_and_replicas(folder: Path) -> dict[str, Any]:
    """The same of one under a plan among two ranks, and that twice, the replicas dividing batches, or the vectors of a product."""
    in_groups = dict(tensor_cases(lambda problem: _divided(problem, planned_twice, probe_groups=2), "qwen2"))
    return _numbers_and_facts(planned_twice) | {"in groups": in_groups}


def _numbers_and_facts(divide: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    found = {"qwen2": dict(tensor_cases(lambda problem: _divided(problem, divide), "qwen2"))}
    model, batch = divide(tiny("qwen2")), ragged_batches()[2]
    with torch.no_grad():
        before = model(**batch).logits
        hs.trace(hs.hessian(hs.data_parallel(hs.causal_lm(model, [batch]))), "hutchinson", budget=2)
        after = model(**batch).logits
    H = hs.hessian(hs.data_parallel(hs.causal_lm(model, [batch])))
    parameters = dict(model.named_parameters())  # a forward pass of training leaves other ones
    product = H @ {name: p.detach() + 1.0 for name, p in parameters.items()}
    found["placed"] = [part.placements == parameters[name].placements for name, part in product.items() if is_sharded(parameters[name])]  # type: ignore[attr-defined]  # fmt: skip
    found["as DTensors"] = {name: part.full_tensor() if is_sharded(part) else part for name, part in product.items()}  # type: ignore[attr-defined]
    return found | {"before": before, "after": after}


def all_tensor(folder: Path) -> dict[str, Any]:
    """The same with biases everywhere."""
    return dict(tensor_cases(tensor_parallel, "phi", more=True))


def described(H: hs.Operator) -> list[Any]:
    """What records say of a rank-one matrix and a congruence, whose vectors are numbers of the parameters' places."""
    v = H.space.gaussian(1, ["described"])
    return [RankOne(H.space, v).describe()["sha256"], DiagonalCongruence(H, v).describe()["sha256"]]


def sharded_facts(folder: Path) -> dict[str, Any]:
    """What each rank holds and moves, and what it says."""
    plain = hs.causal_lm(tiny("gpt2"), ragged_batches()[:2])  # a batch for each rank
    hs.fully_shard_model(plain.model)
    found: dict[str, Any] = {
        "undivided": _complaint(lambda: hs.hessian(plain.related())),
        "twice": _complaint(lambda: hs.fully_shard_model(plain.model)),
        "groups": _complaint(lambda: hs.data_parallel(plain.related(), probe_groups=2)),
    }
    problem = hs.data_parallel(plain.related())
    space = hs.select(problem)
    shards = next(c.rows.exchange for c in space.coordinates if c.rows is not None)
    H = hs.hessian(problem, space)
    v = space.gaussian(0, [0])
    H.matmat(v)  # with the check before the first
    before, rounds = shards.moved_bytes, shards.rounds
    H.matmat(v)
    found["numbers"] = sum(part.numel() for part in v.values())
    found["moved"], found["rounds"] = shards.moved_bytes - before, shards.rounds - rounds
    parameters = dict(plain.model.named_parameters())
    given = {name: parameters[name].detach() + 1.0 for name in space.names}
    product = H @ given
    found["placed"] = all(type(part) is type(given[name]) for name, part in product.items())
    found["as DTensors"] = {name: part.full_tensor() for name, part in product.items()}  # type: ignore[attr-defined]
    found["as whole"] = H @ {name: part.full_tensor() for name, part in given.items()}  # type: ignore[attr-defined]
    found["digests"] = described(H)
    loss = _Fails(plain.loss, lambda: hs.HesscopeError("The third batch is bad."))
    fails = hs.data_parallel(hs.Problem(plain.model, loss, hs.causal_lm(plain.model, ragged_batches()).batches))
    bad = hs.hessian(fails, hs.select(fails, "transformer.h.*"))
    loss.armed = False
    bad.matmat(v := bad.space.gaussian(0, [0]))  # with the check, on one sequence
    loss.armed = True
    found["bad"] = _complaint(lambda: bad.matmat(v))
    found["after"] = _complaint(lambda: hs.trace(H, "hutchinson", budget=2))
    return found


def in_pieces(folder: Path) -> dict[str, Any]:
    """A Lanczos run with its basis, kept, stopped, continued and saved: bytes that this rank received at once, and its own rows.

    Rank 0's first checkpoint finds a full disk.
    """
    problem = fully_sharded(_problem())
    H = hs.hessian(problem)

    def run() -> hs.LanczosRun:
        kept = Checkpoint(folder / "pieces.partial", every=0.0)
        return hs.lanczos(H, 6, keep_basis=True, gather=False, checkpoint=kept)

    last = dist.get_rank() == 1
    found: dict[str, Any] = {"stopped": False}
    most = _MostReceived()
    with most.counting(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _at_step(5, lambda: signal.raise_signal(signal.SIGINT) if last else None), _full_once():
            try:
                run()
            except KeyboardInterrupt:
                found["stopped"] = True
        result = run()
        most.phase = "saving"
        result.save(folder / "pieces", also_pt=True)
    found["said"] = [str(w.message) for w in caught if w.category is hs.HesscopeWarning]
    found["whole"] = _complaint(lambda: result.basis)
    found |= {"most": most.most, "resumed": result.provenance["resumed"]}
    pairs = hs.eigs(H, k=2, max_products=6, tol=1e9, gather=False)
    found["own"] = {name: part.own for name, part in pairs.vectors.items()}  # type: ignore[union-attr]
    found["started"] = hs.eigs(H, k=2, max_products=6, tol=1e9, start=pairs).eigenvectors
    return found


class _MostReceived:
    """Bytes of the largest gather or broadcast that this rank received, by phase."""

    def __init__(self) -> None:
        self.phase, self.most = "running", dict[str, int]()

    def note(self, tensors: Sequence[Tensor] | None) -> None:
        self.most[self.phase] = max(self.most.get(self.phase, 0), sum(x.nbytes for x in tensors or ()))

    def around(self, phase: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **options: Any) -> Any:
            before, self.phase = self.phase, phase
            try:
                return work(*args, **options)
            finally:
                self.phase = before

        return inside

    @contextmanager
    def counting(self) -> Iterator[None]:
        def gather(x: Tensor, into: list[Tensor] | None = None, **options: Any) -> Any:
            self.note(into)
            return real[0](x, into, **options)

        def broadcast(x: Tensor, **options: Any) -> Any:
            self.note([x])
            return real[1](x, **options)

        def all_gather(into: Tensor, x: Tensor, **options: Any) -> Any:
            self.note([into])
            return real[2](into, x, **options)

        places: Any = [(dist, "gather"), (dist, "broadcast"), (exchange, "_all_gather")]
        real = [getattr(*place) for place in places]
        wrapped = [gather, broadcast, all_gather]
        places += [(driver, "_write"), (driver, "_found")]
        real += [driver._write, driver._found]
        wrapped += [self.around("writing", driver._write), self.around("resuming", driver._found)]
        for (module, name), work in zip(places, wrapped, strict=True):
            setattr(module, name, work)
        try:
            yield
        finally:
            for (module, name), work in zip(places, real, strict=True):
                setattr(module, name, work)


@contextmanager
def _full_once() -> Iterator[None]:
    """The first file of rank 0 does not fit on its disk."""
    real, made = Outgoing.write, [0]

    def write(self: Any, *args: Any) -> Any:
        made[0] += 1
        if made[0] == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args)

    Outgoing.write = write  # type: ignore[method-assign]
    try:
        yield
    finally:
        Outgoing.write = real  # type: ignore[method-assign]


def _complaint(run: Callable[[], Any]) -> str:
    """What it raises, in words."""
    try:
        run()
    except hs.HesscopeError as error:
        return str(error)
    except torch.OutOfMemoryError as error:
        return f"itself: {error}"
    return "nothing"


def _problem(model: nn.Module | None = None, batches: list[Any] | None = None, **options: Any) -> hs.Problem:
    return hs.causal_lm(model or tiny("gpt2"), batches or ragged_batches(), **options)


def refusals(folder: Path) -> dict[str, str]:
    """Ranks that have not the same."""
    last = dist.get_rank() == dist.get_world_size() - 1
    model, batches = tiny("gpt2"), ragged_batches()
    if last:
        model.transformer.ln_f.weight.data[0] += 1e-9
        batches[1]["labels"][1, 2] = 8
    H = hs.hessian(hs.data_parallel(_problem()))
    v = torch.ones(H.shape[0], dtype=torch.float64)
    return {
        "model": _complaint(lambda: hs.data_parallel(_problem(model))),
        "data": _complaint(lambda: hs.data_parallel(_problem(batches=batches))),
        "settings": _complaint(lambda: hs.data_parallel(_problem(objective="perplexity" if last else "nll"))),
        "vector": _complaint(lambda: H @ (v + 1e-12 * last)),
        "after": _complaint(lambda: H @ v),
    }


class _Fails:
    """A loss that fails on batches of one sequence: the third of the ragged ones."""

    def __init__(self, loss: Any, error: Callable[[], Exception]) -> None:
        self.loss, self.error, self.armed = loss, error, True

    def count(self, batch: Any) -> int:
        return int(self.loss.count(batch))

    def total(self, model: nn.Module, batch: Any) -> Any:
        if self.armed and len(batch["input_ids"]) == 1:
            raise self.error()
        return self.loss.total(model, batch)


def failures(folder: Path) -> dict[str, str]:
    """An exception in one rank's share; the ranks stay in step."""
    whole = _problem()
    errors: dict[str, Callable[[], Exception]] = {
        "bad": lambda: hs.HesscopeError("The third batch is bad."),
        "memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
    }
    found = {}
    for name, error in errors.items():
        problem = hs.data_parallel(hs.Problem(whole.model, _Fails(whole.loss, error), whole.batches))
        H = hs.hessian(problem, hs.select(problem, "*ln_f.bias"))
        one = torch.ones(H.shape[0], dtype=torch.float64)
        found[name] = _complaint(lambda H=H, one=one: H @ one)
        found[f"{name}, block"] = _complaint(lambda H=H: hs.block(H))
    found["after"] = _complaint(lambda: hs.trace(hs.hessian(hs.data_parallel(whole)), "hutchinson", budget=2))
    return found


def kept(folder: Path) -> dict[str, Any]:
    """Groups of parameters in a run that could be interrupted."""
    problem = hs.data_parallel(_problem())
    H = hs.hessian(problem, hs.select(problem, "*ln_f*"))
    found = hs.groups(H, "layer", probes=2, steps=2, max_products=2, tol=1e9, checkpoint=folder / "groups.partial")
    return {"layout": found.provenance["processes"], "files": (folder / "groups.partial").exists()}


def counted(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Reductions and bytes of one product of three vectors, beside the vectors' own bytes."""
    problem = hs.data_parallel(_problem())
    space = hs.select(problem, "transformer.h.1.mlp.*")
    V = space.gaussian(0, [0, 1, 2])
    found = {}
    for kind, A in {
        "hessian": hs.hessian(problem, space),
        "streamed": hs.hessian(problem, space, "streamed"),
        "nothing kept": hs.hessian(problem, space, graph_memory=0),
        "ggn": hs.ggn(problem, space),
    }.items():
        A.matmat(V)  # with the checks before the first
        ranks: Any = problem.comm
        reductions, moved = ranks.reductions, ranks.reduced_bytes
        A.matmat(V)
        own = sum(part.nbytes for part in V.values())
        found[kind] = ranks.reductions - reductions, ranks.reduced_bytes - moved, own
    return found


def rooms(folder: Path) -> dict[str, Any]:
    """Ranks of one machine, of which the last sees little memory: what all take, and what all refuse."""
    tokens = torch.randint(0, 37, (64, 16), generator=torch.Generator().manual_seed(0))
    problem = hs.data_parallel(
        _problem(tiny("gpt2", n_layer=6), [{"input_ids": x, "labels": x} for x in tokens.split(32)])
    )
    space = hs.select(problem)
    runs = DryRuns(problem, space)
    graph, streamed = (runs.product(lambda name=name: make_engine(name)).resident for name in ENDS)
    v = torch.ones(space.size, dtype=torch.float64)
    plain, found = hs.hessian(problem, space, ENDS[0]) @ v, {}
    for what, room_for in {"plenty": 2 * graph, "little": graph + streamed, "none": 2 * (streamed // 2)}.items():
        seen = room_for if dist.get_rank() == dist.get_world_size() - 1 else 2**40
        with _seeing(seen):
            H = hs.hessian(problem, space)
            gaps: list[float] = []
            said = _complaint(lambda H=H, gaps=gaps: gaps.append(relative(H @ v, plain)))
        found[what] = (H.engine.chosen, H.engine.note, gaps[0]) if gaps else said
    return found


@contextmanager
def _seeing(seen: int) -> Iterator[None]:
    """As if so many bytes were free, of which an ordinary product may take a good part."""
    real = free.available_bytes, room._PLENTY
    free.available_bytes, room._PLENTY = lambda _: seen, 0.0
    try:
        yield
    finally:
        free.available_bytes, room._PLENTY = real


def in_bfloat16(share: Callable[[hs.Problem], hs.Problem]) -> dict[str, Tensor]:
    """Products of a model with bfloat16 weights, whose sums over batches are float32."""
    problem = share(hs.causal_lm(tiny("llama").bfloat16(), ragged_batches()))
    space = hs.select(problem)
    V = space.flatten(space.gaussian(0, [0, 1]))
    operators = {"hessian": hs.hessian(problem, space, "streamed"), "ggn": hs.ggn(problem, space, engine="streamed")}
    return {kind: A @ V for kind, A in operators.items()}


def halves(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The same, data parallel and fully sharded."""
    return {"data": in_bfloat16(hs.data_parallel), "fsdp": in_bfloat16(fully_sharded)}


def wrapped(folder: Path) -> dict[str, Tensor]:
    """A model in DistributedDataParallel."""
    problem = hs.data_parallel(_problem(nn.parallel.DistributedDataParallel(tiny("gpt2"))))
    return {"wrapped": hs.block(hs.hessian(problem, hs.select(problem, "*ln_f*"))).matrix}


# ---- the command line


def commands(folder: Path) -> dict[str, tuple[int, str]]:
    """Verbs whose folders are compared with those of one process."""
    verbs: dict[str, list[str]] = {
        "eigs": ["eigs", *DEMO, "-k", "2", "--tol", "0.01"],
        "layers": [
            "diagonal",
            *DEMO,
            "--layers",
            "mlp.*",
            "--blocks",
            "3",
            "--rows",
            "0",
            "--separately",
            "--budget",
            "12",
        ],
        "from-one": DENSITY,  # begun by one process
    }
    verbs["layers"] = [word for word in verbs["layers"] if word not in ("--params", "model.layers.3.mlp.*")]
    return {name: _run([*verb, "--output-dir", str(folder / name)]) for name, verb in verbs.items()}


def sharded_commands(folder: Path) -> dict[str, tuple[int, str]]:
    """Folders that are compared with one process's, and a run that one process has begun."""
    eigs = ["eigs", *DEMO, "-k", "2", "--tol", "0.01", "--engine", "streamed"]
    verbs = {
        "sharded-eigs": eigs,
        "sharded-from-disk": eigs,  # of what rank 0 reads there
        "sharded-from-one": [*DENSITY, *STREAMED],
    }
    if "RANK" in os.environ:
        verbs = {name: [*verb, "--layout", "fsdp"] for name, verb in verbs.items()}
        verbs["sharded-from-disk"] += ["--device-map", "disk", "--offload-folder", str(folder / "weights")]
    return {name: _run([*verb, "--output-dir", str(folder / name)]) for name, verb in verbs.items()}


def interrupted(folder: Path, name: str = "to-one", *more: str) -> tuple[int, str]:
    """The last rank is interrupted in its seventh step: all stop there, and one process continues in the test."""
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    with _at_step(7, lambda: signal.raise_signal(signal.SIGINT) if last else None):
        return _run([*DENSITY, *more, "--output-dir", str(folder / name)])


def sharded_interrupted(folder: Path) -> tuple[int, str]:
    """The same with weights that are divided."""
    return interrupted(folder, "sharded-to-one", *STREAMED, "--layout", "fsdp")


def sharded_continued(folder: Path) -> tuple[int, str]:
    """A run of two such ranks goes on with as many as there are."""
    return _run([*DENSITY, *STREAMED, "--layout", "fsdp", "--output-dir", str(folder / "sharded-to-three")])


def vanished(folder: Path) -> tuple[int, str]:
    """The folder that is to hold the result becomes a file."""
    (folder / "shared").mkdir(exist_ok=True)

    def vanish() -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "shared")
            (folder / "shared").touch()

    with _at_step(4, vanish):
        return _run([*DENSITY[:-1], "60", "--output-dir", str(folder / "shared" / "out")])


def moved(folder: Path) -> dict[str, tuple[int, str]]:
    """The folder of a run's checkpoint is moved away, and back for the same command."""
    there, away = folder / "moving", folder / "moving-away"
    there.mkdir(exist_ok=True)
    command = [*DENSITY, "--output-dir", str(there / "out")]
    found, share = {}, checkpoint._SHARE
    checkpoint._SHARE = 0.0  # however long a write takes, the next is due after the next step
    try:
        with _at_step(5, lambda: there.rename(away) if dist.get_rank() == 0 else None):
            found["gone"] = _run(command)
    finally:
        checkpoint._SHARE = share
    if dist.get_rank() == 0:
        away.rename(there)
    dist.barrier()
    return found | {"back": _run(command)}


def other_options(folder: Path) -> tuple[int, str]:
    """Ranks with other options."""
    return _run(["trace", *DEMO, "--seed", str(dist.get_rank()), "--output-dir", str(folder / "never")])


def _run(arguments: list[str]) -> tuple[int, str]:
    """Exit status and what this rank says."""
    before, sys.__stderr__ = sys.__stderr__, io.StringIO()  # type: ignore[misc]
    try:
        status = run(arguments)
        return status, sys.__stderr__.getvalue()
    finally:
        sys.__stderr__ = before  # type: ignore[misc]


class _at_step:
    """Do something before a step of Lanczos."""

    def __init__(self, number: int, work: Callable[[], object]) -> None:
        self._number, self._work, self._step = number, work, Krylov.step

    def __enter__(self) -> None:
        made = [0]

        def counted(krylov: Krylov) -> None:
            made[0] += 1
            if made[0] == self._number:
                self._work()
            self._step(krylov)

        Krylov.step = counted  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        Krylov.step = self._step  # type: ignore[method-assign]


# ---- out of step: last of all

LAST = ("gone", "never_came", "killed_in_arranging", "killed_in_gathering", "no_room_to_collect")


def gone(folder: Path) -> dict[str, Any]:
    """A rank that an exception of its own ends, while the others wait for it."""
    problem = hs.data_parallel(_problem(), timeout=TIMEOUT)
    if dist.get_rank() == 1:
        try:
            with problem.comm.watched():
                raise OSError("No space left on device")
        except OSError:
            time.sleep(2 * TIMEOUT)
        return {"said": "left"}
    return _timed(lambda: hs.trace(hs.hessian(problem), "hutchinson", budget=3))


def never_came(folder: Path) -> dict[str, Any]:
    """A rank is killed before it has anything to do with the others."""
    if dist.get_rank() == 1:
        _die()
    return _timed(lambda: hs.data_parallel(_problem(), timeout=0.5))


def killed_in_arranging(folder: Path) -> dict[str, Any]:
    """A rank is killed while the ranks tell each other what they hold of the weights."""
    if dist.get_rank() == 1:
        dist.all_gather_object = _die
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    model = hs.fully_shard_model(in_parallel(tiny("qwen2"), mesh["tensor"]), mesh["data"])
    return _timed(lambda: hs.data_parallel(_problem(model)))


def killed_in_gathering(folder: Path) -> dict[str, Any]:
    """A rank is killed where a vector is given as DTensors of another placement."""
    problem = fully_sharded(_problem())
    H = hs.hessian(problem, hs.select(problem, "transformer.h.1.mlp.c_fc.weight"))
    given = {name: p.detach().redistribute(placements=[Shard(1)]) for name, p in problem.model.named_parameters() if name in H.space.names}  # type: ignore[attr-defined]  # fmt: skip
    if dist.get_rank() == 1:
        DTensor.full_tensor = _die  # type: ignore[method-assign]
    return _timed(lambda: H @ given)


def no_room_to_collect(folder: Path) -> dict[str, Any]:
    """Rank 0 has no memory for the rows of the others, which a checkpoint would have."""
    problem = _divided(_problem(), hs.fully_shard_model, timeout=TIMEOUT)
    H, kept = hs.hessian(problem, hs.select(problem, "*ln_f*")), Checkpoint(folder / "no-room.partial", every=0.0)
    with _failing(exchange.Exchange, "_collected", dist.get_rank() == 0):
        return _timed(lambda: hs.lanczos(H, 6, checkpoint=kept))


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _timed(run: Callable[[], Any]) -> dict[str, Any]:
    """How a rank was lost to this one, and after how many seconds."""
    began = time.monotonic()
    try:
        run()
    except RankLost as error:
        return {"said": str(error), "seconds": time.monotonic() - began}
    return {"said": "nothing", "seconds": 0.0}


# ---- exceptions that the ranks outlive


def outlived(folder: Path) -> dict[str, Any]:
    """One rank fails while its engine looks at the problem; all fail alike, and one is then slow; one rank was in a group alone."""
    first, found = dist.get_rank() == 0, {}
    alone = dist.new_group([0])
    if first:
        hs.data_parallel(hs.causal_lm(tiny("gpt2"), ragged_batches()), alone)
    problem = hs.data_parallel(hs.causal_lm(tiny("gpt2"), ragged_batches()), timeout=4)
    space = hs.select(problem, "*ln_f*")
    v = torch.ones(space.size, dtype=torch.float64)
    with _failing(Streamed, "prepare", not first):
        found["prepare"] = _complaint(lambda: hs.hessian(problem, space, "streamed") @ v)
    found["after"] = hs.hessian(problem, space) @ v
    with _failing(Krylov, "step", True):
        found["all"] = _complaint(lambda: hs.lanczos(hs.hessian(problem, space), 3))
    real = ReverseOverReverse.linearize

    def slow(self: Any, *arguments: Any) -> Any:
        time.sleep(0 if first else 2.5)
        return real(self, *arguments)

    ReverseOverReverse.linearize = slow  # type: ignore[method-assign]
    try:
        found["slow"] = hs.hessian(problem, space) @ v
    finally:
        ReverseOverReverse.linearize = real  # type: ignore[method-assign]
    for late in range(2):
        found[f"rank {late} late"] = _after_an_exception(
            problem, dist.get_rank() == late, lambda: hs.hessian(problem, space) @ v
        )
    found["caught"] = _complaint(lambda: _caught(problem, first))
    return found


def _after_an_exception(problem: hs.Problem, late: bool, work: Callable[[], Any]) -> Any:
    """What all ranks do after an exception that all have had, of which one was the first to say so and is now the last to go on."""
    with suppress(OSError), problem.comm.watched():
        time.sleep(0 if late else 0.5)
        raise OSError("no file")
    time.sleep(2.5 if late else 0)
    try:
        return work()
    except RankLost as error:
        return str(error)


def _caught(problem: hs.Problem, waits: bool) -> None:
    """One rank has had an exception alone, which its script has caught, and is at work again while the other waits."""
    if waits:
        time.sleep(0.5)
        problem.comm.any(False)
        return
    with suppress(OSError), problem.comm.watched():
        raise OSError("no file")
    with problem.comm.watched():
        time.sleep(2.5)
        problem.comm.any(False)


def alike(folder: Path) -> dict[str, Any]:
    """One rank cannot make what all have to: all say so, and what comes after is right."""
    problem = hs.data_parallel(_problem(), timeout=TIMEOUT)
    layer = hs.select(problem, "transformer.h.1.mlp.c_fc.weight")
    H, last = hs.hessian(problem, layer), dist.get_rank() == 1
    found: dict[str, Any] = {}
    with _seeing(1000 if last else 2**40):
        found["K-FAC"] = _complaint(lambda: hs.kfac(problem, layer))
    with _failing(kronecker_factors, "_eigenvectors", last):
        found["EKFAC"] = _complaint(lambda: hs.kfac(problem, layer, corrected=True).to_dense())
    for rank in range(2):
        with _failing(BatchColumns, "_make_graph", dist.get_rank() == rank):
            found[f"columns, rank {rank}"] = _complaint(lambda: hs.block(H))
    with _failing(FlopCounterMode, "get_total_flops", last):
        found["count"] = _complaint(lambda: hs.block(H))
    found["after"] = hs.block(hs.hessian(problem, hs.select(problem, "*ln_f*"))).matrix
    return found


def called_back(folder: Path) -> dict[str, Any]:
    """A callback's measurements: one fails on one rank, one on all, one on none, and one on one rank while the other waits for it."""
    first, group = dist.get_rank() == 0, dist.new_group()  # which the last leaves in disorder
    model, state = tiny("gpt2"), SimpleNamespace(global_step=0, epoch=0.5, log_history=[])
    own = hs.CurvatureCallback(
        lambda model: hs.data_parallel(_problem(model), group, timeout=TIMEOUT),
        every=1, params="*ln_f*", max_products=4, trace_probes=2,
    )  # fmt: skip
    own.on_train_begin(None, state, None, model=model)
    found: dict[str, Any] = {}
    for name, here in {"one": not first, "all": True, "none": False}.items():
        state.global_step += 1
        with warnings.catch_warnings(record=True) as caught, _failing(Hutchinson, "estimate", here, hs.HesscopeError):
            warnings.simplefilter("always")
            own.on_step_end(None, state, None, model=model)
        found[name] = [str(w.message) for w in caught if w.category is hs.HesscopeWarning]
    with _failing(Krylov, "step", not first):
        found["waits"] = _timed(lambda: own.on_step_end(None, state, None, model=model))
    return found | {"logged": [logged["step"] for logged in state.log_history]}


@contextmanager
def _failing(owner: Any, name: str, here: bool, kind: type[Exception] = torch.OutOfMemoryError) -> Iterator[None]:
    """Inside, a method or function finds no memory, here."""
    real = getattr(owner, name)

    def fail(*arguments: Any) -> Any:
        if here:
            raise kind("no memory")
        return real(*arguments)

    setattr(owner, name, fail)
    try:
        yield
    finally:
        setattr(owner, name, real)
