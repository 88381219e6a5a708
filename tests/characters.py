"""A tokenizer whose tokens are characters, so that a test can write down the ids it expects."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

UNKNOWN, BEGIN = 0, 1
ALPHABET = {c: i for i, c in enumerate("\n ." + string.ascii_lowercase, 2)}


def tokenizer(begin: bool = False) -> Any:
    """One token a character of `ALPHABET`; with `begin`, a special token before every text."""
    made = Tokenizer(WordLevel({"<unk>": UNKNOWN, "<s>": BEGIN} | ALPHABET, unk_token="<unk>"))
    made.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    if begin:
        made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>")


def ids(text: str) -> Tensor:
    """The tokens of a text."""
    return torch.tensor([ALPHABET[c] for c in text])
