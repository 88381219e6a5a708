"""Estimators of a diagonal: error against products on dense blocks, and cost to reach an error on whole layers.

    python benchmarks/diagonal.py blocks --folder ../shared/assets/published_blocks
    python benchmarks/diagonal.py layers --model ../shared/assets/stories260k \
                                         --text ../shared/assets/text/tinystories_sample.jsonl --cache exact-diagonals

`blocks` reads every .safetensors file of a folder as a dense symmetric matrix. `layers` takes whole weights of the first and
the last block of a causal LM on 16 sequences of 64 tokens; their exact diagonals cost one product a weight and are kept in
the cache, and so are the figures of layers that are done. Seconds are the process's CPU time, for other programs do not count there; run with OMP_NUM_THREADS=1.

The baseline is Hutchinson's estimator with independent signs. Its error falls exactly as 1/sqrt(products), so its squared
error for one product, E, is measured with 200 products and it needs E / error^2 for any error.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from measuring import write_record
from safetensors.torch import load_file, save_file

import hesscope as hs

METHODS = ("hutchinson", "gaussian", "deflated", "xdiag", "nystrom", "auto")
BUDGETS = (30, 60, 120, 240)
KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
SEQUENCES, LENGTH = 16, 64
BASELINE_PRODUCTS = 200


def blocks(folder: Path, seeds: int, figure: Path | None) -> dict[str, Any]:
    """Every method on every matrix of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        A = next(iter(load_file(path).values())).double()
        study = hs.diagonal_study(hs.operator(0.5 * (A + A.T)), METHODS, BUDGETS, exact=A.diagonal(), seeds=seeds)
        print(f"{path.stem}\n{study.summary()}\n", flush=True)
        found[path.stem] = {
            method: {
                str(budget): {
                    "relative_error": float(study.mean_errors[m, b]),
                    "stated": float(study.stated[m, b].mean()),
                    "coverage": float(study.coverage[m, b].mean()),
                }
                for b, budget in enumerate(BUDGETS)
            }
            for m, method in enumerate(METHODS)
        }
        if figure is not None:
            study.plot(figure.with_name(f"{figure.stem}_{path.stem.split('_')[0]}{figure.suffix}"))
    return found


def layers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every layer to every target."""
    problem = make_problem(arguments.model, arguments.text)
    last = 1 + max(int(name.split(".")[2]) for name, _ in problem.model.named_parameters() if ".layers." in name)
    names = [f"model.layers.{block}.{kind}.weight" for block in (0, last - 1) for kind in KINDS]
    found = {name: kept_layer(problem, name, arguments) for name in names if arguments.only in name}
    for method in arguments.method:
        for target in arguments.target:
            cells = [cells[method][str(target)] for cells in (entry["runs"] for entry in found.values())]
            for what in ("units", "seconds"):
                mean = math.exp(sum(math.log(cell[f"{what}_ratio"]) for cell in cells) / len(cells))
                print(
                    f"{method} at {target}: {mean:.1f} times cheaper in {what} than Hutchinson, geometric mean of {len(cells)} layers"
                )
    return found


def make_problem(model: Path, text: Path) -> hs.Problem:
    """The first stories that are long enough, cut to the length."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = (tokenizer(json.loads(line)["text"])["input_ids"] for line in text.open(encoding="utf-8"))
    ids = torch.tensor([row[:LENGTH] for row in rows if len(row) >= LENGTH][:SEQUENCES])
    return hs.causal_lm(str(model), ids, batch_size=SEQUENCES)


def kept_layer(problem: hs.Problem, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one layer, from the cache where an earlier run of the same options left them there."""
    options = {"methods": arguments.method, "targets": arguments.target}
    path = arguments.cache / f"{arguments.operator}-{name}.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept["options"] == options:
            return kept["figures"]  # type: ignore[no-any-return]
    found = layer(problem, name, arguments)
    path.write_text(json.dumps({"options": options, "figures": found}), encoding="utf-8")
    return found


def layer(problem: hs.Problem, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The baseline's squared error for one product, and what every method spends to reach every target."""
    H = getattr(hs, arguments.operator)(problem, hs.select(problem, name))
    H @ torch.ones(H.shape[0])  # builds the graph
    d = exact(H, f"{arguments.operator}-{name}", arguments.cache)
    began = time.process_time()
    plain = hs.diagonal(H, method="hutchinson", budget=BASELINE_PRODUCTS, seed=12345)
    passes = plain.units / BASELINE_PRODUCTS
    each = (time.process_time() - began) / BASELINE_PRODUCTS
    variance = sum(float(e.double().square().sum()) for e in plain.standard_error.values()) * BASELINE_PRODUCTS
    E = variance / float(d.square().sum())
    print(f"{name}: {len(d)} weights, E = {E:.1f}, {float((d < 0).double().mean()):.0%} negative", flush=True)
    runs: dict[str, Any] = {}
    for method in arguments.method:
        runs[method] = {str(target): run(H, d, method, target, E, each, passes) for target in arguments.target}
    return {"weights": len(d), "baseline_E": E, "baseline_seconds_each": each, "runs": runs}


def run(
    H: hs.Operator, d: torch.Tensor, method: str, target: float, E: float, each: float, passes: float
) -> dict[str, Any]:
    """One run to a target, and the baseline's cost for the error that it really reached."""
    began = time.process_time()
    # A budget of all columns would be spent on the exact diagonal.
    found = hs.diagonal(H, method=method, target_error=target, budget=min(4000, H.shape[0] - 1), seed=1)
    seconds = time.process_time() - began
    low, high = (torch.cat([part.reshape(-1) for part in end.values()]) for end in found.interval())
    true = float((found.flat().double() - d).norm() / d.norm())
    plain = E / true**2
    cell = {
        "method": found.method,
        "products": found.products,
        "units": found.units,
        "seconds": seconds,
        "true_error": true,
        "stated_error": found.relative_error,
        "coverage": float(((low <= d) & (d <= high)).double().mean()),
        "baseline_products": plain,
        "units_ratio": plain * passes / found.units,
        "seconds_ratio": plain * each / seconds,
        "estimator": found.provenance["estimator"],
    }
    print(
        f"  {method} to {target}: {found.products} products, {found.units:.0f} forward passes, error {true:.3f} (stated "
        f"{found.relative_error:.3f}), intervals cover {cell['coverage']:.0%}; Hutchinson's would need {plain:.0f} "
        f"products: {cell['units_ratio']:.1f} times the forward passes, {cell['seconds_ratio']:.1f} times in seconds",
        flush=True,
    )
    return cell


def exact(H: hs.Operator, name: str, cache: Path) -> torch.Tensor:
    """The exact diagonal, float64, from the cache where it is there."""
    path = cache / f"{name}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        save_file({"diagonal": hs.diagonal(H, method="exact").flat()}, path)
    return load_file(path)["diagonal"].double()


def main() -> None:
    """Read the arguments, run, keep the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    part = parser.add_subparsers(dest="part", required=True)
    dense = part.add_parser("blocks")
    dense.add_argument("--folder", type=Path, required=True)
    dense.add_argument("--seeds", type=int, default=20)
    dense.add_argument("--figure", type=Path, default=None)
    whole = part.add_parser("layers")
    whole.add_argument("--model", type=Path, required=True)
    whole.add_argument("--text", type=Path, required=True)
    whole.add_argument("--cache", type=Path, required=True)
    whole.add_argument("--only", default="", help="layers whose name contains this")
    whole.add_argument("--operator", choices=("hessian", "ggn"), default="hessian")
    whole.add_argument("--method", nargs="+", default=["auto"])
    whole.add_argument("--target", nargs="+", type=float, default=[0.1, 0.05])
    arguments = parser.parse_args()
    if arguments.part == "blocks":
        figures = blocks(arguments.folder, arguments.seeds, arguments.figure)
    else:
        figures = layers(arguments)
    name = f"diagonal_{arguments.part}" if arguments.part == "blocks" else f"diagonal_layers_{arguments.operator}"
    print(f"written to {write_record(name, {'figures': figures}, ['hesscope', 'torch', 'transformers'])}")


if __name__ == "__main__":
    main()
