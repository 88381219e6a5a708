"""The exact GGN product of a 30M-parameter Llama: hesscope, hessian-eigenthings and the plain gradient.

    python benchmarks/ggn_product.py

One batch of 4 sequences of 256 random tokens, float32, the mathematical form of SDPA on every side, so that the ratios
compare products and not attention kernels. Each side runs in a fresh process. `--small` tries the script at a size
without meaning.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from measuring import in_fresh_process, median, peak_bytes, reset_peak, seconds, write_record
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SIDES = ("gradient", "hessian-eigenthings", "hesscope", "hesscope, nothing kept")
VOCABULARY = 8192


def make_model(small: bool) -> nn.Module:
    """Width 512, 8 blocks, vocabulary 8192, tied: 29.5 million parameters. Small: width 32, 2 blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32 if small else 512,
        intermediate_size=86 if small else 1376,
        num_hidden_layers=2 if small else 8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def make_inputs(model: nn.Module, small: bool) -> tuple[Tensor, Tensor]:
    """Tokens [4, 256] (small: [4, 32]), and a direction over all parameters."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (4, 32 if small else 256), generator=generator)
    return tokens, torch.randn(sum(p.numel() for p in model.parameters()), generator=generator)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The outputs, for the sides that are not hesscope."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def loss_of_logits(logits: Tensor, tokens: Tensor) -> Tensor:
    """The same loss for the sides that are not hesscope."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def run_gradient(repeats: int, small: bool) -> dict[str, Any]:
    """A gradient, forward and backward."""
    model = make_model(small)
    tokens, _ = make_inputs(model, small)
    resident = reset_peak()

    def gradient() -> None:
        torch.autograd.grad(loss_of_logits(logits_of(model, tokens), tokens), list(model.parameters()))

    with sdpa_kernel(SDPBackend.MATH):
        times = seconds(gradient, repeats)
    return {"seconds": times, "peak": peak_bytes() - resident}


def run_eigenthings(repeats: int, small: bool) -> dict[str, Any]:
    """hessian-eigenthings' exact product."""
    from hessian_eigenthings.operators import GGNOperator

    model = make_model(small)
    tokens, v = make_inputs(model, small)
    operator = GGNOperator(model, [tokens], logits_of, loss_of_logits)
    resident = reset_peak()
    products: list[Tensor] = []
    with sdpa_kernel(SDPBackend.MATH):
        times = seconds(lambda: products.append(operator.matvec(v)), repeats)
    return {"seconds": times, "peak": peak_bytes() - resident, "form": float(v @ products[-1])}


def run_hesscope(repeats: int, small: bool, graph_memory: int | None) -> dict[str, Any]:
    """The first product of an operator, and further ones."""
    import hesscope as hs

    model = make_model(small)
    tokens, v = make_inputs(model, small)
    G = hs.ggn(hs.causal_lm(model, tokens, batch_size=4), graph_memory=graph_memory)
    resident = reset_peak()
    first, further, products = [], [], []
    for _ in range(repeats):
        G.release()  # type: ignore[attr-defined]
        first += seconds(lambda: products.append(G @ v), 1)
        if graph_memory is None:
            further += seconds(lambda: G @ v, 2)
    figures = {"seconds": first, "peak": peak_bytes() - resident, "form": float(v @ products[-1])}
    return {**figures, "further": further} if further else figures


def run_side(side: str, repeats: int, small: bool) -> dict[str, Any]:
    """One side, in this process."""
    if side == "gradient":
        return run_gradient(repeats, small)
    if side == "hessian-eigenthings":
        return run_eigenthings(repeats, small)
    return run_hesscope(repeats, small, None if side == "hesscope" else 0)


def report(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Print the table and the ratios."""
    unit, theirs = median(found["gradient"]["seconds"]), found["hessian-eigenthings"]
    print(f"{'':34s}{'seconds':>9s}{'gradients':>11s}{'theirs/it':>11s}{'peak GB':>9s}{'of theirs':>11s}")
    ratios: dict[str, float] = {}
    for side, figures in found.items():
        rows = [(side if "further" not in figures else f"{side}, first product", figures["seconds"])]
        rows += [(f"{side}, each further product", figures["further"])] if "further" in figures else []
        for name, times in rows:
            faster, memory = median(theirs["seconds"]) / median(times), figures["peak"] / theirs["peak"]
            ratios[f"{name}: time over gradient"] = median(times) / unit
            ratios[f"{name}: times faster than hessian-eigenthings"] = faster
            ratios[f"{name}: memory over hessian-eigenthings"] = memory
            print(
                f"{name:34s}{median(times):9.3f}{median(times) / unit:11.2f}{faster:11.2f}{figures['peak'] / 1e9:9.2f}"
                f"{memory:11.2f}"
            )
    gap = abs(found["hesscope"]["form"] - theirs["form"]) / abs(theirs["form"])
    print(f"relative difference of <v, Gv> between hesscope and hessian-eigenthings: {gap:.1e}")
    return {**ratios, "relative difference of <v, Gv>": gap}


def main() -> None:
    """Run every side in a fresh process, print, and write results/ggn_product.json (not for --small)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES, help="run one side in this process and print its figures as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments.side, arguments.repeats, arguments.small)))
        return
    own = ["--repeats", str(arguments.repeats), *(["--small"] if arguments.small else [])]
    found = {side: in_fresh_process(__file__, "--side", side, *own) for side in SIDES}
    ratios = report(found)
    if not arguments.small:
        packages = ["hesscope", "torch", "transformers", "hessian-eigenthings"]
        path = write_record("ggn_product", {"sides": found, "ratios": ratios}, packages)
        print(f"written to {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
