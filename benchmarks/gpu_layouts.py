"""Layouts over several devices: one Hessian product of a random Llama, a batch a rank; started by gpu.py under torchrun.

    torchrun --standalone --nproc-per-node 8 benchmarks/gpu_layouts.py --model 1B --layout fsdp

Rank 0 prints JSON: seconds a product, and the largest peak of a rank beyond its share of the model. Layout "one" is a single process
with the same batches, to divide by.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import torch
import torch.distributed as dist
from measuring import median, peak_bytes, reset_peak, seconds

from gpu import SIZES, SMALL, make_model

LAYOUTS = ("one", "data", "fsdp", "hsdp")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of this rank."""
    import hesscope as hs
    from hesscope.parallel import mesh_of

    ranks, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = f"cuda:{local}" if arguments.device == "cuda" else arguments.device
    if arguments.device == "cuda":
        torch.cuda.set_device(local)
    if arguments.layout != "one":
        dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    size = (SMALL if arguments.small else SIZES)[arguments.model]
    rows, length = arguments.batch
    model = make_model(size, length, "float32", device)
    tokens = torch.randint(
        0, size.vocabulary, (rows * arguments.batches, length), generator=torch.Generator().manual_seed(1)
    )
    if arguments.layout in ("fsdp", "hsdp"):
        hs.fully_shard_model(
            model, mesh_of(arguments.layout, arguments.device, ranks, 2 if arguments.layout == "hsdp" else 1)
        )
    problem = hs.causal_lm(model, tokens, batch_size=rows)
    if arguments.layout != "one":
        problem = hs.data_parallel(problem)
    H = hs.hessian(problem, hs.select(problem, *([] if size.params is None else [size.params])), engine="streamed")
    v = H.space.rademacher(0, [0])
    held = reset_peak(device)
    first = seconds(lambda: H.matmat(v), 1, device)
    further = seconds(lambda: H.matmat(v), 1 if arguments.small else 3, device)
    peak, form = peak_bytes(device) - held, float(H.space.inner(v, H.matmat(v)))
    if arguments.layout != "one":
        most = torch.tensor([float(peak)], device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        peak = int(most)
    return {"first": median(first), "further": median(further), "peak": peak, "form": form}


def main() -> None:
    """Measure; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(SIZES), required=True)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--batch", type=int, nargs=2, default=(1, 1024))
    parser.add_argument("--batches", type=int, required=True, help="how many, the same for every layout")
    found = measure(parser.parse_args())
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
