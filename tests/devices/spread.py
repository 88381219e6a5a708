"""Run as a script: everything of `program`, or a few things, on a model that accelerate has spread over devices, and on the CPU.

Prints {what: relative difference or error} as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import dispatch_model
from torch import nn

import hesscope as hs
from architectures import ragged_batches, tiny
from devices.elsewhere import another_device
from devices.program import RUNS, difference, leave_out, product

#: Where the embeddings, the first block, the second, the last normalisation and the output projection are. Weights that rest on
#: the CPU come to the device of the embeddings; where that is the CPU, it computes.
LAYOUTS = {
    "two devices": ("elsewhere:0", "elsewhere:0", "elsewhere:1", "elsewhere:1", "elsewhere:0"),
    "two devices and the CPU": ("elsewhere:0", "elsewhere:1", "cpu", "elsewhere:1", "elsewhere:0"),
    "head elsewhere": ("elsewhere:1", "elsewhere:0", "elsewhere:1", "elsewhere:0", "elsewhere:0"),
    "CPU computes too": ("cpu", "elsewhere:1", "cpu", "elsewhere:1", "cpu"),
}
PLACES: dict[str, tuple[tuple[str, ...], ...]] = {
    "gpt2": (
        ("transformer.wte", "transformer.wpe"), ("transformer.h.0",), ("transformer.h.1",), ("transformer.ln_f",), ("lm_head",)
    ),
    "llama": (
        ("model.embed_tokens", "model.rotary_emb"), ("model.layers.0",), ("model.layers.1",), ("model.norm",), ("lm_head",)
    ),
}  # fmt: skip
#: A box in each of two blocks, and what lies in one of them.
PARTS: dict[str, dict[str, Any]] = {
    "gpt2": {f"transformer.h.{i}.attn.c_proj.weight": (slice(i, i + 3), slice(2 * i, 3 + 2 * i)) for i in range(2)},
    "llama": {
        f"model.layers.{i}.self_attn.v_proj.weight": (slice(i, i + 3), slice(2 * i, 3 + 2 * i)) for i in range(2)
    },
}
#: What needs float32 weights to say anything.
FOR_FLOAT32 = ("float32", "bfloat16", "product error")
FEW = (
    *("reverse-over-reverse", "streamed", "finite-difference", "ggn", "ggn, streamed", "fisher", "kfac", "ekfac"),
    *("block, positions", "eigs", "groups", "diagonal, per-sequence", "diagonal, sampled", "verify"),
)
#: By one engine on both sides: in bfloat16 another one's order of operations is another rounding.
SPREAD = RUNS | {"bfloat16": product(hs.hessian, precision="bfloat16", engine="streamed")}


def spread(model: nn.Module, name: str, layout: str) -> nn.Module:
    """The model, each part of it where the layout has it, with accelerate's hooks."""
    where = {part: d for parts, d in zip(PLACES[name], LAYOUTS[layout], strict=True) for part in parts}
    dispatched: nn.Module = dispatch_model(model, where, main_device=LAYOUTS[layout][0])
    return dispatched


def pair(name: str, layout: str, dtype: torch.dtype) -> tuple[hs.Problem, hs.Problem]:
    """The problem on the spread model, and on one that is not."""
    more = {"tie_word_embeddings": LAYOUTS[layout][0] == LAYOUTS[layout][-1]}
    here, cpu = (tiny(name, dtype, **more) for _ in range(2))
    return hs.causal_lm(spread(here, name, layout), ragged_batches()), hs.causal_lm(cpu, ragged_batches())


def beside(problem: hs.Problem) -> float:
    """How many parts of a product are not on the device of their parameter, or of its values where these rest elsewhere."""
    H = hs.hessian(problem)
    V = H.matmat(H.space.rademacher(0, [0]))
    named = dict(problem.model.named_parameters())
    return float(sum(V[name].device != (torch.device("cpu") if p.is_meta else p.device) for name, p in named.items()))


def torn(name: str) -> float | str:
    """What is said of tied weights on two devices, where it is not what is to be done."""
    model, parts = tiny(name, tie_word_embeddings=True), [part for parts in PLACES[name] for part in parts]
    dispatch_model(model, {part: f"elsewhere:{int(part == 'lm_head')}" for part in parts}, main_device="elsewhere:0")
    try:
        return hs.causal_lm(model, ragged_batches()).risk()
    except hs.HesscopeError as error:
        return 0.0 if "give them the same one in device_map=" in str(error) else str(error)


def main(name: str, layout: str, few: bool) -> None:
    """Compare on one model."""
    leave_out()
    found: dict[str, float | str] = {}
    with another_device():
        found["tied weights on two devices"] = torn(name)
        for dtype in (torch.float64, torch.float32):
            here, cpu = pair(name, layout, dtype)
            assert set(here.devices) == {
                torch.device("elsewhere:0" if d == "cpu" and LAYOUTS[layout][0] != "cpu" else d)
                for d in LAYOUTS[layout]
            }
            before = {name: (id(p), p.dtype, p.device) for name, p in here.model.named_parameters()}
            for what in FEW if few else SPREAD:
                if (what in FOR_FLOAT32) == (dtype == torch.float32):
                    found[what] = difference(SPREAD[what], here, cpu, PARTS[name])
            found[f"parts of a product elsewhere, {dtype}"] = beside(here)
            after = {name: (id(p), p.dtype, p.device) for name, p in here.model.named_parameters()}
            found[f"weights that changed, {dtype}"] = float(sum(after[name] != before[name] for name in before))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], few="few" in sys.argv)
