"""The Hessian product of a 30M-parameter Llama: hesscope, hessian-eigenthings and the plain gradient.

    python benchmarks/hessian_product.py

One batch of 4 sequences of 256 random tokens, float32, the mathematical form of SDPA on every side, so that the ratios
compare products and not attention kernels. Each side runs in fresh processes, in turns with the others.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from measuring import in_turns, median, peak_bytes, reset_peak, seconds, write_record
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SIDES = ("gradient", "hessian-eigenthings", "hesscope", "hesscope, nothing kept")


def make_model(length: int = 256, vocabulary: int = 8192) -> nn.Module:
    """Width 512, 8 blocks, tied: 29.5 million parameters with a vocabulary of 8192."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def make_inputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Tokens [4, 256], and a direction over all parameters."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 8192, (4, 256), generator=generator)
    return tokens, torch.randn(sum(p.numel() for p in model.parameters()), generator=generator)


def mean_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The same loss for the sides that are not hesscope."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def run_gradient(repeats: int) -> dict[str, Any]:
    """A gradient, forward and backward."""
    model = make_model()
    tokens, _ = make_inputs(model)
    resident = reset_peak()
    with sdpa_kernel(SDPBackend.MATH):
        times = seconds(lambda: torch.autograd.grad(mean_loss(model, tokens), list(model.parameters())), repeats)
    return {"seconds": times, "peak": peak_bytes() - resident}


def run_eigenthings(repeats: int) -> dict[str, Any]:
    """hessian-eigenthings' exact product."""
    from hessian_eigenthings.operators import HessianOperator

    model = make_model()
    tokens, v = make_inputs(model)
    operator = HessianOperator(model, [tokens], mean_loss)
    resident = reset_peak()
    with sdpa_kernel(SDPBackend.MATH):
        products: list[Tensor] = []
        times = seconds(lambda: (products.clear(), products.append(operator.matvec(v))), repeats)
    return {"seconds": times, "peak": peak_bytes() - resident, "form": float(v @ products[-1])}


def run_hesscope(repeats: int, graph_memory: int | None) -> dict[str, Any]:
    """The first product of an operator, and further ones."""
    import hesscope as hs

    model = make_model()
    tokens, v = make_inputs(model)
    problem = hs.causal_lm(model, tokens, batch_size=4)
    H = hs.hessian(problem, graph_memory=graph_memory)
    resident = reset_peak()
    first, further, products = [], [], []
    for _ in range(repeats):
        H.release()  # type: ignore[attr-defined]
        first += seconds(lambda: (products.clear(), products.append(H @ v)), 1)
        if graph_memory is None:
            further += seconds(lambda: H @ v, 2)
    figures = {"seconds": first, "peak": peak_bytes() - resident, "form": float(v @ products[-1])}
    return {**figures, "further": further} if further else figures


def run_side(side: str, repeats: int) -> dict[str, Any]:
    """One side, in this process."""
    if side == "gradient":
        return run_gradient(repeats)
    if side == "hessian-eigenthings":
        return run_eigenthings(repeats)
    return run_hesscope(repeats, None if side == "hesscope" else 0)


def report(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Print the table and the ratios."""
    gradient, theirs = found["gradient"], found["hessian-eigenthings"]
    unit = median(gradient["seconds"])
    print(f"{'':34s}{'seconds':>9s}{'gradients':>11s}{'peak GB':>9s}{'of theirs':>11s}")
    ratios: dict[str, float] = {}
    for side, figures in found.items():
        rows = [(side if "further" not in figures else f"{side}, first product", figures["seconds"])]
        rows += [(f"{side}, each further product", figures["further"])] if "further" in figures else []
        for name, times in rows:
            ratios[f"{name}: time over gradient"] = median(times) / unit
            ratios[f"{name}: memory over hessian-eigenthings"] = figures["peak"] / theirs["peak"]
            print(
                f"{name:34s}{median(times):9.2f}{median(times) / unit:11.2f}{figures['peak'] / 1e9:9.2f}"
                f"{figures['peak'] / theirs['peak']:11.2f}"
            )
    gap = abs(found["hesscope"]["form"] - theirs["form"]) / abs(theirs["form"])
    print(f"relative difference of <v, Hv> between hesscope and hessian-eigenthings: {gap:.1e}")
    return {**ratios, "relative difference of <v, Hv>": gap}


def main() -> None:
    """Run every side in fresh processes, print, and write results/hessian_product.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES, help="run one side in this process and print its figures as JSON")
    parser.add_argument("--repeats", type=int, default=4, help="of a side in one process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of a side, in turns with the others")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments.side, arguments.repeats)))
        return
    found = in_turns(__file__, SIDES, arguments.repeats, arguments.rounds)
    packages = ["hesscope", "torch", "transformers", "hessian-eigenthings"]
    path = write_record("hessian_product", {"sides": found, "ratios": report(found)}, packages)
    print(f"written to {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
