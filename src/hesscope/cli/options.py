"""Options that every verb shares, declared once and joined to each verb's own."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from hesscope.cli.config import read_config
from hesscope.cli.ranks import in_ranks
from hesscope.cli.resuming import result_folder, stopped_in_words

_PROBLEM, _OUTPUT, _WHAT = "Model and data", "Output", "What is looked at"


def _option(*names: str, panel: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


@dataclass(frozen=True)
class CommonOptions:
    """Model, data, selection, operator and output of one command."""

    model: Annotated[str | None, _option("--model", panel=_PROBLEM, help="Hub id or folder of a causal LM; 'demo' is the small one that comes with hesscope.")] = None  # fmt: skip
    data: Annotated[str | None, _option("--data", panel=_PROBLEM, help="Hub dataset, or a .txt, .jsonl or .parquet file. A .txt file or a dataset is joined and cut into windows; the texts of a .jsonl or .parquet file stay separate. 'demo' is English prose that Python carries.")] = None  # fmt: skip
    revision: Annotated[str | None, _option("--revision", panel=_PROBLEM, help="Branch, tag or commit of the model on the Hub.")] = None  # fmt: skip
    tokenizer: Annotated[str | None, _option("--tokenizer", panel=_PROBLEM, help="Tokenizer, where it is not the model's own.")] = None  # fmt: skip
    data_config: Annotated[str | None, _option("--data-config", panel=_PROBLEM, help="Configuration of a Hub dataset, such as wikitext-2-raw-v1.")] = None  # fmt: skip
    split: Annotated[str | None, _option("--split", panel=_PROBLEM, help="Split of a dataset, such as test.")] = None  # fmt: skip
    text_column: Annotated[str, _option("--text-column", panel=_PROBLEM, help="Column that holds the text.")] = "text"  # fmt: skip
    length: Annotated[int | None, _option("--length", panel=_PROBLEM, help="Tokens a sequence; the model's context, at most 2048, by default.")] = None  # fmt: skip
    sequences: Annotated[int | None, _option("--sequences", panel=_PROBLEM, help="Use the first so many sequences; all by default.")] = None  # fmt: skip
    batch_size: Annotated[int, _option("--batch-size", panel=_PROBLEM, help="Sequences run at once: memory and speed, not the result.")] = 1  # fmt: skip
    pack: Annotated[bool, _option("--pack", panel=_PROBLEM, help="Join separate texts and cut them into windows.")] = False  # fmt: skip
    dtype: Annotated[str | None, _option("--dtype", panel=_PROBLEM, help="float64, float32 (default), bfloat16 or float16.")] = None  # fmt: skip
    precision: Annotated[str | None, _option("--precision", panel=_PROBLEM, help="Of products, with --dtype float32: float32 (never less, sums over batches in float64), tf32 (on CUDA) or bfloat16 (of what is linear in the vectors). As torch is set by default.")] = None  # fmt: skip
    check: Annotated[bool, _option("--check/--no-check", panel=_PROBLEM, help="Measure the products' error against the next higher precision, on a few tokens.")] = True  # fmt: skip
    device: Annotated[str | None, _option("--device", panel=_PROBLEM, help="cpu, cuda, cuda:1, ...; a GPU where there is one.")] = None  # fmt: skip
    device_map: Annotated[str | None, _option("--device-map", panel=_PROBLEM, help="auto: spread over devices, the CPU and disk what one device cannot hold; disk: everything. Needs accelerate.")] = None  # fmt: skip
    offload_folder: Annotated[str | None, _option("--offload-folder", panel=_PROBLEM, help="Folder for weights that rest on disk.")] = None  # fmt: skip
    vectors: Annotated[str, _option("--vectors", panel=_PROBLEM, help="Where vectors of products rest: device, cpu, disk or a folder.")] = "device"  # fmt: skip
    borders: Annotated[str, _option("--borders", panel=_PROBLEM, help="Where --engine streamed leaves hidden states between blocks: device, cpu, disk or a folder.")] = "device"  # fmt: skip
    objective: Annotated[str, _option("--objective", panel=_PROBLEM, help="nll: mean loss R in nats; perplexity: exp(R).")] = "nll"  # fmt: skip
    loss: Annotated[str, _option("--loss", panel=_PROBLEM, help="next_token; classification: the last token of each sequence only; regression: squared error of logits and one-hot next tokens.")] = "next_token"  # fmt: skip
    dropout: Annotated[str, _option("--dropout", panel=_PROBLEM, help="off, or frozen: one seeded mask a batch.")] = "off"  # fmt: skip
    attention: Annotated[str, _option("--attention", panel=_PROBLEM, help="auto, sdpa, eager or tiled: exact in memory linear in the length. auto is tiled from 1024 tokens on, where the model runs it.")] = "auto"  # fmt: skip
    params: Annotated[list[str] | None, _option("--params", panel=_WHAT, help="Glob over parameter names; may be repeated (a union). '!glob' takes away, 're:...' is a regular expression, 'name[0:4, :8]' a part of one parameter. Every trainable parameter by default.")] = None  # fmt: skip
    layers: Annotated[str | None, _option("--layers", panel=_WHAT, help="Layers by their names inside a block, separated by commas: self_attn.q_proj, q_proj, 'mlp.*' or all; lm_head and the like by their full names.")] = None  # fmt: skip
    blocks: Annotated[str | None, _option("--blocks", panel=_WHAT, help="Blocks of the model: 0,3,11 or 0-5 or :3 or -1 (the last) or all.")] = None  # fmt: skip
    rows: Annotated[str | None, _option("--rows", panel=_WHAT, help="Output units of each layer: 0,5-7.")] = None  # fmt: skip
    first: Annotated[int | None, _option("--first", "-t", panel=_WHAT, help="Only the first so many entries of each layer, row after row.")] = None  # fmt: skip
    random: Annotated[int | None, _option("--random", panel=_WHAT, help="Only so many entries of the whole selection, drawn with --seed.")] = None  # fmt: skip
    indices: Annotated[str | None, _option("--indices", panel=_WHAT, help="JSON file that gives parameters lists of flat indices, or that JSON itself.")] = None  # fmt: skip
    operator: Annotated[str, _option("--operator", panel=_WHAT, help="hessian, ggn, fisher, empirical-fisher, kfac or ekfac.")] = "hessian"  # fmt: skip
    per: Annotated[str | None, _option("--per", panel=_WHAT, help="Gradients of a Fisher matrix, or what the eigenvalues of ekfac are means over: token (default) or sequence.")] = None  # fmt: skip
    samples: Annotated[int | None, _option("--samples", panel=_WHAT, help="Label sets that --operator fisher, kfac and ekfac draw from the model; 1 by default.")] = None  # fmt: skip
    kernel: Annotated[str | None, _option("--kernel", panel=_WHAT, help="What gives a cross-entropy's output Hessian to --operator ggn: auto (default), eager, compile or triton.")] = None  # fmt: skip
    engine: Annotated[str, _option("--engine", panel=_WHAT, help="auto, reverse-over-reverse, forward-over-reverse, reverse-over-forward (all exact) or finite-difference.")] = "auto"  # fmt: skip
    seed: Annotated[int, _option("--seed", panel=_WHAT, help="Seed of every random vector.")] = 0  # fmt: skip
    memory: Annotated[str | None, _option("--memory", panel=_WHAT, help="Reckon with so much memory for the whole process, such as 8GB; what is free by default.")] = None  # fmt: skip
    force: Annotated[bool, _option("--force", panel=_WHAT, help="Run even where the plan says that it does not fit.")] = False  # fmt: skip
    output_dir: Annotated[Path | None, _option("--output-dir", panel=_OUTPUT, help="Folder to write; runs/VERB by default.")] = None  # fmt: skip
    overwrite: Annotated[bool, _option("--overwrite", panel=_OUTPUT, help="Replace a run that is in that folder.")] = False  # fmt: skip
    checkpoint_every: Annotated[float, _option("--checkpoint-every", panel=_OUTPUT, help="Seconds between checkpoints of a long run; the same command continues from the last one.")] = 60.0  # fmt: skip
    restart: Annotated[bool, _option("--restart", panel=_OUTPUT, help="Discard the checkpoint of an earlier run that was to write that folder.")] = False  # fmt: skip
    timeout: Annotated[float, _option("--timeout", panel=_OUTPUT, help="Under torchrun: seconds of silence after which a rank counts as lost and the others stop.")] = 60.0  # fmt: skip
    layout: Annotated[str, _option("--layout", panel=_OUTPUT, help="Under torchrun: data (every rank has the model), fsdp (weights, vectors and bases divided among all ranks) or hsdp (among the ranks of each machine).")] = "data"  # fmt: skip
    probe_groups: Annotated[int, _option("--probe-groups", panel=_OUTPUT, help="Under torchrun: so many groups of ranks divide the vectors of a product (probes, columns); inside a group ranks divide the batches.")] = 1  # fmt: skip
    also_pt: Annotated[bool, _option("--also-pt", panel=_OUTPUT, help="Write result.pt for torch.load as well.")] = False  # fmt: skip
    config: Annotated[Path | None, typer.Option("--config", is_eager=True, callback=read_config, help="YAML or JSON file of options, by their long names; flags win over it.", rich_help_panel=_OUTPUT)] = field(default=None)  # fmt: skip


def with_common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a verb `(common, **own)` the flags of both.

    Typer reads a command's signature; the one it is shown here lists the common options' fields after the verb's own.
    """
    common = _parameters(CommonOptions.__init__, get_type_hints(CommonOptions, include_extras=True), skip="self")
    own = _parameters(command, get_type_hints(command, include_extras=True), skip="common")
    names = [field.name for field in dataclasses.fields(CommonOptions)]

    def verb(**values: Any) -> None:
        common = CommonOptions(**{name: values.pop(name) for name in names})
        folder = result_folder(common, command.__name__.replace("_", "-"))
        with in_ranks(common.timeout, common.probe_groups), stopped_in_words(folder), _within(common):
            command(common, **values)

    verb.__name__, verb.__doc__ = command.__name__, command.__doc__
    parameters = [*own, *common]
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {p.name: p.annotation for p in parameters}
    return verb


def _within(common: CommonOptions) -> AbstractContextManager[object]:
    """The memory that --memory and --force allow, the precision that --precision asks for, and whether its error is measured."""
    from hesscope.arithmetic import precision
    from hesscope.memory import memory_limit
    from hesscope.operators.product_error import stated_errors

    stack = ExitStack()
    if common.memory is not None or common.force:
        stack.enter_context(memory_limit(None if common.force else common.memory))
    stack.enter_context(precision(common.precision))
    stack.enter_context(stated_errors(common.check))
    return stack


def _parameters(function: Callable[..., Any], hints: dict[str, Any], skip: str) -> list[inspect.Parameter]:
    found = inspect.signature(function).parameters.values()
    return [p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in found if p.name != skip]


#: Options of several verbs.
Method = Annotated[
    str,
    typer.Option(
        help="auto, exact, hutchinson, hutch++, xtrace or xnystrace (semidefinite). auto is exact where that costs no more."
    ),
]
BasisDevice = Annotated[
    str | None, typer.Option(help="Keep the basis there, such as cpu; with the weights by default.")
]
BasisFolder = Annotated[Path | None, typer.Option(help="Keep the basis in files of this folder.")]
Estimator = Annotated[
    str,
    typer.Option(
        "--method",
        help="auto, exact, hutchinson, gaussian, deflated, xdiag, nystrom, sampled, per-sequence or control-variate; auto "
        "chooses by a pilot.",
    ),
]
Budget = Annotated[int | None, typer.Option(help="Operator products at most; 100 by default.")]
Absolute = Annotated[bool, typer.Option("--absolute", help="Draw a block's magnitudes |H| instead of its signs.")]
Target = Annotated[float | None, typer.Option(help="Stop at this relative error, such as 0.1; never before 30 probes.")]
