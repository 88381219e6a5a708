"""Exact Hessian blocks: hesscope against `torch.autograd.functional.hessian` on the same loss of the same weights.

    python benchmarks/block.py --stories path/to/a/small/model --text path/to/text.jsonl

An OPT-125M-shaped random model (width 768, 12 blocks, vocabulary 50272) on 2 sequences of 128 random tokens, and, where it is
given, a trained model of 260 thousand weights (width 64, 5 blocks) on 8 sequences of 128 tokens of real text. The other side
puts the chosen entries into the weight and calls `functional.hessian`; its cost is proportional to the columns, so that at most 64
of them are run and scaled. Both sides use the mathematical form of SDPA, float32, and a fresh process each.

Beside the seconds stand forward passes a column: measured, as counted by multiplications, and the least possible, which is one
forward and one backward pass through what follows the layer.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, in_fresh_process, median, peak_bytes, reset_peak, seconds, write_record
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

_OPT = "model.decoder.layers.{}.{}.weight"
_LLAMA = "model.layers.{}.self_attn.q_proj.weight"
_SEVERAL = [(b, layer) for b in (0, 4, 8) for layer in ("self_attn.q_proj", "self_attn.v_proj", "fc1", "fc2")]
_THEIR_COLUMNS = 64


@dataclass(frozen=True)
class Case:
    """Entries 0..count-1 of each parameter of one model."""

    model: str
    entries: dict[str, int]


CASES = {
    "64 entries of a row, block 0": Case("opt", {_OPT.format(0, "self_attn.q_proj"): 64}),
    "64 entries of a row, block 8": Case("opt", {_OPT.format(8, "self_attn.q_proj"): 64}),
    "a row of 768, block 0": Case("opt", {_OPT.format(0, "self_attn.q_proj"): 768}),
    "four layers of three blocks, 6 each": Case("opt", {_OPT.format(b, layer): 6 for b, layer in _SEVERAL}),
    "whole q_proj (4096), first block": Case("stories", {_LLAMA.format(0): 4096}),
    "whole q_proj (4096), last block": Case("stories", {_LLAMA.format(4): 4096}),
}


def load(case: Case, stories: str, text: str) -> tuple[nn.Module, Tensor]:
    """The case's model and its tokens [sequences, 128]."""
    if case.model == "opt":
        from transformers import OPTConfig, OPTForCausalLM

        torch.manual_seed(0)
        return OPTForCausalLM(OPTConfig()).eval(), torch.randint(0, 50272, (2, 128))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = [json.loads(line)["text"] for line in Path(text).read_text(encoding="utf-8").splitlines()[:20]]
    ids = AutoTokenizer.from_pretrained(stories)("\n\n".join(texts), return_tensors="pt")["input_ids"][0]
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    return model, ids[: 8 * 128].view(8, 128)


def mean_loss(model: nn.Module, tokens: Tensor, replaced: dict[str, Tensor]) -> Tensor:
    """The same loss for the side that is not hesscope."""
    keywords = {"input_ids": tokens, "use_cache": False}
    logits = torch.func.functional_call(model, replaced, args=(), kwargs=keywords).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def run_theirs(case: Case, model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """`functional.hessian` in a vector of entries that is written into the weights."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    # In the model's order, which is that of hesscope's selections.
    entries = {name: min(case.entries[name], _THEIR_COLUMNS) for name in weights if name in case.entries}
    start = torch.cat([weights[name].view(-1)[:count] for name, count in entries.items()])

    def loss(t: Tensor) -> Tensor:
        replaced = dict(weights)
        for name, part in zip(entries, t.split(list(entries.values())), strict=True):
            w = weights[name].view(-1)
            replaced[name] = torch.cat([part, w[len(part) :]]).view_as(weights[name])
        return mean_loss(model, tokens, replaced)

    resident, began = reset_peak(), time.perf_counter()
    with sdpa_kernel(SDPBackend.MATH):
        matrix = torch.autograd.functional.hessian(loss, start)
    spent = time.perf_counter() - began
    assert isinstance(matrix, Tensor)
    return {"seconds": spent, "columns": len(start), "peak": peak_bytes() - resident, "matrix": matrix.tolist()}


def run_ours(case: Case, model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """`hs.block`, all of it: planning and building the graph included."""
    import hesscope as hs

    problem = hs.causal_lm(model, tokens, batch_size=len(tokens))
    space = hs.select(problem, {name: torch.arange(count) for name, count in case.entries.items()})
    resident, began = reset_peak(), time.perf_counter()
    block = hs.block(hs.hessian(problem, space))
    spent = time.perf_counter() - began
    return {
        "seconds": spent,
        "columns": space.size,
        "products": block.products,
        "peak": peak_bytes() - resident,
        "asymmetry": block.asymmetry,
        "route": block.provenance["matrix"],
        "matrix": block.matrix[:_THEIR_COLUMNS, :_THEIR_COLUMNS].tolist(),
        "plan": block.provenance["matrix"]["planned_bytes"] + 3 * block.matrix.nbytes,
    }


def run_forward(case: Case, model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """A forward pass: its seconds, and the share of its multiplications that follows the first selected layer."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        times = seconds(lambda: mean_loss(model, tokens, {}), 5)
        whole = _multiplications(model, tokens)
        first = min(_block_number(name) for name in case.entries)
        trunk = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 3)
        with FlopCounterMode(display=False) as head:
            model.get_output_embeddings()(torch.zeros(*tokens.shape, trunk[0].parameters().__next__().shape[-1]))
    after = (whole - head.get_total_flops()) * (len(trunk) - first) / len(trunk) + head.get_total_flops()
    return {"seconds": median(times), "least": 2 * after / whole}


def _multiplications(model: nn.Module, tokens: Tensor) -> int:
    with FlopCounterMode(display=False) as counted:
        mean_loss(model, tokens, {})
    return int(counted.get_total_flops())


def _block_number(name: str) -> int:
    return int(next(part for part in name.split(".") if part.isdigit()))


SIDES = {"forward": run_forward, "functional.hessian": run_theirs, "hesscope": run_ours}


def report(name: str, found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Print one case's lines; the ratio compares the time of all of its columns."""
    forward, theirs, ours = (found[side] for side in SIDES)
    columns = ours["columns"]
    scaled = theirs["seconds"] / theirs["columns"] * columns
    counted = ours["route"].get("forward_passes_a_product", {})
    A, B = (torch.tensor(side.pop("matrix"), dtype=torch.float64) for side in (ours, theirs))
    k = min(len(A), len(B))
    gap = float((A[:k, :k] - B[:k, :k]).norm() / B[:k, :k].norm())
    figures = {
        "their seconds": scaled,
        "our seconds": ours["seconds"],
        "ratio": scaled / ours["seconds"],
        "their forward passes a column": scaled / columns / forward["seconds"],
        "our forward passes a column": ours["seconds"] / columns / forward["seconds"],
        "our forward passes a product, counted": max(counted.values(), default=0.0),
        "least forward passes a column through weights": forward["least"],
        "peak over plan": ours["peak"] / ours["plan"],
        "relative difference": gap,
    }
    print(f"{name}: {columns} columns, {ours['products']} products")
    for key, value in figures.items():
        print(f"    {key:48s}{value:12.4g}")
    return figures


def main() -> None:
    """Run every side of every case in a fresh process, print, and write results/block.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--case", choices=CASES, action="append", help="only these cases; all by default")
    parser.add_argument(
        "--stories", default="", help="folder of the small trained model; without it its cases are left out"
    )
    parser.add_argument("--text", default="", help="its text, a .jsonl file")
    arguments = parser.parse_args()
    if arguments.side:
        case = CASES[arguments.case[0]]
        print(json.dumps(SIDES[arguments.side](case, *load(case, arguments.stories, arguments.text))))
        return
    results = {}
    for name in arguments.case or [n for n, c in CASES.items() if c.model == "opt" or arguments.stories]:
        given = ["--case", name, "--stories", arguments.stories, "--text", arguments.text]
        found = {side: in_fresh_process(__file__, "--side", side, *given) for side in SIDES}
        results[name] = {"figures": report(name, found), "sides": found}
    earlier = RESULTS / "block.json"
    if arguments.case and earlier.exists():  # other cases keep their figures
        results = json.loads(earlier.read_text(encoding="utf-8"))["cases"] | results
    path = write_record("block", {"cases": results}, ["hesscope", "torch", "transformers"])
    print(f"written to {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
