"""Joined text is cut into consecutive windows; separate texts stay separate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import hesscope as hs
from characters import BEGIN, ids, tokenizer
from hesscope.data import Source, sequences_of
from hesscope.data.tokens import require_sequences

ROWS = ["abc", "", "defgh", "ij"]
JOINED = "abc\n\n\n\ndefgh\n\nij"


def rows(*texts: str) -> Source:
    return Source("rows", list(texts), "somewhere")


def texts(*several: str) -> Source:
    return Source("texts", list(several), "somewhere")


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [t.tolist() for t in found] == [t.tolist() for t in expected]


@pytest.mark.parametrize("length", [2, 3, 5, 16])
def test_rows_are_joined_by_a_blank_line_and_cut_into_whole_windows(length: int) -> None:
    tokens = ids(JOINED)
    whole = len(tokens) // length
    found = sequences_of(rows(*ROWS), tokenizer(), length)
    assert len(found) == whole
    assert torch.equal(torch.cat(found), tokens[: whole * length])
    assert {len(t) for t in found} == {length}


def test_the_first_windows_are_taken() -> None:
    assert_same(sequences_of(rows(*ROWS), tokenizer(), 4, sequences=2), [ids("abc\n"), ids("\n\n\nd")])


def test_texts_are_truncated_and_never_joined() -> None:
    assert_same(sequences_of(texts("abcdef", "gh"), tokenizer(), 4), [ids("abcd"), ids("gh")])


def test_texts_without_a_token_to_predict_are_left_out() -> None:
    assert_same(sequences_of(texts("", "a", "bc", ""), tokenizer(), 4), [ids("bc")])
    with pytest.raises(hs.HesscopeError, match="texts of at least two tokens in somewhere; there is none"):
        sequences_of(texts("", "a"), tokenizer(), 4)


def test_packing_joins_texts_too() -> None:
    assert_same(sequences_of(texts("abc", "de"), tokenizer(), 3, pack=True), [ids("abc"), ids("\n\nd")])


def test_special_tokens_begin_each_text_and_joined_text_once() -> None:
    with_begin = tokenizer(begin=True)
    begin = torch.tensor([BEGIN])
    separate = [torch.cat([begin, ids("abc")]), torch.cat([begin, ids("d")])]
    assert_same(sequences_of(texts("abcx", "d"), with_begin, 4), separate)
    joined = torch.cat([begin, ids("abc\n\nde")])
    assert_same(sequences_of(rows("abc", "de"), with_begin, 4), [joined[:4], joined[4:]])


def words_tokenizer(width: int) -> Any:
    """Tokens of `width` characters and a space: more characters a token than any real tokenizer has."""
    vocabulary = {c * width: i for i, c in enumerate("abcd")}
    made = Tokenizer(models.WordLevel({"?": 9} | vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


@pytest.mark.parametrize("width", [1, 15, 16, 40])
def test_reading_only_the_beginning_of_a_long_text_gives_its_first_windows(width: int) -> None:
    """Also where the cut goes through a word, or where tokens are longer than was assumed."""
    order = torch.randint(0, 4, (1000,), generator=torch.Generator().manual_seed(0))
    text = " ".join("abcd"[i] * width for i in order.tolist())
    found = sequences_of(rows(text), words_tokenizer(width), 5, sequences=3)
    assert_same(found, list(order[:15].reshape(3, 5)))


def test_long_text_is_not_tokenised_in_vain() -> None:
    lengths = []

    class Counting:
        def __init__(self) -> None:
            self.inner = tokenizer()

        def __call__(self, text: str, **options: Any) -> Any:
            lengths.append(len(text))
            return self.inner(text, **options)

    sequences_of(rows("abc " * 100_000), Counting(), 8, sequences=2)
    assert max(lengths) < 1000


@pytest.mark.parametrize("pack", [False, True])
def test_too_little_joined_text_is_refused(pack: bool) -> None:
    source = texts(*ROWS) if pack else rows(*ROWS)
    with pytest.raises(hs.HesscopeError, match="somewhere to hold at least one window of 17 tokens, but it has 16"):
        sequences_of(source, tokenizer(), 17, pack=pack)
    with pytest.raises(hs.HesscopeError, match="Expected 6 sequences, but somewhere holds only 5; lower sequences"):
        sequences_of(source, tokenizer(), 3, sequences=6, pack=pack)


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(hs.HesscopeError, match="Expected 3 sequences, but somewhere holds only 2"):
        sequences_of(texts("ab", "cd"), tokenizer(), 3, sequences=3)
    with pytest.raises(hs.HesscopeError, match="Expected sequences to be at least 1, got 0"):
        require_sequences([ids("ab")], 0, "somewhere")


@pytest.mark.parametrize("source", [texts("", "a", "bcd", "ef"), texts("bcd", "", "ef", "")])
def test_as_many_texts_as_wanted_are_found_behind_empty_ones(source: Source) -> None:
    assert_same(sequences_of(source, tokenizer(), 9, sequences=2), [ids("bcd"), ids("ef")])
