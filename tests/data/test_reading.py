"""Every form in which data may arrive, and what is said of those that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict

import hesscope as hs
from hesscope.data import read

TEXTS = ["abc", "", "de\nf"]


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that `datasets` prepares go to the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_text_file_is_one_text_to_be_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("abc\n\nä", encoding="utf-8")
    for data in (path, str(path)):
        source = read(data)
        assert (source.kind, source.items, source.name) == ("rows", ["abc\n\nä"], "x.txt")


def test_json_lines_are_separate_texts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": t} for t in TEXTS])
    path.write_text(path.read_text(encoding="utf-8").replace("\n", "\n\n"), encoding="utf-8")  # blank lines do no harm
    assert (read(path).kind, read(path).items) == ("texts", TEXTS)


def test_json_lines_may_hold_line_separators_of_other_alphabets(tmp_path: Path) -> None:
    """`str.splitlines` would break a text at U+2028, which JSON leaves as it is."""
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x0cc"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read(path).items == ["a\u2028b\x0cc"]


def test_a_parquet_file_holds_separate_texts(tmp_path: Path) -> None:
    Dataset.from_dict({"text": TEXTS, "story": TEXTS[::-1]}).to_parquet(str(tmp_path / "x.parquet"))
    assert (read(tmp_path / "x.parquet").kind, read(tmp_path / "x.parquet").items) == ("texts", TEXTS)
    assert read(tmp_path / "x.parquet", text_column="story").items == TEXTS[::-1]


def test_a_dataset_holds_rows_to_be_joined() -> None:
    loaded = Dataset.from_dict({"text": TEXTS})
    assert (read(loaded).kind, read(loaded).items) == ("rows", TEXTS)
    assert read(loaded.to_iterable_dataset()).items == TEXTS
    assert read(loaded.rename_column("text", "story"), text_column="story").items == TEXTS


def test_a_dataset_on_disk(tmp_path: Path) -> None:
    loaded = Dataset.from_dict({"text": TEXTS})
    loaded.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": loaded}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "files").mkdir()
    loaded.to_parquet(str(tmp_path / "files" / "train.parquet"))
    assert read(tmp_path / "one").items == TEXTS
    assert read(tmp_path / "splits", split="train").items == TEXTS
    assert read(tmp_path / "files", split="train").items == TEXTS
    for name in ("splits", "files"):
        with pytest.raises(hs.HesscopeError, match=r"Expected split= for the dataset .*, which has train"):
            read(tmp_path / name)
        with pytest.raises(hs.HesscopeError, match=f"Could not read the dataset .*{name}.*: .*nope"):
            read(tmp_path / name, split="nope")


def test_a_tokenised_dataset_keeps_its_masks_and_labels() -> None:
    rows = {"input_ids": [[1, 2], [3, 4, 5]], "labels": [[1, 2], [-100, 4, 5]], "other": ["x", "y"]}
    source = read(Dataset.from_dict(rows))
    assert source.kind == "batches"
    assert [set(b) for b in source.items] == [{"input_ids", "labels"}] * 2
    assert source.items[1]["labels"].tolist() == [[-100, 4, 5]]


def test_token_ids() -> None:
    matrix = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    for data in (matrix, list(matrix), [[1, 2], [3, 4]], [(1, 2), (3, 4)]):
        source = read(data)
        assert source.kind == "sequences"
        assert [(t.tolist(), t.dtype) for t in source.items] == [([1, 2], torch.int64), ([3, 4], torch.int64)]


def test_batches() -> None:
    batch = {"input_ids": torch.ones(1, 2).long(), "position_ids": torch.ones(1, 2).long()}
    for data in ([batch], iter([batch]), (batch for _ in range(1)), [batch["input_ids"]]):
        source = read(data)
        assert source.kind == "batches"
        assert torch.equal(source.items[0]["input_ids"], batch["input_ids"])
    assert set(read([batch]).items[0]) == set(batch)


def test_a_list_of_texts() -> None:
    for data in (TEXTS, tuple(TEXTS), iter(TEXTS), (t for t in TEXTS)):
        source = read(data)
        assert (source.kind, source.items) == ("texts", TEXTS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("missing.txt", "Expected a data file at 'missing.txt'; there is none"),
        ("missing.jsonl", "Expected a data file at 'missing.jsonl'"),
        ([], "Expected at least one text or batch, got none; an iterator that was read before is empty"),
        (iter([]), "an iterator that was read before is empty"),
        ({"input_ids": torch.ones(1, 2).long()}, "wrap a single batch in a list"),
        (3, "got int"),
        (["abc", 3], "Expected every row of list to be text; row 1 is int"),
        ([object()], "got a list of object"),
        (torch.ones(2, 2), r"token ids of shape \[sequences, length\], got torch.float32 of shape \[2, 2\]"),
        (torch.ones(4).long(), r"token ids of shape \[sequences, length\], got torch.int64 of shape \[4\]"),
        ([torch.ones(1, 2)], "token ids of shape"),
        (
            Dataset.from_dict({"body": ["x"]}),
            "Expected a column 'text' \\(or input_ids\\) in the dataset, found body; pass text_column=",
        ),
        (Dataset.from_dict({"text": ["x", None]}), "row 1 is NoneType"),
        (DatasetDict({"train": Dataset.from_dict({"text": ["x"]})}), "got all of train; pass dataset\\[split\\]"),
    ],
)
def test_complaints(data: Any, message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        read(data)


def test_files_that_are_not_what_they_seem(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(hs.HesscopeError, match=r"Expected x.txt to be UTF-8 text"):
        read(tmp_path / "x.txt")
    (tmp_path / "x.csv").write_text("a,b", encoding="utf-8")
    with pytest.raises(hs.HesscopeError, match=r"ending in .jsonl, .parquet, .txt, got 'x.csv'"):
        read(tmp_path / "x.csv")
    for row in ({"body": "x"}, ["x"], 3):
        path = write_jsonl(tmp_path / "x.jsonl", [{"text": "x"}, row])
        with pytest.raises(
            hs.HesscopeError, match=r"Expected line 2 of x.jsonl to be a JSON object with 'text'; pass text_column="
        ):
            read(path)
    (tmp_path / "x.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(hs.HesscopeError, match=r"Expected line 1 of x.jsonl"):
        read(tmp_path / "x.jsonl")
    write_jsonl(tmp_path / "x.jsonl", [{"text": None}])
    with pytest.raises(hs.HesscopeError, match="row 0 is NoneType"):
        read(tmp_path / "x.jsonl")
    write_jsonl(tmp_path / "x.jsonl", [])
    assert read(tmp_path / "x.jsonl").items == []
