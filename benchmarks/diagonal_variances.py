"""Variance of one sample of a Hessian's diagonal, by estimator, on whole layers of a causal LM.

    python benchmarks/diagonal_variances.py --model ../shared/assets/stories260k \
                                            --text ../shared/assets/text/tinystories_sample.jsonl

The problem and the layers are those of `benchmarks/diagonal.py layers`: 16 sequences of 64 tokens. E is the summed variance of
one sample over the squared norm of the diagonal, so that m samples have the relative error sqrt(E / m):

    hutchinson      z * (H z)
    per-sequence    sum_s v_s * (H_s v_s), a probe for every sequence
    sampled G       squared gradients at labels drawn from the model, for the GGN's diagonal
    H - G           z * ((H - G) z), for what the GGN leaves
    H - K-FAC       z * ((H - K) z), for what K-FAC leaves; its own diagonal is known and its products cost no pass

Sampled G and H - G together estimate diag(H), too, with G as a control variate. With c forward passes a sample, and both kinds
of samples taken in the best proportion, that costs (sqrt(E_G c_G) + sqrt(E_HG c_HG))^2 where one estimator alone costs E c.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from diagonal import KINDS, make_problem
from measuring import write_record

import hesscope as hs
from hesscope.space import Space

ALL = "all linear layers"
#: Forward passes of one sample, graphs being kept.
PASSES = {"hutchinson": 6.0, "per-sequence": 6.0, "sampled G": 2.0, "H - G": 10.0, "H - K-FAC": 6.0}


def variances(problem: hs.Problem, space: Space, draws: int) -> dict[str, float]:
    """The summed variance of one sample of each kind, relative to |diag(H)|^2."""
    H, G, K = hs.hessian(problem, space), hs.ggn(problem, space), hs.kfac(problem, space)
    runs = {
        "hutchinson": hs.diagonal(H, "hutchinson", budget=draws, seed=1),
        "per-sequence": hs.diagonal(H, "per-sequence", budget=draws, seed=2),
        "sampled G": hs.diagonal(G, "sampled", budget=draws, seed=3),
        "H - G": hs.diagonal(H - G, "hutchinson", budget=draws, seed=4),
        "H - K-FAC": hs.diagonal(H - K, "hutchinson", budget=draws, seed=5),
    }
    found = {kind: draws * _squares(run.standard_error) for kind, run in runs.items()}
    best = min(("hutchinson", "per-sequence"), key=lambda kind: found[kind])
    # The mean's own noise is in its square.
    signal = _squares(runs[best].values) - found[best] / draws
    return {kind: variance / signal for kind, variance in found.items()}


def _squares(parts: dict[str, Any]) -> float:
    return sum(float(x.double().square().sum()) for x in parts.values())


def control_variate(E: dict[str, float]) -> float:
    """Forward passes, times the squared relative error, of sampled G and H - G together."""
    return (math.sqrt(E["sampled G"] * PASSES["sampled G"]) + math.sqrt(E["H - G"] * PASSES["H - G"])) ** 2


def main() -> None:
    """Every layer, a row of a Markdown table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--only", default="", help="layers whose name contains this")
    parser.add_argument("--draws", type=int, default=100)
    arguments = parser.parse_args()
    problem = make_problem(arguments.model, arguments.text)
    last = 1 + max(int(name.split(".")[2]) for name, _ in problem.model.named_parameters() if ".layers." in name)
    names = [f"model.layers.{block}.{kind}.weight" for block in (0, last - 1) for kind in KINDS]
    spaces = {name: hs.select(problem, name) for name in names} | {ALL: hs.select(problem, layers="all", blocks="all")}
    figures: dict[str, dict[str, float]] = {}
    print("| layer | " + " | ".join(PASSES) + " | per-sequence saves | G saves | K-FAC saves |\n|" + "---|" * 9)
    for name in (name for name in spaces if arguments.only in name):
        E = variances(problem, spaces[name], arguments.draws)
        plain = E["hutchinson"] * PASSES["hutchinson"]
        ratios = {
            "per-sequence saves": plain / (E["per-sequence"] * PASSES["per-sequence"]),
            "control variate saves": plain / control_variate(E),
            "K-FAC saves": plain / (E["H - K-FAC"] * PASSES["H - K-FAC"]),
        }
        figures[name] = E | ratios
        short = name.removeprefix("model.layers.").removesuffix(".weight")
        print(f"| {short} | " + " | ".join(f"{x:.3g}" for x in E.values())
              + " | " + " | ".join(f"{x:.2f} times" for x in ratios.values()) + " |", flush=True)  # fmt: skip
    record = {"draws": arguments.draws, "figures": figures}
    print(f"written to {write_record('diagonal_variances', record, ['hesscope', 'torch', 'transformers'])}")


if __name__ == "__main__":
    main()
