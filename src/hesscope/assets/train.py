"""Train the embedded byte-level language model anew: `python -m hesscope.assets.train --output-dir DIR`."""

import argparse
import hashlib
import json
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from hesscope.assets.byte_tokenizer import BYTES, byte_tokenizer
from hesscope.assets.text import prose

POSITIONS = 512
WINDOW = 512
BATCH = 8
STEPS = 1200
WARM_UP = 100
PEAK_RATE = 2e-3
FINAL_SHARE = 0.02
WEIGHT_DECAY = 1.0
GRADIENT_NORM = 1.0

Progress = Callable[[int, float], None]


def byte_ids(text: str) -> torch.Tensor:
    """Return the UTF-8 bytes of `text` as a vector of token ids."""
    return torch.tensor(list(text.encode()), dtype=torch.long)


def train(steps: int, seed: int, ids: torch.Tensor, progress: Progress | None = None) -> LlamaForCausalLM:
    """Return a model trained for `steps` steps on the token ids `ids`, the same one for the same `seed`.

    `progress` is called after each step with the number of steps done and the loss in nats per byte.
    """
    model = initial_model(seed)
    sampler = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, steps))
    for step in range(1, steps + 1):
        loss = _step(model, optimizer, sample_windows(ids, sampler))
        schedule.step()
        if progress is not None:
            progress(step, loss)
    return model.eval()


def initial_model(seed: int) -> LlamaForCausalLM:
    """Return the untrained model with the weights that `seed` draws, leaving torch's global generator as it was."""
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).train()


def sample_windows(ids: torch.Tensor, sampler: torch.Generator) -> torch.Tensor:
    """Return a batch of windows of `ids` that start at random places, shape (BATCH, WINDOW)."""
    starts = torch.randint(len(ids) - WINDOW + 1, (BATCH, 1), generator=sampler)
    return ids[starts + torch.arange(WINDOW)]


def rate_share(step: int, steps: int) -> float:
    """Return the share of the peak learning rate at `step`: a linear warm-up, then a cosine decay."""
    warm_up = min(WARM_UP, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Return the mean loss in nats per predicted byte over `ids`, cut in consecutive windows of `POSITIONS` bytes."""
    # A last window of one byte predicts nothing.
    windows = [window for window in torch.split(ids, POSITIONS) if len(window) > 1]
    total = sum(_total_loss(model, window[None]).item() for window in windows)
    return total / sum(len(window) - 1 for window in windows)


def save(model: LlamaForCausalLM, output_dir: Path, steps: int, seed: int) -> dict[str, object]:
    """Write model, tokenizer and `training.json` to `output_dir`, and return what `training.json` says."""
    held_out = prose("held_out")
    model.save_pretrained(output_dir)
    # Without begin and end tokens the generation settings say nothing.
    (output_dir / "generation_config.json").unlink(missing_ok=True)
    byte_tokenizer(POSITIONS).save_pretrained(output_dir)
    record: dict[str, object] = {
        "held_out_nats_per_byte": round(mean_loss(model, byte_ids(held_out)), 4),
        "held_out_sha256": hashlib.sha256(held_out.encode()).hexdigest(),
        "parameters": model.num_parameters(),
        "steps": steps,
        "seed": seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (output_dir / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save and measure a model as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m hesscope.assets.train", description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("demo_model"), help="folder to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (%(default)s)")
    options = parser.parse_args(arguments)
    model = train(options.steps, options.seed, byte_ids(prose("train")), _print_progress)
    print(json.dumps(save(model, options.output_dir, options.steps, options.seed), indent=2))


def _optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    scales = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))


def _step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    loss = _total_loss(model, batch) / batch[:, 1:].numel()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    optimizer.step()
    return loss.item()


def _total_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=windows, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")


def _print_progress(step: int, loss: float) -> None:
    if step % 50 == 0:
        print(f"step {step}: {loss:.3f} nats per byte", flush=True)


if __name__ == "__main__":
    main()
