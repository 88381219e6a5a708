"""What `hesscope.plan` predicts against what is measured: peak memory and time of Hessian and GGN products, by engine.

    python benchmarks/plan.py --stories path/to/stories260k

Random tokens, float32, all parameters. Every operator's prediction comes from a process of its own, and so does every measurement: a
first product with the engine's check, then three further ones. Peaks are resident memory above that of the loaded model. `--small` tries
the script at a size without meaning.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from hessian_product import make_model
from measuring import in_fresh_process, median, peak_bytes, reset_peak, write_record
from torch import nn

#: Engines, and whether graphs are kept between products.
SIDES = (
    ("hessian", "reverse-over-reverse", "kept"),
    ("hessian", "reverse-over-reverse", "nothing kept"),
    ("hessian", "forward-over-reverse", "nothing kept"),
    ("hessian", "reverse-over-forward", "nothing kept"),
    ("hessian", "streamed", "nothing kept"),
    ("ggn", "reverse-over-reverse", "nothing kept"),
    ("ggn", "streamed", "nothing kept"),
)
OPERATORS = ("hessian", "ggn")
#: Further products of which the median counts.
FURTHER = 3
CASES = ("llama-30m 4x256", "llama-30m 1x1024", "gpt2-9m 4x256", "stories260k 16x256")
SMALL = ("llama-30m 1x32",)


def make_gpt2() -> nn.Module:
    """Width 256, 6 blocks, vocabulary 16384, tied: 9 million parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=16384, n_positions=1024, n_embd=256, n_layer=6, n_head=8)).eval()


def make_problem(case: str, stories: str | None) -> Any:
    """The case's model on random tokens, one batch."""
    import hesscope as hs

    name, shape = case.split()
    rows, length = map(int, shape.split("x"))
    if name == "stories260k":
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    else:
        model = make_gpt2() if name.startswith("gpt2") else make_model(length)
    tokens = torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    return hs.causal_lm(model, tokens, batch_size=rows)


def predict(problem: Any, operator: str) -> dict[str, Any]:
    """An operator's plan, and the seconds that it took."""
    import hesscope as hs

    began = time.perf_counter()
    return {"engines": hs.plan(problem, operator=operator).engines, "seconds": time.perf_counter() - began}


def measure(problem: Any, operator: str, engine: str, kept: bool) -> dict[str, Any]:
    """A first product in this process, and the median of further ones."""
    import hesscope as hs

    make = hs.hessian if operator == "hessian" else hs.ggn
    H: Any = make(problem, engine=engine, graph_memory=None if kept else 0)
    v = H.space.zeros()
    generator = torch.Generator().manual_seed(2)
    for part in v.values():
        part.copy_(torch.randn(part.shape, generator=generator))
    resident, times = reset_peak(), []
    for _ in range(1 + FURTHER):
        began = time.perf_counter()
        H.matmat(v)
        times.append(time.perf_counter() - began)
    return {"peak": peak_bytes() - resident, "first": times[0], "further": median(times[1:])}


def compare(row: dict[str, Any], seen: dict[str, Any], kept: bool) -> dict[str, float]:
    """Predicted over measured."""
    memory, first = row["peak_bytes" if kept else "least_bytes"], row["first_seconds"]
    further = row["further_seconds"] if kept else row["anew_seconds"]
    return {
        "predicted_peak": memory,
        "memory": memory / seen["peak"],
        "first": first / seen["first"],
        "further": further / seen["further"],
    }


def on_record(case: str) -> dict[str, dict[str, Any]]:
    """What was measured of a case when it was last written down; planning has no part in that."""
    record = json.loads((Path(__file__).parent / "results" / "plan.json").read_text())
    measured: dict[str, dict[str, Any]] = record["cases"][case]["measured"]
    return measured


def report(cases: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Print a table of ratios, predicted over measured; returns the ones that are furthest off."""
    print(f"{'predicted over measured':66s}{'peak MB':>9s}{'memory':>8s}{'seconds':>9s}{'first':>7s}{'further':>9s}")
    ratios: dict[str, list[float]] = {"memory": [], "first": [], "further": []}
    for case, figures in cases.items():
        for side, seen in figures["measured"].items():
            operator, engine, graphs = side.split(", ")
            found = compare(figures["predicted"][operator]["engines"][engine], seen, graphs == "kept")
            figures.setdefault("ratios", {})[side] = found
            for key, values in ratios.items():
                values.append(found[key])
            print(
                f"{case + ': ' + side:66s}{seen['peak'] / 1e6:9.0f}{found['memory']:8.2f}{seen['further']:9.2f}"
                f"{found['first']:7.2f}{found['further']:9.2f}"
            )
    ends = {f"{key}, {end.__name__}": end(values) for key, values in ratios.items() for end in (min, max)}
    print({key: round(value, 2) for key, value in ends.items()})
    return ends


def main() -> None:
    """Predict and measure every case, print, and write results/plan.json (not for --small)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--side", help="an operator to plan, or a side to measure, in this process; prints its figures as JSON"
    )
    parser.add_argument("--case")
    parser.add_argument("--stories", help="folder of the stories260k model; its case is left out by default")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--again", action="store_true", help="predict anew, against the measurements on record")
    parser.add_argument("--small", action="store_true", help="a short sequence, to try the script")
    arguments = parser.parse_args()
    if arguments.side:
        problem = make_problem(arguments.case, arguments.stories)
        if arguments.side in OPERATORS:
            print(json.dumps(predict(problem, arguments.side)))
        else:
            operator, engine, graphs = arguments.side.split(", ")
            print(json.dumps(measure(problem, operator, engine, graphs == "kept")))
        return
    if arguments.stories and not (Path(arguments.stories) / "config.json").exists():
        parser.error(f"expected a folder with config.json and weights for --stories, got {arguments.stories!r}")
    stories = ["--stories", arguments.stories] if arguments.stories else []
    cases = SMALL if arguments.small else tuple(c for c in CASES if stories or not c.startswith("stories"))
    found: dict[str, dict[str, Any]] = {}
    for case in (c for c in cases if (arguments.only or "") in c):
        own = ["--case", case, *stories]
        found[case] = {
            "predicted": {name: in_fresh_process(__file__, "--side", name, *own) for name in OPERATORS},
            "measured": on_record(case)
            if arguments.again
            else {side: in_fresh_process(__file__, "--side", side, *own) for side in map(", ".join, SIDES)},
        }
    ends = report(found)
    if not arguments.small and not arguments.only:
        path = write_record("plan", {"cases": found, "furthest": ends}, ["hesscope", "torch", "transformers"])
        print(f"written to {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
