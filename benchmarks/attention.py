"""Memory, time and arithmetic of one exact Hessian product by length: attention in tiles against SDPA's mathematical form.

    python benchmarks/attention.py
    python benchmarks/attention.py --engine streamed

A Llama of 4 blocks of width 256 with 8 heads and grouped keys, one sequence of random tokens, float32, all parameters, nothing
kept between products. Each attention at each length runs in a fresh process; peaks are resident memory above that of the
loaded model, seconds those of the processor.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from typing import Any

import torch
from measuring import in_fresh_process, median, peak_bytes, reset_peak, write_record
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

SIDES = ("sdpa", "tiled")
VOCABULARY = 512


class Arithmetic(TorchDispatchMode):
    """Counts the floating-point operations of matrix products."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.total += 0 if count is None else int(count(*args, **(kwargs or {}), out_val=out))
        return out


def make_model(length: int) -> nn.Module:
    """Few parameters and a small vocabulary, so that attention is what the figures show."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def run_side(side: str, length: int, engine: str, repeats: int) -> dict[str, Any]:
    """One attention at one length, in this process."""
    import hesscope as hs

    model = make_model(length)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (1, length), generator=generator)
    v = torch.randn(sum(p.numel() for p in model.parameters()), generator=generator)
    H = hs.hessian(hs.causal_lm(model, tokens, attention=side), engine=engine, graph_memory=0)
    resident = reset_peak()
    times, product = [], v
    for _ in range(repeats):
        began = time.process_time()
        product = H @ v
        times.append(time.process_time() - began)
    peak = peak_bytes() - resident
    with Arithmetic() as counter:
        H @ v
    form = float(v.double() @ product.double())
    return {"seconds": times, "peak": peak, "flops": counter.total, "form": form}


def report(found: dict[int, dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Print the table; returns the ratios."""
    print(f"{'length':>7s}{'attention':>11s}{'seconds':>9s}{'peak MB':>9s}{'GFLOP':>8s}")
    ratios: dict[str, float] = {}
    for length, sides in found.items():
        for side, figures in sides.items():
            print(
                f"{length:7d}{side:>11s}{median(figures['seconds']):9.2f}{figures['peak'] / 1e6:9.0f}{figures['flops'] / 1e9:8.1f}"
            )
        usual, tiled = (sides[side] for side in SIDES)
        ratios[f"{length}: memory of tiles over sdpa"] = tiled["peak"] / usual["peak"]
        ratios[f"{length}: seconds of tiles over sdpa"] = median(tiled["seconds"]) / median(usual["seconds"])
        ratios[f"{length}: arithmetic of tiles over sdpa"] = tiled["flops"] / usual["flops"]
        ratios[f"{length}: relative difference of <v, Hv>"] = abs(tiled["form"] / usual["form"] - 1)
    for shorter, longer in pairwise(found):
        for side in SIDES:
            growth = found[longer][side]["peak"] / found[shorter][side]["peak"]
            ratios[f"{side}: growth of memory from {shorter} to {longer}"] = growth
    for name, ratio in ratios.items():
        print(f"{name:50s}{ratio:10.2g}")
    return ratios


def main() -> None:
    """Run every attention at every length in a fresh process, print, and write results/attention_ENGINE.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES, help="run one side in this process and print its figures")
    parser.add_argument("--length", type=int, action="append", help="may be repeated; 1024, 2048 and 4096 by default")
    parser.add_argument("--engine", default="reverse-over-reverse")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    lengths = arguments.length or [1024, 2048, 4096]
    if arguments.side:
        print(json.dumps(run_side(arguments.side, lengths[0], arguments.engine, arguments.repeats)))
        return
    options = ("--engine", arguments.engine, "--repeats", str(arguments.repeats))
    found = {
        length: {s: in_fresh_process(__file__, "--side", s, "--length", str(length), *options) for s in SIDES}
        for length in lengths
    }
    figures = {"lengths": found, "ratios": report(found)}
    path = write_record(f"attention_{arguments.engine}", figures, ["hesscope", "torch", "transformers"])
    print(f"written to {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
