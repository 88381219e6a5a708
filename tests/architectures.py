"""Tiny random language models of many architectures, and ragged batches to run them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

VOCABULARY = 37
CONTEXT = 16

_SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2}
_ROTARY: dict[str, Any] = {
    **_SMALL,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny model, and which of its own operations run in float32 whatever its dtype."""

    make: Callable[[], nn.Module]
    casts: str = ""


def llama() -> nn.Module:
    return T.LlamaForCausalLM(T.LlamaConfig(**_ROTARY, tie_word_embeddings=True))


def gpt2() -> nn.Module:
    sizes = {"n_positions": CONTEXT, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return T.GPT2LMHeadModel(T.GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes))


def opt() -> nn.Module:
    sizes = {"ffn_dim": 12, "num_attention_heads": 2, "max_position_embeddings": CONTEXT, "word_embed_proj_dim": 8}
    return T.OPTForCausalLM(T.OPTConfig(**_SMALL, **sizes, pad_token_id=1))


def gpt_neox() -> nn.Module:
    sizes = {"intermediate_size": 12, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    return T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**_SMALL, **sizes, bos_token_id=1, eos_token_id=2))


def qwen2() -> nn.Module:
    return T.Qwen2ForCausalLM(T.Qwen2Config(**_ROTARY))


def qwen3() -> nn.Module:
    return T.Qwen3ForCausalLM(T.Qwen3Config(**_ROTARY, head_dim=4))


def mistral() -> nn.Module:
    return T.MistralForCausalLM(T.MistralConfig(**_ROTARY, head_dim=4, sliding_window=4))


def gemma2() -> nn.Module:
    return T.Gemma2ForCausalLM(T.Gemma2Config(**_ROTARY, head_dim=4, sliding_window=4))


def gemma3() -> nn.Module:
    layers = ["sliding_attention", "full_attention"]
    return T.Gemma3ForCausalLM(T.Gemma3TextConfig(**_ROTARY, head_dim=4, sliding_window=4, layer_types=layers))


def mixtral() -> nn.Module:
    return T.MixtralForCausalLM(T.MixtralConfig(**_ROTARY, num_local_experts=4, num_experts_per_tok=2))


def qwen3_moe() -> nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "decoder_sparse_step": 1}
    return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**_ROTARY, head_dim=4, **experts))


def llama4() -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 12, "interleave_moe_layer_step": 2}
    return T.Llama4ForCausalLM(T.Llama4TextConfig(**_ROTARY, head_dim=4, attention_chunk_size=4, **experts))


def bloom() -> nn.Module:
    config = T.BloomConfig(vocab_size=VOCABULARY, hidden_size=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    return T.BloomForCausalLM(config)


ARCHITECTURES = {
    "llama": Architecture(llama, "RMSNorm"),
    "gpt2": Architecture(gpt2),
    "opt": Architecture(opt),
    "gpt-neox": Architecture(gpt_neox),
    "qwen2": Architecture(qwen2, "RMSNorm"),
    "qwen3": Architecture(qwen3, "RMSNorm, of queries and keys too"),
    "mistral": Architecture(mistral, "RMSNorm"),
    "gemma2": Architecture(gemma2, "RMSNorm, eager softmax (soft caps keep it from SDPA)"),
    "gemma3": Architecture(gemma3, "RMSNorm, of queries and keys too"),
    "mixtral": Architecture(mixtral, "RMSNorm, the router's softmax"),
    "qwen3-moe": Architecture(qwen3_moe, "RMSNorm, the router's softmax"),
    "llama4": Architecture(llama4, "RMSNorm, the router's sigmoid, rotary embeddings as complex64"),
    "bloom": Architecture(bloom, "softmax of attention scores"),
}


def tiny(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A tiny model in evaluation mode, its weights far enough from initialisation for curvature between all of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[name].make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.to(dtype)


def ragged_batches() -> list[dict[str, Tensor]]:
    """Three batches of different sizes and lengths: padded, with labels of their own, and plain."""
    g = torch.Generator().manual_seed(0)
    padded = {"input_ids": torch.randint(3, VOCABULARY, (3, 7), generator=g), "attention_mask": torch.ones(3, 7).long()}
    padded["attention_mask"][1, 4:] = 0
    padded["attention_mask"][2, 2:] = 0
    padded["input_ids"][padded["attention_mask"] == 0] = 1
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=g)
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 4] = -100
    labels[1, 2] = 7  # obeyed, though it is not the input
    return [padded, {"input_ids": ids, "labels": labels}, {"input_ids": torch.randint(3, VOCABULARY, (1, 3), generator=g)}]
