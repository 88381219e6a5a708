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
WINDOW = 4

_SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2}
_SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_ROTARY: dict[str, Any] = {
    **_SMALL,
    **_SPECIAL,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny model, and which of its own operations run in float32 whatever the dtype of its weights.

    Only casts of what depends on a weight are named: rotary angles are cast as well, but are the same in every run.
    """

    make: Callable[..., nn.Module]
    casts: str = ""


def llama(**more: Any) -> nn.Module:
    return T.LlamaForCausalLM(T.LlamaConfig(**_ROTARY | {"tie_word_embeddings": True} | more))


def gpt2(**more: Any) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return T.GPT2LMHeadModel(T.GPT2Config(**_SPECIAL | sizes | more))


def opt(**more: Any) -> nn.Module:
    sizes = {"ffn_dim": 12, "num_attention_heads": 2, "max_position_embeddings": CONTEXT, "word_embed_proj_dim": 8}
    return T.OPTForCausalLM(T.OPTConfig(**_SMALL | _SPECIAL | sizes | more))


def gpt_neox(**more: Any) -> nn.Module:
    sizes = {"intermediate_size": 12, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    return T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**_SMALL | _SPECIAL | sizes | more))


def qwen2(**more: Any) -> nn.Module:
    return T.Qwen2ForCausalLM(T.Qwen2Config(**_ROTARY | more))


def qwen3(**more: Any) -> nn.Module:
    return T.Qwen3ForCausalLM(T.Qwen3Config(**_ROTARY | {"head_dim": 4} | more))


def mistral(**more: Any) -> nn.Module:
    return T.MistralForCausalLM(T.MistralConfig(**_ROTARY | {"head_dim": 4, "sliding_window": WINDOW} | more))


def gemma2(**more: Any) -> nn.Module:
    return T.Gemma2ForCausalLM(T.Gemma2Config(**_ROTARY | {"head_dim": 4, "sliding_window": WINDOW} | more))


def gemma3(**more: Any) -> nn.Module:
    sizes = {"head_dim": 4, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    return T.Gemma3ForCausalLM(T.Gemma3TextConfig(**_ROTARY | sizes | more))


def mixtral(**more: Any) -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return T.MixtralForCausalLM(T.MixtralConfig(**_ROTARY | experts | more))


def qwen3_moe(**more: Any) -> nn.Module:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "head_dim": 4}
    return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**_ROTARY | experts | more))


def llama4(**more: Any) -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 12}
    sizes = {"head_dim": 4, "attention_chunk_size": WINDOW, "interleave_moe_layer_step": 2}
    return T.Llama4ForCausalLM(T.Llama4TextConfig(**_ROTARY | experts | sizes | more))


def bloom(**more: Any) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "n_layer": 2, "n_head": 2}
    return T.BloomForCausalLM(T.BloomConfig(**_SPECIAL | sizes | more))


def phi(**more: Any) -> nn.Module:
    return T.PhiForCausalLM(T.PhiConfig(**_ROTARY | {"num_key_value_heads": 4} | more))


def phi3(**more: Any) -> nn.Module:
    return T.Phi3ForCausalLM(T.Phi3Config(**_ROTARY | more))


def falcon(**more: Any) -> nn.Module:
    return T.FalconForCausalLM(T.FalconConfig(**_SMALL | _SPECIAL | {"num_attention_heads": 2} | more))


def jamba(**more: Any) -> nn.Module:
    """Two kinds of blocks take turns, and two kinds of feed-forward."""
    state = {"mamba_d_state": 4, "mamba_dt_rank": 2, "num_hidden_layers": 4}
    turns = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    return T.JambaForCausalLM(T.JambaConfig(**_ROTARY | state | turns | {"num_experts": 2} | more))


def gpt_oss(**more: Any) -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4, "sliding_window": WINDOW}
    return T.GptOssForCausalLM(T.GptOssConfig(**_ROTARY | experts | more))


def t5(**more: Any) -> nn.Module:
    """Relative positions, RMSNorm, tied embeddings."""
    sizes = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return T.T5ForConditionalGeneration(T.T5Config(**sizes | special | more))


def bart(**more: Any) -> nn.Module:
    """Learned positions, LayerNorm, a bias on the logits that is no parameter."""
    sizes_of_a_side = (("layers", 1), ("attention_heads", 2), ("ffn_dim", 12))
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in sizes_of_a_side}
    sizes = {"vocab_size": VOCABULARY, "d_model": 8, "max_position_embeddings": CONTEXT, "decoder_start_token_id": 2}
    return T.BartForConditionalGeneration(T.BartConfig(**_SPECIAL | sizes | sides | more))


def bert(**more: Any) -> nn.Module:
    sizes = {"intermediate_size": 12, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
    return T.BertForMaskedLM(T.BertConfig(**_SMALL | sizes | more))


ARCHITECTURES = {
    "llama": Architecture(llama, "RMSNorm"),
    "gpt2": Architecture(gpt2),
    "opt": Architecture(opt),
    "gpt-neox": Architecture(gpt_neox),
    "qwen2": Architecture(qwen2, "RMSNorm"),
    "qwen3": Architecture(qwen3, "RMSNorm, of queries and keys too"),
    "mistral": Architecture(mistral, "RMSNorm"),
    "gemma2": Architecture(gemma2, "RMSNorm; the softmax of eager attention, which its soft caps need"),
    "gemma3": Architecture(gemma3, "RMSNorm, of queries and keys too"),
    "mixtral": Architecture(mixtral, "RMSNorm; the router's softmax"),
    "qwen3-moe": Architecture(qwen3_moe, "RMSNorm, of queries and keys too; the router's softmax"),
    "llama4": Architecture(llama4, "RMSNorm; rotary embeddings, as complex64"),
    "bloom": Architecture(bloom, "the softmax of its own attention"),
}

ENCODER_DECODERS = {"t5": Architecture(t5, "RMSNorm"), "bart": Architecture(bart)}

#: Models of which only the structure is looked at.
STRUCTURES: dict[str, Callable[..., nn.Module]] = {
    "phi": phi,
    "phi3": phi3,
    "falcon": falcon,
    "jamba": jamba,
    "gpt-oss": gpt_oss,
    "t5": t5,
    "bert": bert,
}


def tiny(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **more: Any) -> Any:
    """A tiny model in evaluation mode, its weights far enough from initialisation for curvature between all of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        known = ARCHITECTURES | ENCODER_DECODERS
        make = known[name].make if name in known else STRUCTURES[name]
        model = make(**more).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.to(dtype)


def ragged_batches() -> list[dict[str, Tensor]]:
    """Three batches of different sizes and lengths: padded, with labels of their own, and plain.

    Padding stays shorter than the sliding windows. Behind longer padding a position sees nothing at all, and Gemma 2 in
    float64 turns that into NaN by itself, for its mask is the least float64, cast to float32 before the softmax.
    """
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=g)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, 4:] = 0
    ids[mask == 0] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=g)
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 4] = -100
    labels[1, 2] = 7  # obeyed, though it is not the input
    labelled = {"input_ids": ids, "labels": labels}
    return [padded, labelled, {"input_ids": torch.randint(3, VOCABULARY, (1, 3), generator=g)}]


def ragged_pairs() -> list[dict[str, Tensor]]:
    """Three batches of source tokens and labels for an encoder-decoder, padded and ignored here and there."""
    g = torch.Generator().manual_seed(0)
    sources = [torch.randint(3, VOCABULARY, shape, generator=g) for shape in ((3, 6), (2, 4), (1, 5))]
    labels = [torch.randint(3, VOCABULARY, shape, generator=g) for shape in ((3, 4), (2, 5), (1, 2))]
    masks = [torch.ones_like(ids) for ids in sources]
    masks[0][1, 4:], sources[0][1, 4:] = 0, 0
    labels[0][2, 2:] = -100
    labels[1][0, 0] = -100
    return [{"input_ids": s, "attention_mask": m, "labels": y} for s, m, y in zip(sources, masks, labels, strict=True)]
