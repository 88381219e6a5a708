"""Weights, vectors and a Krylov basis divided among 1, 2 and 4 ranks by fully_shard: memory per rank, bytes moved, seconds.

    python benchmarks/sharded.py [--ranks 1 2 4] [--steps 10] [--diagonal | --plan]

A Llama of 29.5 million weights (width 512, 8 blocks, tied), 4 sequences of 64 tokens, all weights, float32, Lanczos with its basis.
Every rank is a fresh process with one thread. Memory is resident memory above what it was before the model: held at rest, with
the basis, and the peak of the run; then the peaks while its checkpoint is written, and while the basis, taken up from there, is
saved as a result, on rank 0, which writes, and on the others; loading is the peak until the weights are divided, on rank 0, which alone makes the whole
model, and on the other ranks. Bytes are those that a rank sends in gathers and sums, counted at each, and over the network interface
`lo` (Linux) of all ranks together; the least is, with R ranks and b sequences a rank at most,

    (R - 1) / R * (b * (2 weights + 2 vector + 1 sum of the blocks) + (weights + vector + sum) of the rest) * 4 bytes.

With --diagonal it is Hutchinson's estimate of the diagonal, a probe at a time, on vectors that are divided and, for comparison, on
vectors that each rank has whole: held is what there is between two probes, weights, means and squares; peak is that of the steps.

With --plan the Lanczos runs are held to what `hesscope.plan_cluster` says of them: memory in runs where every block of 64 kB and more
is a mapping of its own (MALLOC_MMAP_THRESHOLD_, glibc), so that resident memory is that of tensors, as on a GPU, without what a heap
keeps; bytes and seconds in ordinary ones. The plan's rate of operations is the one that a single rank reached, its bandwidth what a
gather of 64 MB then had among the ranks; more ranks than cores wait for one another, so that no seconds are planned for them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from measuring import peak_bytes, reset_peak, write_record

SEQUENCES, LENGTH = 4, 64
#: What is done with files.
FILES = ("written", "saved")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=10)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--diagonal", action="store_true")
    kinds.add_argument("--plan", action="store_true")
    parser.add_argument("--side", choices=("lanczos", "divided", "whole"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        lanczos = given.side == "lanczos"
        found = side(given.steps, given.folder) if lanczos else diagonal_side(given.steps, given.side == "whole")
        print(json.dumps(found))
        return
    if given.diagonal:
        diagonal(given.ranks, given.steps)
        return
    if given.plan:
        planned(given.ranks, given.steps)
        return
    figures = {}
    print(
        "ranks  loading GB: rank 0, others  sharded GB  held GB  peak GB  seconds a step  MB sent a product  of the least  on the wire, of the least"
    )
    for ranks in given.ranks:
        found = figures[str(ranks)] = together(ranks, given.steps, "lanczos")
        moved = [found[key] / found["least"] if found["least"] else 1.0 for key in ("moved", "wire")]
        print(
            f"{ranks:5}  {found['loading'] / 1e9:18.3f}  {found['loading others'] / 1e9:6.3f}  {found['sharded'] / 1e9:10.3f}  {found['held'] / 1e9:7.3f}  {found['peak'] / 1e9:7.3f}  "
            f"{found['seconds']:14.2f}  {found['moved'] / 1e6:17.1f}  {moved[0]:12.3f}  {moved[1]:25.3f}"
        )
        kept = (f"{what} {found[what] / 1e9:.3f}, {found[f'{what} others'] / 1e9:.3f}" for what in FILES)
        print(f"       peak GB, rank 0 and others: {'; '.join(kept)}")
    print(f"written to {write_record('sharded', {'ranks': figures}, ['hesscope', 'torch', 'transformers'])}")


def diagonal(ranks: list[int], steps: int) -> None:
    """The table of the diagonal."""
    figures: dict[str, Any] = {}
    print("ranks  vectors  sharded GB  held GB  peak GB  seconds a probe  MB sent a probe  sum of the diagonal")
    for count in ranks:
        for kind in ("divided", "whole"):
            found = figures.setdefault(str(count), {})[kind] = together(count, steps, kind)
            gigabytes = "  ".join(f"{found[key] / 1e9:8.3f}" for key in ("sharded", "held", "peak"))
            print(
                f"{count:5}  {kind:7}  {gigabytes}  {found['seconds']:15.2f}  {found['moved'] / 1e6:15.1f}  {found['sum']:.6g}"
            )
    print(f"written to {write_record('sharded_diagonal', {'ranks': figures}, ['hesscope', 'torch', 'transformers'])}")


def planned(ranks: list[int], steps: int) -> None:
    """The table of what was planned, and what was found."""
    import torch
    from hessian_product import make_model

    import hesscope as hs
    from hesscope.planning import skeleton_problem

    with torch.device("meta"):
        model = make_model(LENGTH)
    problem = skeleton_problem(model, LENGTH, 1, SEQUENCES)
    figures: dict[str, Any] = {}
    reached, cores = 0.0, os.cpu_count() or 1
    print("ranks  GB a rank: planned  found  ratio  MB sent: planned  found  seconds a product: planned  found  ratio")
    for count in [1, *(r for r in ranks if r > 1)]:
        found = together(count, steps, "lanczos")
        found["peak"] = together(count, steps, "lanczos", {"MALLOC_MMAP_THRESHOLD_": "65536"})["peak"]
        layout: dict[str, Any] = {"ranks": count, "layout": "fsdp" if count > 1 else "data", "batches": SEQUENCES}
        if not reached:
            one = hs.plan_cluster(problem, **layout, basis=steps)
            reached = one.rounds * one.shape.flops / found["seconds"]
        plan = hs.plan_cluster(problem, **layout, basis=steps, flops=reached, bandwidth=found["bandwidth"])
        seconds = plan.arithmetic_seconds + plan.sending_seconds if count <= cores else float("nan")
        said = {"bytes": plan.total, "sent": plan.sent, "seconds": seconds if count <= cores else None}
        figures[str(count)] = {
            "planned": said | {"memory": plan.memory, "operations a second": reached, "bandwidth": found["bandwidth"]},
            "found": {key: found[key] for key in ("peak", "moved", "seconds")},
        }
        print(
            f"{count:5}  {plan.total / 1e9:18.3f}  {found['peak'] / 1e9:5.3f}  {plan.total / found['peak']:5.2f}  {plan.sent / 1e6:16.1f}  "
            f"{found['moved'] / 1e6:5.1f}  {seconds:27.2f}  {found['seconds']:5.2f}  {seconds / found['seconds']:5.2f}"
        )
    print(f"written to {write_record('sharded_plan', {'ranks': figures}, ['hesscope', 'torch', 'transformers'])}")


def together(ranks: int, steps: int, kind: str, more: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """Run the ranks, with more in their environment; the largest memory of any, and what rank 0 says of the rest."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **more}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--side", kind, "--steps", str(steps), "--folder", folder]
        started = [
            subprocess.Popen(
                command, env=common | {"RANK": str(r), "WORLD_SIZE": str(ranks)}, stdout=subprocess.PIPE, text=True
            )
            for r in range(ranks)
        ]
        outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{ranks} ranks failed")
    found = [json.loads(output.strip().splitlines()[-1]) for output in outputs]
    result: dict[str, Any] = found[0] | {key: max(f[key] for f in found) for key in ("held", "peak", "moved")}
    rest = [key for key in ("loading", *FILES) if key in result]
    return result | {f"{key} others": max((f[key] for f in found[1:]), default=0) for key in rest}


def divided_problem() -> tuple[Any, int, int]:
    """The operator over all weights on this rank; memory before the model, and the peak until the weights were divided."""
    import torch
    import torch.distributed as dist
    from hessian_product import make_model
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaForCausalLM  # noqa: F401  # part of the library's own memory

    import hesscope as hs

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    hs.hessian(hs.supervised(torch.nn.Linear(2, 3), [(torch.ones(4, 2), torch.zeros(4).long())])) @ torch.ones(9)
    fully_shard(torch.nn.Linear(2, 3))
    before = reset_peak()
    with nullcontext() if dist.get_rank() == 0 else torch.device("meta"):
        model = make_model(LENGTH)
    tokens = torch.randint(0, 8192, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    hs.fully_shard_model(model)
    loading = peak_bytes() - before
    problem = hs.data_parallel(hs.causal_lm(model, tokens, batch_size=1))
    return hs.hessian(problem, engine="streamed"), before, loading


def diagonal_side(steps: int, whole: bool) -> dict[str, Any]:
    """One rank's part in a diagonal."""
    H, before, _ = divided_problem()
    import torch.distributed as dist

    from hesscope.algorithms.diagonals import Limits
    from hesscope.algorithms.diagonals.hutchinson import Hutchinson
    from hesscope.models import sharded

    store = sharded(H.problem.model)
    assert store is not None
    run = Hutchinson(H.undivided() if whole else H, Limits(steps, target=1e-9), 0)
    run.step()  # with the check
    dist.barrier()
    reset_peak()
    moved, began = store.exchange.moved_bytes, time.perf_counter()
    while not run.done:
        run.step()
    lasted = time.perf_counter() - began
    peak = peak_bytes() - before
    H.comm.any(False)
    held = reset_peak() - before
    moved = store.exchange.moved_bytes - moved
    n, of = H.space.size, H.space.whole if whole else H.space
    values = run.estimate().values
    total = float(of.total(lambda c: values[c.name].double().sum()))
    dist.barrier()
    H.comm.close()  # no heartbeat while the process ends
    return {
        "sharded": 3 * 4 * n / H.comm.ranks,  # weights, means and squares
        "held": held,
        "peak": peak,
        "seconds": lasted / (steps - 1),
        "moved": moved / (steps - 1),
        "sum": total,
    }


def side(steps: int, folder: Path) -> dict[str, Any]:
    """One rank."""
    H, before, loading = divided_problem()
    import torch
    import torch.distributed as dist

    from hesscope.algorithms.checkpoint import Checkpoint
    from hesscope.algorithms.driver import drive
    from hesscope.algorithms.krylov import Krylov
    from hesscope.algorithms.lanczos import LanczosIteration
    from hesscope.models import sharded
    from hesscope.results import LanczosRun

    problem, n = H.problem, H.space.size
    blocks = sum(c.whole.size for c in H.space.coordinates if ".layers." in c.name)
    store = sharded(problem.model)
    assert store is not None
    run = Krylov(H, H.space.gaussian(0, ["start"]), 0, restart=False, capacity=steps)
    run.step()  # with the check
    dist.barrier()
    reset_peak()
    moved, wire, began = store.exchange.moved_bytes, _wire(), time.perf_counter()
    for _ in range(steps - 1):
        run.step()
    lasted, wired = time.perf_counter() - began, _wire() - wire
    peak = peak_bytes() - before
    problem.comm.any(False)
    held = reset_peak() - before
    ranks, rounds = problem.comm.ranks, -(-SEQUENCES // problem.comm.ranks)
    problem.comm.any(False)
    moved, ritz = store.exchange.moved_bytes - moved, run.ritz()[0]

    def peak_of(work: Callable[[], Any]) -> int:
        reset_peak()
        work()
        reached = peak_bytes() - before
        problem.comm.any(False)
        return reached

    bandwidth = _bandwidth(ranks)
    kept = Checkpoint(folder / "kept", keep_finished=True)
    files = {"written": peak_of(partial(drive, H, LanczosIteration(run, steps, "lanczos"), {}, kept))}
    del run
    gc.collect()
    again = Krylov(H, H.space.gaussian(0, ["start"]), 0, restart=False, capacity=steps)
    spent = drive(H, LanczosIteration(again, steps, "lanczos"), {}, Checkpoint(folder / "kept"))
    assert spent["provenance"]["resumed"] == 1
    nodes, weights = again.quadrature()
    result = LanczosRun(**spent, T=again.T, nodes=nodes, weights=weights, residual_norm=again.residual_norm,
                        basis_vectors=H.space.kept(again.basis, gather=False), seed=0)  # fmt: skip
    files["saved"] = peak_of(partial(result.save, folder / "saved"))
    assert torch.equal(nodes, ritz)
    return files | {
        "coordinates": n,
        "sharded": 4 * (n + steps * n) / ranks,  # weights and basis
        "loading": loading,
        "held": held,
        "peak": peak,
        "seconds": lasted / (steps - 1),
        "moved": moved / (steps - 1),
        "wire": wired / (steps - 1) / ranks,
        "bandwidth": bandwidth,
        "least": 4 * (ranks - 1) / ranks * (rounds * 5 * blocks + 3 * (n - blocks)),
        "ritz": ritz.tolist(),
    }


def _bandwidth(ranks: int) -> float:
    """Bytes a second that a rank sends in a gather; infinite where there is nobody to send to."""
    import torch
    import torch.distributed as dist

    if ranks == 1:
        return float("inf")
    part, whole, times = torch.ones(2**24 // ranks), torch.empty(2**24 // ranks * ranks), []
    for _ in range(4):
        dist.barrier()
        began = time.perf_counter()
        dist.all_gather(list(whole.chunk(ranks)), part)
        times.append(time.perf_counter() - began)
    return (ranks - 1) * part.nbytes / sorted(times[1:])[1]


def _wire() -> int:
    """Bytes sent over the loopback interface since the machine started."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


if __name__ == "__main__":
    main()
