"""Sequences are padded into batches whose padding never counts, and batches that do not fit are refused by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hesscope as hs
from hesscope.data import batches_of_sequences, check_batches
from hesscope.data.batching import require_context, with_labels
from hesscope.losses import CausalLMLoss


def sequence(*tokens: int) -> Tensor:
    return torch.tensor(tokens)


def test_shorter_sequences_are_padded_on_the_right_and_masked() -> None:
    first, second = batches_of_sequences([sequence(5, 6, 7), sequence(8, 9), sequence(1, 2, 3, 4)], 2)
    assert first["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert first["labels"].tolist() == [[5, 6, 7], [8, 9, -100]]
    assert second["input_ids"].tolist() == second["labels"].tolist() == [[1, 2, 3, 4]]
    assert "attention_mask" not in second


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_batches_keep_order_and_targets(batch_size: int) -> None:
    sequences = [torch.arange(1, n) for n in (4, 3, 7, 6, 3)]
    batches = batches_of_sequences(sequences, batch_size)
    assert sum(CausalLMLoss().count(b) for b in batches) == sum(len(s) - 1 for s in sequences)
    rows = [row[row != -100].tolist() for b in batches for row in b["labels"]]
    assert rows == [s.tolist() for s in sequences]
    assert [len(b["input_ids"]) for b in batches][:-1] == [batch_size] * (len(batches) - 1)


def test_no_batch_is_empty() -> None:
    with pytest.raises(hs.HesscopeError, match="batch_size to be at least 1, got 0"):
        batches_of_sequences([sequence(1, 2)], 0)


def test_given_labels_are_left_as_they_are() -> None:
    ids, labels = torch.tensor([[1, 2, 3]]), torch.tensor([[-100, 9, 4]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0]]), "labels": labels}
    assert with_labels(batch)["labels"] is labels


def test_the_token_after_left_padding_has_nothing_before_it() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 4]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4]),
    }
    labels = with_labels(batch)["labels"]
    assert labels.tolist() == [[-100, -100, -100, 6], [7, 8, 9, 4]]
    assert CausalLMLoss().count({"labels": labels}) == 1 + 3


def test_labels_do_not_alias_the_inputs() -> None:
    ids = torch.tensor([[1, 2, 3]])
    with_labels({"input_ids": ids})["labels"].fill_(0)
    assert ids.tolist() == [[1, 2, 3]]


def test_the_first_label_of_a_sequence_never_counts() -> None:
    assert CausalLMLoss().count({"labels": torch.tensor([[3, -100, 4], [5, 6, 7]])}) == 1 + 2


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": torch.zeros(1, 3).long()}, "batch 1 to have input_ids, found ids"),
        ({"input_ids": torch.zeros(3).long()}, r"input_ids of batch 1 .* \[sequences, length\], got \[3\]"),
        ({"input_ids": torch.zeros(1, 3)}, "input_ids of batch 1 to be whole numbers"),
        ({"input_ids": torch.zeros(1, 9).long()}, "batch 1 to have at most 8 tokens, the model's context, got 9"),
        (
            {"input_ids": torch.tensor([[0, 20]])},
            "input_ids of batch 1 between 0 and 19, the model's vocabulary, got 0..20",
        ),
        ({"input_ids": torch.tensor([[0, -1]])}, "input_ids of batch 1 between 0 and 19"),
        (
            {"input_ids": torch.tensor([[0, 1]]), "labels": torch.tensor([[-100, 20]])},
            "labels of batch 1 between 0 and 19, the model's vocabulary, got 20..20",
        ),
        (
            {"input_ids": torch.tensor([[0, 1]]), "labels": torch.tensor([[-1, 2]])},
            "labels of batch 1 between 0 and 19, the model's vocabulary, got -1..2",
        ),
        (
            {"input_ids": torch.zeros(2, 3).long(), "labels": torch.zeros(2, 2).long()},
            r"labels of batch 1 to have the shape of input_ids, \[2, 3\], got \[2, 2\]",
        ),
        (
            {"input_ids": torch.zeros(2, 3).long(), "attention_mask": torch.ones(1, 3).long()},
            "attention_mask of batch 1 to have the shape of input_ids",
        ),
    ],
)
def test_batches_that_do_not_fit_are_refused_by_number(batch: dict[str, Any], message: str) -> None:
    good = {"input_ids": torch.tensor([[1, 2, 3]])}
    with pytest.raises(hs.HesscopeError, match=message):
        check_batches([good, batch], vocabulary=20, context=8)


def test_lists_become_tensors_and_missing_entries_go() -> None:
    (batch,) = check_batches([{"input_ids": [[1, 2]], "attention_mask": None, "labels": [[-100, 2]]}], 20, 8)
    assert batch["input_ids"].tolist() == [[1, 2]]
    assert "attention_mask" not in batch
    assert batch["labels"].tolist() == [[-100, 2]]


def test_masks_that_a_model_brings_along_may_have_more_axes() -> None:
    batch = {"input_ids": torch.zeros(2, 3).long(), "attention_mask": torch.ones(2, 1, 3, 3)}
    batch["labels"] = batch["input_ids"]
    assert check_batches([batch], 20, 8)[0]["attention_mask"].shape == (2, 1, 3, 3)


def test_a_model_without_a_stated_context_takes_any_length() -> None:
    require_context(10_000, None, "it")
