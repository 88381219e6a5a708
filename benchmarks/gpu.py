"""Everything that a machine with a CUDA device can show: the device's tests, kernels, and products of three sizes of Llama.

    python benchmarks/gpu.py                            all of it; writes results/gpu.json
    python benchmarks/gpu.py --models 0.1B --skip-tests
    python benchmarks/gpu.py --device cpu --small       every line, on the CPU with tiny models and kernels interpreted

Random weights, one batch of random tokens: 4 sequences of 1024, or as many as fit. Every side runs in a fresh process; memory
is the allocator's, above the loaded model. hessian-eigenthings takes part where it is installed. Several devices also run the layouts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import median, peak_bytes, reset_peak, seconds, write_record
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
OUT_OF_MEMORY = 17


@dataclass(frozen=True)
class Size:
    """A Llama's shape, and what is selected of it."""

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    params: str | None = None
    tied: bool = False


SIZES = {
    "0.1B": Size(768, 2048, 12, 12, 12, 32000, tied=True),
    "1B": Size(2048, 5632, 22, 32, 4, 32000),
    # Vectors over all of it would take as much as its weights in float32, several times.
    "7B": Size(4096, 11008, 32, 32, 32, 32000, params="model.layers.*.self_attn.v_proj.weight"),
}
SMALL = {
    "0.1B": Size(16, 24, 2, 2, 2, 64, tied=True),
    "1B": Size(16, 24, 2, 4, 2, 64),
    "7B": Size(16, 24, 2, 2, 2, 64, params="model.layers.*.self_attn.v_proj.weight"),
}
#: Sequences and tokens, from what is wanted down to what may fit.
BATCHES = [(4, 1024), (1, 1024), (1, 512), (1, 128)]
SMALL_BATCHES = [(2, 8), (1, 8)]
SIDES = ("gradient", "hessian-eigenthings", "kept", "not kept", "streamed", "ggn")
#: Dtype of the weights, and `precision` of the products.
PRECISIONS = [("bfloat16", None), ("float32", None), ("float32", "tf32"), ("float32", "bfloat16")]


# ---- one side, in this process


def make_model(size: Size, length: int, dtype: str, device: str) -> nn.Module:
    """Random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        max_position_embeddings=length,
        tie_word_embeddings=size.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        made: nn.Module = LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    return made.eval()


def mean_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The same loss for the sides that are not hesscope."""
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def run_side(arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of one side of one model, for one shape of batch."""
    size = (SMALL if arguments.small else SIZES)[arguments.model]
    rows, length = arguments.batch
    model = make_model(size, length, arguments.dtype, arguments.device)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, size.vocabulary, (rows, length), generator=generator)
    repeats = 1 if arguments.small else 3
    if arguments.side in ("gradient", "hessian-eigenthings"):
        return run_other(arguments, model, tokens.to(arguments.device), size, repeats)
    return run_hesscope(arguments, model, tokens, size, repeats)


def run_other(
    arguments: argparse.Namespace, model: nn.Module, tokens: Tensor, size: Size, repeats: int
) -> dict[str, Any]:
    """A gradient in the selected parameters, or hessian-eigenthings' exact product over all."""
    device = arguments.device
    picked = [p for name, p in model.named_parameters() if size.params is None or name.endswith("v_proj.weight")]
    work: Callable[[], object]
    with sdpa_kernel(SDPBackend.MATH):
        if arguments.side == "gradient":
            held = reset_peak(device)
            work = lambda: torch.autograd.grad(mean_loss(model, tokens), picked)  # noqa: E731
        else:
            from hessian_eigenthings.operators import HessianOperator

            operator = HessianOperator(model, [tokens], mean_loss)
            v = torch.ones(sum(p.numel() for p in model.parameters()), device=device, dtype=picked[0].dtype)
            held = reset_peak(device)
            work = lambda: operator.matvec(v)  # noqa: E731
        first = seconds(work, 1, device)
        further = seconds(work, repeats, device)
    return {"first": first, "further": further, "peak": peak_bytes(device) - held}


def run_hesscope(
    arguments: argparse.Namespace, model: nn.Module, tokens: Tensor, size: Size, repeats: int
) -> dict[str, Any]:
    """First product and further ones; predicted and measured memory; the measured error."""
    import hesscope as hs

    device, side = arguments.device, arguments.side
    problem = hs.causal_lm(model, tokens, batch_size=len(tokens))
    space = hs.select(problem, *([] if size.params is None else [size.params]))
    engine = "streamed" if side == "streamed" else "auto" if side == "ggn" else "reverse-over-reverse"
    predicted = predict(problem, space, side)
    v = space.rademacher(0, [0])
    with hs.precision(arguments.precision), hs.memory_limit(None):
        make: Any = hs.ggn if side == "ggn" else hs.hessian
        A = make(problem, space, engine=engine, graph_memory=None if side in ("kept", "ggn") else 0)
        held = reset_peak(device)
        first = seconds(lambda: A.matmat(v), 1, device)
        further = seconds(lambda: A.matmat(v), repeats, device)
        peak = peak_bytes(device) - held
        A.release()
    # Outside of the lifted limit: a reference that does not fit is not tried.
    error = A.product_error()
    return {
        "first": first,
        "further": further,
        "peak": peak,
        "predicted_peak": predicted,
        "coordinates": space.size,
        "product_error": error.describe(),
    }


def predict(problem: Any, space: Any, side: str) -> int | None:
    """The plan's peak for the side's engine, in bytes; None where it makes none."""
    import hesscope as hs

    engine = "streamed" if side == "streamed" else "reverse-over-reverse"
    operator = "ggn" if side == "ggn" else "hessian"
    try:
        row = hs.plan(problem, space, operator, "product", 2, [engine], measure=False).engines[engine]
    except hs.HesscopeError:
        return None
    found: int | None = row.get("peak_bytes" if side in ("kept", "ggn") else "least_bytes")
    return found


# ---- all of them


def table(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every model, precision and side, each in a fresh process; prints a line for each."""
    print(f"\n{'model':6s}{'weights':>10s}{'products':>10s}  {'side':22s}{'batch':>9s}{'first s':>10s}{'further s':>11s}"
          f"{'gradients':>11s}{'peak GB':>9s}{'predicted':>11s}{'error':>10s}")  # fmt: skip
    rows = []
    for model in arguments.models:
        for dtype, precision in PRECISIONS:
            if precision == "tf32" and arguments.device == "cpu":
                continue
            gradient = None
            for side in arguments.sides:
                if precision is not None and side in ("gradient", "hessian-eigenthings"):
                    continue
                row = fitting(arguments, model, dtype, precision, side)
                if side == "gradient" and "further" in row:
                    gradient = row["further"]
                rows.append(row)
                print(line(row, gradient), flush=True)
    return rows


def fitting(arguments: argparse.Namespace, model: str, dtype: str, precision: str | None, side: str) -> dict[str, Any]:
    """The side on the largest batch that fits."""
    row: dict[str, Any] = {"model": model, "dtype": dtype, "precision": precision, "side": side}
    if side == "hessian-eigenthings" and importlib.util.find_spec("hessian_eigenthings") is None:
        return {**row, "remark": "not installed"}
    for batch in SMALL_BATCHES if arguments.small else BATCHES:
        command = [
            sys.executable,
            __file__,
            "--side",
            side,
            "--model",
            model,
            "--dtype",
            dtype,
            "--device",
            arguments.device,
        ]
        command += ["--batch", *map(str, batch), *(["--precision", precision] if precision else [])]
        command += ["--small"] if arguments.small else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return {**row, "batch": batch, **json.loads(done.stdout.strip().splitlines()[-1])}
        if done.returncode != OUT_OF_MEMORY:
            return {**row, "remark": (done.stderr.strip().splitlines() or ["failed"])[-1][:300]}
    return {**row, "remark": "does not fit"}


def line(row: dict[str, Any], gradient: list[float] | None) -> str:
    """A row of the table."""
    head = f"{row['model']:6s}{row['dtype']:>10s}{row['precision'] or '-':>10s}  {row['side']:22s}"
    if "further" not in row:
        return f"{head}  {row['remark']}"
    times = median(row["first"]), median(row["further"])
    ratio = f"{times[1] / median(gradient):.2f}" if gradient else ""
    predicted = f"{row['predicted_peak'] / 1e9:.2f}" if row.get("predicted_peak") else ""
    error = (row.get("product_error") or {}).get("relative")
    batch = "x".join(map(str, row["batch"]))
    return (
        f"{head}{batch:>9s}{times[0]:10.3f}{times[1]:11.3f}{ratio:>11s}{row['peak'] / 1e9:9.2f}{predicted:>11s}"
        f"{'' if error is None else f'{error:.1e}':>10s}"
    )


def device_tests(arguments: argparse.Namespace) -> dict[str, Any]:
    """`pytest -m gpu` on the device."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    command += ["-k", arguments.tests] if arguments.tests else []
    print(" ".join(["python", *command[1:]]), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment(arguments))
    summary = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    failed = [text for text in done.stdout.splitlines() if text.startswith(("FAILED", "ERROR"))]
    print("\n".join([*failed, summary]), flush=True)
    return {"status": done.returncode, "summary": summary, "failed": failed}


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """For a process that tests a device."""
    own = {"HESSCOPE_TEST_DEVICE": arguments.device}
    return {**os.environ, **own, **({"TRITON_INTERPRET": "1"} if arguments.device == "cpu" else {})}


def main() -> int:
    """Run, print, and write results/gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, a look at every line")
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--tests", help="only tests whose names contain this, as for pytest -k")
    parser.add_argument("--name", default="gpu", help="of the file in results")
    parser.add_argument(
        "--side", choices=[*SIDES, "kernels"], help="run one side in this process and print its figures as JSON"
    )
    parser.add_argument("--model", choices=list(SIZES))
    parser.add_argument("--dtype", choices=["bfloat16", "float32"])
    parser.add_argument("--precision")
    parser.add_argument("--batch", type=int, nargs=2)
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no CUDA device here; --device cpu --small runs every line on the CPU.", file=sys.stderr)
        return 1
    if arguments.side:
        return one_side(arguments)
    found: dict[str, Any] = {"device": describe(arguments.device)}
    print(json.dumps(found["device"]))
    if not arguments.skip_tests:
        found["tests"] = device_tests(arguments)
    found["kernels"] = kernels(arguments)
    found["products"] = table(arguments)
    found["layouts"] = layouts(arguments)
    packages = ["hesscope", "torch", "transformers"]
    packages += [p for p in ("triton", "hessian-eigenthings") if importlib.util.find_spec(p.replace("-", "_"))]
    path = write_record(arguments.name, found, packages)
    print(f"written to {path.parent.name}/{path.name}")
    return 0


def one_side(arguments: argparse.Namespace) -> int:
    """Figures as JSON on the last line; a status of its own for what does not fit."""
    try:
        if arguments.side == "kernels":
            from gpu_kernels import measure

            print(json.dumps(measure(arguments.device, arguments.small)))
        else:
            print(json.dumps(run_side(arguments)))
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    return 0


def kernels(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Triton's kernels against their references: the difference and the time; prints a line for each."""
    command = [sys.executable, __file__, "--side", "kernels", "--device", arguments.device]
    command += ["--small"] if arguments.small else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(arguments))
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["out of memory"])[-1][:300]
        print(f"kernels: {reason}", flush=True)
        return [{"remark": reason}]
    found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    print(
        f"\n{'kernel':22s}{'dtype':>10s}{'shape':>24s}{'reference s':>13s}{'kernel s':>11s}{'ratio':>8s}{'differs':>10s}"
    )
    for row in found:
        ratio = row["kernel"] / row["reference"]
        print(
            f"{row['name']:22s}{row['dtype']:>10s}{row['shape']:>24s}{row['reference']:13.5f}{row['kernel']:11.5f}{ratio:8.2f}"
            f"{row['gap']:10.1e}",
            flush=True,
        )
    return found


def layouts(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Streamed products, batches and weights divided among all devices (on a CPU, two processes); prints a line for each."""
    ranks = 2 if arguments.small else torch.cuda.device_count()
    if ranks < 2:
        print("\nlayouts: one device only")
        return []
    print(
        f"\n{'layout':8s}{'ranks':>6s}  {'model':6s}{'first s':>10s}{'further s':>11s}{'of one':>8s}{'peak GB':>9s}{'differs':>10s}"
    )
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        one: dict[str, Any] = {}
        for layout in ("one", "data", "fsdp", *(("hsdp",) if ranks >= 4 and ranks % 2 == 0 else ())):
            row = {
                "model": model,
                "layout": layout,
                "ranks": 1 if layout == "one" else ranks,
                **one_layout(arguments, model, layout, ranks),
            }
            one = row if layout == "one" else one
            rows.append(row)
            head = f"{layout:8s}{row['ranks']:6d}  {model:6s}"
            if "further" not in row:
                print(f"{head}  {row['remark']}", flush=True)
                continue
            ratio = f"{row['further'] / one['further']:.2f}" if "further" in one else ""
            gap = f"{abs(row['form'] / one['form'] - 1):.1e}" if "form" in one else ""
            print(
                f"{head}{row['first']:10.3f}{row['further']:11.3f}{ratio:>8s}{row['peak'] / 1e9:9.2f}{gap:>10s}",
                flush=True,
            )
    return rows


def one_layout(arguments: argparse.Namespace, model: str, layout: str, ranks: int) -> dict[str, Any]:
    """Figures of one layout, in processes of its own."""
    script = str(Path(__file__).with_name("gpu_layouts.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *([] if layout == "one" else launcher), script, "--model", model, "--layout", layout]
    command += ["--device", arguments.device, "--batches", str(ranks), *(["--small"] if arguments.small else [])]
    command += ["--batch", *map(str, SMALL_BATCHES[0] if arguments.small else BATCHES[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"remark": (done.stderr.strip().splitlines() or ["failed"])[-1][:300]}
    found: dict[str, Any] = json.loads(next(x for x in reversed(done.stdout.splitlines()) if x.startswith("{")))
    return found


def describe(device: str) -> dict[str, Any]:
    """The device and what it can do."""
    if not device.startswith("cuda"):
        return {"name": "cpu"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory": properties.total_memory,
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    sys.exit(main())
