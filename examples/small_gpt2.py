"""One attention layer of a small random GPT-2, block and diagonal: `python examples/small_gpt2.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hesscope as hs

LAYER = "transformer.h.1.attn.c_attn.weight"


def random_gpt2() -> GPT2LMHeadModel:
    """Two blocks of width 16, untrained."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def main(output_dir: Path) -> None:
    # Token ids [sequences, length] need no tokenizer. float64 costs little at this size.
    tokens = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    problem = hs.causal_lm(random_gpt2(), tokens, batch_size=4, dtype="float64")
    print(f"{problem.N} target tokens, loss {problem.risk():.3f} nats; log 64 = 4.159 is a uniform guess")

    # GPT-2 stores [inputs, outputs], so a column holds the weights of one output unit. Queries, keys and values stand
    # side by side, 16 columns each: column 32 is the first value unit.
    unit = hs.select(problem, f"{LAYER}[:, 32]")
    block = hs.block(hs.hessian(problem, unit))
    print(f"{block.labels[0]} to {block.labels[-1]}")
    print(block.summary())

    layer = hs.hessian(problem, hs.select(problem, LAYER))
    exact = hs.diagonal(layer, method="exact")
    estimate = hs.diagonal(layer, budget=60)
    error = (estimate.flat() - exact.flat()).norm() / exact.flat().norm()
    print(exact.summary())
    print(estimate.summary())
    print(f"the estimate's true error is {error:.2g}: it said about {estimate.relative_error:.2g}")

    output_dir.mkdir(parents=True, exist_ok=True)
    print("drawn:", block.plot(output_dir / "block.png"), exact.plot(output_dir / "diagonal.png"))


if __name__ == "__main__":
    main(Path("runs/small-gpt2"))
