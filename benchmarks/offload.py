"""A model that rests on disk against the same model in memory: a Hessian product of its query projections; and Lanczos steps over
all its weights with vectors and basis on disk against the same in memory.

    python benchmarks/offload.py

A random Llama of 200 million weights (width 1024, 16 blocks, vocabulary 8192), one sequence of 128 tokens, float32, all 16
query projections, engine="streamed", one thread; then three Lanczos steps over all weights, which rest on disk on both sides. Every side is a process of its own. Memory is what is resident at most beyond what the
process holds before it loads the model, and so has the weights in it where these are in memory; pages of files that the system may drop at any
time are not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from measuring import in_fresh_process, median, seconds, write_record

SIDES = ("in memory", "on disk")
LANCZOS = ("vectors in memory", "vectors on disk")
STEPS = 3
BLOCKS, WIDTH = 16, 1024


def save_model(folder: str, small: bool) -> int:
    """Write the model; returns its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width, blocks = (64, 2) if small else (WIDTH, BLOCKS)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=blocks, num_attention_heads=8
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


class Watch(threading.Thread):
    """The most anonymous memory that this process has at any time, in bytes, looked at every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._on = 0, True

    def run(self) -> None:
        while self._on:
            self.most = max(self.most, anonymous_bytes())
            time.sleep(0.004)

    def stop(self) -> int:
        self._on = False
        self.join()
        return self.most


def anonymous_bytes() -> int:
    """Resident memory that is no page of a file (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no RssAnon in /proc/self/status; these memory figures need Linux")


def run(side: str, folder: str) -> dict[str, Any]:
    """Load, and take six products; the last five are timed."""
    from transformers import AutoModelForCausalLM

    import hesscope as hs

    torch.set_num_threads(1)
    hs.trace(hs.operator(torch.eye(2)), budget=2)  # imports
    before, watch = anonymous_bytes(), Watch()
    watch.start()
    options: dict[str, Any] = (
        {} if side == "in memory" else {"device_map": {"": "disk"}, "offload_folder": folder + "/offload"}
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if side == "in memory":
        for p in model.parameters():
            p.data = p.data.clone()  # off the file that transformers has mapped
    tokens = torch.randint(0, 8192, (1, 128), generator=torch.Generator().manual_seed(1))
    if side in LANCZOS:
        return lanczos(model, tokens, folder if side == LANCZOS[1] else None, before, watch)
    problem = hs.causal_lm(model, tokens)
    H = hs.hessian(problem, hs.select(problem, "*.q_proj.weight"), engine="streamed")
    v = H.space.gaussian(0, ["v"])
    first = H.matmat(v)
    times = seconds(lambda: H.matmat(v), 5)
    return {"seconds": median(times), "peak": watch.stop() - before, "norm": float(H.space.norms(first)[0])}


def lanczos(model: Any, tokens: torch.Tensor, folder: str | None, before: int, watch: Watch) -> dict[str, Any]:
    """Steps over all weights, with vectors and basis in a folder or in memory."""
    import hesscope as hs

    H = hs.hessian(hs.causal_lm(model, tokens, vectors=folder or "device"))
    began = time.perf_counter()
    found = hs.lanczos(H, STEPS, basis_folder=folder)
    spent = time.perf_counter() - began
    vector = H.space.size * H.dtype.itemsize
    return {"seconds": spent, "peak": watch.stop() - before, "norm": float(found.T.norm()), "vector_bytes": vector}


def main() -> None:
    """Run both sides, print and write results/offload.json (not for --small)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES + LANCZOS, help="run one side in this process and print its figures")
    parser.add_argument("--folder", help="where the model is")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run(arguments.side, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = save_model(folder, arguments.small)
        found = {side: in_fresh_process(__file__, "--side", side, "--folder", folder) for side in SIDES + LANCZOS}
    print(f"model {size / 1e9:.2f} GB")
    print(f"{'':12s}{'seconds':>9s}{'peak GB':>9s}{'of the model':>14s}")
    for side, figures in found.items():
        print(f"{side:12s}{figures['seconds']:9.2f}{figures['peak'] / 1e9:9.2f}{figures['peak'] / size:14.2f}")
    gap = abs(found["in memory"]["norm"] / found["on disk"]["norm"] - 1)
    ratio = found["on disk"]["peak"] / found["in memory"]["peak"]
    print(f"on disk: {ratio:.2f} of the memory; relative difference of |Hv|: {gap:.1e}")
    memory, disk = (found[side] for side in LANCZOS)
    print(
        f"{STEPS} Lanczos steps, vectors of {memory['vector_bytes'] / 1e9:.2f} GB: on disk {disk['peak'] / memory['peak']:.2f} of the "
        f"memory; relative difference of |T|: {abs(memory['norm'] / disk['norm'] - 1):.1e}"
    )
    if not arguments.small:
        record = {"model_bytes": size, "sides": found, "memory_ratio": ratio}
        print(f"written to {write_record('offload', record, ['hesscope', 'torch', 'transformers', 'accelerate'])}")


if __name__ == "__main__":
    main()
