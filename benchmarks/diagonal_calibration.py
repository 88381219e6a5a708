"""Estimators of a diagonal on whole layers: the mean over many seeds, and what the intervals cover, against the exact one.

    python benchmarks/diagonal_calibration.py --model ../shared/assets/stories260k \
                                              --text ../shared/assets/text/tinystories_sample.jsonl --cache exact-diagonals

The problem, the layers and the cache of exact diagonals are those of `benchmarks/diagonal.py layers`. With d_k the estimate of
seed k, s_k its standard errors, K seeds and d the exact diagonal,

    bias     |mean_k d_k - d|^2 / (mean_k |s_k|^2 / K)     about 1 where there is none and the errors are right
    t        <mean_k d_k - d, u> / (standard deviation over k of <d_k, u> / sqrt(K)), for u = 1 (the trace) and u = d
    covers   the share of entries of all seeds that the 95% intervals hold
    spread   the same for the stated relative errors: root mean square of the true ones over that of the stated ones

Figures of cells that are done are kept in the cache.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diagonal import KINDS, exact, make_problem
from measuring import write_record
from scipy import stats

import hesscope as hs

#: By operator: the methods and the budget of each. A control variate's sample takes three products or more.
METHODS = {
    "hessian": {
        "hutchinson": 40,
        "gaussian": 40,
        "deflated": 62,
        "xdiag": 62,
        "nystrom": 62,
        "per-sequence": 40,
        "control-variate": 120,
        "auto": 100,
    },
    "ggn": {"hutchinson": 40, "nystrom": 62, "sampled": 40, "auto": 100},
}


def cell(H: hs.Operator, d: torch.Tensor, method: str, budget: int, seeds: int) -> dict[str, Any]:
    """One method on one layer over all seeds."""
    estimates, variances, inside = [], [], 0.0
    for seed in range(seeds):
        run = hs.diagonal(H, method=method, budget=budget, seed=seed)
        low, high = (torch.cat([part.reshape(-1) for part in end.values()]).double() for end in run.interval())
        inside += float(((low <= d) & (d <= high)).double().mean()) / seeds
        estimates.append(run.flat().double())
        variances.append(sum(float(e.double().square().sum()) for e in run.standard_error.values()))
    estimates_K, stated = torch.stack(estimates), sum(variances) / seeds
    gap = estimates_K.mean(0) - d
    return {
        "budget": budget,
        "seeds": seeds,
        "bias": float(gap.square().sum()) / (stated / seeds),
        "t_trace": _t(estimates_K, d, torch.ones_like(d)),
        "t_along": _t(estimates_K, d, d),
        "covers": inside,
        "spread": float((estimates_K - d).square().sum(1).mean() / stated) ** 0.5,
        "error": float((estimates_K - d).square().sum(1).mean() / d.square().sum()) ** 0.5,
    }


def _t(estimates_K: torch.Tensor, d: torch.Tensor, u: torch.Tensor) -> float:
    found = (estimates_K - d) @ u
    return float(found.mean() / (found.std() / len(found) ** 0.5))


def kept(path: Path, options: dict[str, Any], compute: Any) -> dict[str, Any]:
    """The figures in that file where an earlier run of the same options left them there."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if all(found[key] == value for key, value in options.items()):
            return found
    found = compute()
    path.write_text(json.dumps(found), encoding="utf-8")
    return found


def summary(figures: dict[str, dict[str, Any]], seeds: int) -> dict[str, Any]:
    """By method over all layers: ranges, and how many of the t lie beyond their 95% quantile."""
    quantile = float(stats.t.ppf(0.975, seeds - 1))
    rows = {}
    for method in next(iter(figures.values())):
        cells = [layer[method] for layer in figures.values()]
        ts = [abs(c[key]) for c in cells for key in ("t_trace", "t_along")]
        rows[method] = {
            "bias": [min(c["bias"] for c in cells), max(c["bias"] for c in cells)],
            "covers": [min(c["covers"] for c in cells), max(c["covers"] for c in cells)],
            "spread": [min(c["spread"] for c in cells), max(c["spread"] for c in cells)],
            "beyond": sum(t > quantile for t in ts),
            "of": len(ts),
            "largest_t": max(ts),
        }
        r = rows[method]
        print(f"| `{method}` | {r['bias'][0]:.2f} to {r['bias'][1]:.2f} | {r['beyond']} of {r['of']} | {r['largest_t']:.1f} | "
              f"{r['covers'][0]:.1%} to {r['covers'][1]:.1%} | {r['spread'][0]:.2f} to {r['spread'][1]:.2f} |", flush=True)  # fmt: skip
    return rows


def main() -> None:
    """Every method on every layer, then a row of a Markdown table for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--operator", choices=tuple(METHODS), default="hessian")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--only", default="", help="layers whose name contains this")
    arguments = parser.parse_args()
    problem = make_problem(arguments.model, arguments.text)
    last = 1 + max(int(name.split(".")[2]) for name, _ in problem.model.named_parameters() if ".layers." in name)
    names = [f"model.layers.{block}.{kind}.weight" for block in (last - 1, 0) for kind in KINDS]
    figures: dict[str, dict[str, Any]] = {}
    for name in (name for name in names if arguments.only in name):
        H = getattr(hs, arguments.operator)(problem, hs.select(problem, name))
        d = exact(H, f"{arguments.operator}-{name}", arguments.cache)
        figures[name] = {}
        for method, budget in METHODS[arguments.operator].items():
            path = arguments.cache / f"calibration-{arguments.operator}-{name}-{method}.json"
            options = {"budget": budget, "seeds": arguments.seeds}
            found = kept(path, options, lambda: cell(H, d, method, budget, arguments.seeds))  # noqa: B023
            figures[name][method] = found
            print(f"{name} {method}: " + ", ".join(f"{key} {value:.3g}" for key, value in found.items()), flush=True)
        H.release()
    print(
        "\n| method | bias | t beyond its 95% quantile | largest t | covers | true over stated error |\n|" + "---|" * 6
    )
    record = {"figures": figures, "summary": summary(figures, arguments.seeds)}
    name = f"diagonal_calibration_{arguments.operator}"
    print(f"written to {write_record(name, record, ['hesscope', 'torch', 'transformers'])}")


if __name__ == "__main__":
    main()
