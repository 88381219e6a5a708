"""Peak memory and time of one exact Hessian product of a 30M-parameter Llama, by engine, against hessian-eigenthings.

    python benchmarks/streamed.py
    python benchmarks/streamed.py --length 2048 --sequences 1 --vocabulary 65536 --repeats 1

Random tokens, float32, all parameters; the mathematical form of SDPA on every side. Each side runs in a fresh process; peaks
are resident memory above that of the loaded model.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from hessian_product import make_model, mean_loss
from measuring import in_fresh_process, median, peak_bytes, reset_peak, seconds, write_record
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

THEIRS = "hessian-eigenthings"
SIDES = ("gradient", THEIRS, "streamed", "reverse-over-reverse, nothing kept")


def run_side(side: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
    model = make_model(arguments.length, arguments.vocabulary)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, arguments.vocabulary, (arguments.sequences, arguments.length), generator=generator)
    v = torch.randn(sum(p.numel() for p in model.parameters()), generator=generator)
    products: list[Tensor] = []
    if side == "gradient":
        resident = reset_peak()
        with sdpa_kernel(SDPBackend.MATH):
            run = lambda: torch.autograd.grad(mean_loss(model, tokens), list(model.parameters()))  # noqa: E731
            times = seconds(run, arguments.repeats)
        return {"seconds": times, "peak": peak_bytes() - resident}
    if side == THEIRS:
        from hessian_eigenthings.operators import HessianOperator

        operator: Any = HessianOperator(model, [tokens], mean_loss)
        resident = reset_peak()
        with sdpa_kernel(SDPBackend.MATH):
            times = seconds(lambda: (products.clear(), products.append(operator.matvec(v))), arguments.repeats)
    else:
        import hesscope as hs

        problem = hs.causal_lm(model, tokens, batch_size=arguments.sequences)
        operator = hs.hessian(problem, engine=side.split(",")[0], graph_memory=0)
        resident = reset_peak()
        # The look at a short sequence is no part of a product's time; of the peak it is.
        operator.engine.prepare(problem, operator.space)
        times = seconds(lambda: (products.clear(), products.append(operator @ v)), arguments.repeats)
    return {"seconds": times, "peak": peak_bytes() - resident, "form": float(v.double() @ products[-1].double())}


def report(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Print the table; returns the ratios."""
    gradient, theirs = found["gradient"], found.get(THEIRS)
    print(f"{'':38s}{'seconds':>9s}{'gradients':>11s}{'peak GB':>9s}{'of gradient':>13s}{'of theirs':>11s}")
    ratios: dict[str, float] = {}
    for side, figures in found.items():
        time = median(figures["seconds"]) / median(gradient["seconds"])
        memory = figures["peak"] / gradient["peak"]
        of_theirs = figures["peak"] / theirs["peak"] if theirs else float("nan")
        ratios |= {f"{side}: time over gradient": time, f"{side}: memory over gradient": memory}
        if theirs:
            ratios[f"{side}: memory over {THEIRS}"] = of_theirs
        print(
            f"{side:38s}{median(figures['seconds']):9.2f}{time:11.2f}{figures['peak'] / 1e9:9.2f}{memory:13.2f}{of_theirs:11.2f}"
        )
    forms = [figures["form"] for figures in found.values() if "form" in figures]
    gap = (max(forms) - min(forms)) / abs(forms[0])
    print(f"relative differences of <v, Hv>: {gap:.1e}")
    return {**ratios, "relative differences of <v, Hv>": gap}


def main() -> None:
    """Run every side in a fresh process, print, and write results/streamed*.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES, help="run one side in this process and print its figures")
    parser.add_argument("--without", choices=SIDES, action="append", default=[], help="leave a side out")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments.side, arguments)))
        return
    names = ("length", "sequences", "vocabulary", "repeats")
    options = [x for name in names for x in (f"--{name}", str(getattr(arguments, name)))]
    sides = [side for side in SIDES if side not in arguments.without]
    found = {side: in_fresh_process(__file__, "--side", side, *options) for side in sides}
    packages = ["hesscope", "torch", "transformers", "hessian-eigenthings"]
    name = f"streamed_{arguments.sequences}x{arguments.length}_{arguments.vocabulary}"
    path = write_record(name, {"sides": found, "ratios": report(found)}, packages)
    print(f"written to {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
