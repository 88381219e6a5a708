"""Two ranks on two cores against one process with two threads: seconds a product, and the bytes that a product moves.

    python benchmarks/data_parallel.py [--products 20]

Every side runs in fresh processes. Bytes are counted at the network interface `lo` (Linux), of nothing else than the ranks' own
products, less what as long a pause moves; the least is what a ring all-reduce of one vector moves, 2 (R - 1) bytes a byte of it
over all R ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring import median, write_record

SIZES = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
SEQUENCES, LENGTH = 8, 128


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--products", type=int, default=20)
    parser.add_argument("--side", choices=("ranks", "threads"))
    given = parser.parse_args()
    if given.side:
        print(json.dumps(side(given.side, given.products)))
        return
    ranks, threads = both("ranks", 2, 1, given.products), both("threads", 1, 2, given.products)
    moved, least = ranks["bytes_a_product"], 2 * (2 - 1) * ranks["vector_bytes"]
    figures = {"ranks": ranks, "threads": threads}
    figures |= {"ratio": ranks["seconds"] / threads["seconds"], "bytes_over_least": moved / least}
    print(
        f"two ranks {ranks['seconds']:.3f} s a product, two threads {threads['seconds']:.3f} s: {figures['ratio']:.2f}"
    )
    print(f"{moved / 1e6:.2f} MB on the wire a product, {figures['bytes_over_least']:.3f} of the least")
    print(f"written to {write_record('data_parallel', figures, ['hesscope', 'torch', 'transformers'])}")


def both(name: str, ranks: int, threads: int, products: int) -> dict[str, Any]:
    """Run one side's processes together; what rank 0 prints last."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": str(threads), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--side", name, "--products", str(products)]
    started = [
        subprocess.Popen(
            command, env=common | {"RANK": str(r), "WORLD_SIZE": str(ranks)}, stdout=subprocess.PIPE, text=True
        )
        for r in range(ranks)
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{name} failed")
    found: dict[str, Any] = json.loads(outputs[0].strip().splitlines()[-1])
    return found


def side(name: str, products: int) -> dict[str, Any]:
    """One rank's seconds a product on kept graphs, and what went over the wire meanwhile."""
    import torch
    import torch.distributed as dist
    from transformers import LlamaConfig, LlamaForCausalLM

    import hesscope as hs

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=LENGTH)).eval()
    problem = hs.causal_lm(model, torch.randint(SIZES["vocab_size"], (SEQUENCES, LENGTH)), batch_size=1)
    if name == "ranks":
        dist.init_process_group("gloo")
        problem = hs.data_parallel(problem)
    H = hs.hessian(problem, graph_memory=4 * 2**30)
    v = H.space.gaussian(0, [0])
    for _ in range(3):
        H.matmat(v)
    times, before = [], _wire()
    began = time.perf_counter()
    for _ in range(products):
        start = time.perf_counter()
        H.matmat(v)
        times.append(time.perf_counter() - start)
    after, lasted = _wire(), time.perf_counter() - began
    problem.comm.any(False)
    quiet = _wire()
    time.sleep(lasted)
    idle = _wire() - quiet
    problem.comm.any(False)
    return {
        "seconds": median(times),
        "times": times,
        "coordinates": H.shape[0],
        "vector_bytes": H.shape[0] * H.dtype.itemsize,
        "bytes_a_product": (after - before - idle) / products,
        "idle_bytes": idle,
    }


def _wire() -> int:
    """Bytes sent over the loopback interface since the machine started."""
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


if __name__ == "__main__":
    main()
