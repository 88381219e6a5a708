"""Ten Lanczos steps of the Hessian of a 30M-parameter Llama: hesscope against hessian-eigenthings.

    python benchmarks/lanczos.py

All parameters, one batch of 4 sequences of 256 random tokens, float32, full reorthogonalisation, one start vector, the
mathematical form of SDPA on both sides. Each side runs in fresh processes, in turns with the others. hesscope runs as it is,
and over microbatches of one sequence, which changes no number and bounds what a product holds beside the kept graphs.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from hessian_product import make_inputs, make_model, mean_loss
from measuring import in_turns, median, peak_bytes, reset_peak, seconds, write_record
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

STEPS = 10
#: hesscope's sides by name: sequences in a microbatch, and bytes of kept graphs (None: what half of the free memory holds).
OURS: dict[str, tuple[int | None, int | None]] = {
    "hesscope, as it is": (None, None),
    "hesscope, microbatch=1": (1, None),
}
THEIRS = "hessian-eigenthings"


def run_theirs(repeats: int) -> dict[str, Any]:
    """Their Lanczos process."""
    from hessian_eigenthings.algorithms.lanczos import LanczosTridiag, lanczos_tridiagonal
    from hessian_eigenthings.operators import HessianOperator

    model = make_model()
    tokens, start = make_inputs(model)
    operator = HessianOperator(model, [tokens], mean_loss)
    runs: list[LanczosTridiag] = []
    resident = reset_peak()
    with sdpa_kernel(SDPBackend.MATH):
        times = seconds(lambda: (runs.clear(), runs.append(lanczos_tridiagonal(operator, start, STEPS))), repeats)
    T = torch.diag(runs[0].alphas) + torch.diag(runs[0].betas, 1) + torch.diag(runs[0].betas, -1)
    return {"seconds": times, "peak": peak_bytes() - resident, "nodes": nodes_of(T)}


def run_ours(repeats: int, microbatch: int | None, graph_memory: int | None) -> dict[str, Any]:
    """hesscope's, from an operator without kept graphs to T."""
    import hesscope as hs

    model = make_model()
    tokens, start = make_inputs(model)
    H = hs.hessian(hs.causal_lm(model, tokens, batch_size=4), microbatch=microbatch, graph_memory=graph_memory)
    runs: list[hs.LanczosRun] = []

    def run() -> None:
        runs.clear()
        H.release()  # type: ignore[attr-defined]
        runs.append(hs.lanczos(H, STEPS, start=start))

    resident = reset_peak()
    times = seconds(run, repeats)
    return {
        "seconds": times,
        "peak": peak_bytes() - resident,
        "nodes": nodes_of(runs[0].T),
        "units": runs[0].units,
        "operator": H.describe(),
    }


def nodes_of(T: Tensor) -> list[float]:
    """The eigenvalues of a tridiagonal matrix."""
    nodes: list[float] = torch.linalg.eigvalsh(T.double()).tolist()
    return nodes


def report(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Print the table; returns the ratios."""
    theirs = found[THEIRS]
    print(f"{'':44s}{'seconds':>9s}{'theirs/it':>11s}{'peak GB':>9s}{'of theirs':>11s}{'difference':>12s}")
    ratios: dict[str, float] = {}
    scale = max(abs(node) for node in theirs["nodes"])
    for side, figures in found.items():
        faster = median(theirs["seconds"]) / median(figures["seconds"])
        memory = figures["peak"] / theirs["peak"]
        gap = max(abs(a - b) for a, b in zip(figures["nodes"], theirs["nodes"], strict=True)) / scale
        ratios[f"{side}: times faster"], ratios[f"{side}: memory"], ratios[f"{side}: difference"] = faster, memory, gap
        print(
            f"{side:44s}{median(figures['seconds']):9.2f}{faster:11.2f}{figures['peak'] / 1e9:9.2f}{memory:11.2f}{gap:12.1e}"
        )
    return ratios


def main() -> None:
    """Run every side in fresh processes, print, and write results/lanczos.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=(THEIRS, *OURS), help="run one side in this process and print its figures")
    parser.add_argument("--repeats", type=int, default=2, help="of a side in one process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of a side, in turns with the others")
    arguments = parser.parse_args()
    if arguments.side == THEIRS:
        print(json.dumps(run_theirs(arguments.repeats)))
    elif arguments.side:
        print(json.dumps(run_ours(arguments.repeats, *OURS[arguments.side])))
    else:
        found = in_turns(__file__, (THEIRS, *OURS), arguments.repeats, arguments.rounds)
        packages = ["hesscope", "torch", "transformers", "hessian-eigenthings"]
        path = write_record("lanczos", {"sides": found, "ratios": report(found)}, packages)
        print(f"written to {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
