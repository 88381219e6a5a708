"""A tokenizer without a learned vocabulary: the token ids are the bytes of the UTF-8 text."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BYTES = 256


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token ids equal the UTF-8 bytes, for a model of `max_length` positions."""
    backend = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=max_length, clean_up_tokenization_spaces=False
    )


def _vocabulary() -> dict[str, int]:
    # The byte-level alphabet writes a byte that is no visible Latin-1 character as the next free one from 256 on.
    hidden = [byte for byte in range(BYTES) if not _visible(byte)]
    symbols = {byte: chr(BYTES + place) for place, byte in enumerate(hidden)}
    return {symbols.get(byte, chr(byte)): byte for byte in range(BYTES)}


def _visible(byte: int) -> bool:
    soft_hyphen = 0xAD
    return 0x21 <= byte <= 0x7E or (byte >= 0xA1 and byte != soft_hyphen)
