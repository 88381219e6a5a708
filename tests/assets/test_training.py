"""The training that made the embedded model is reproducible and learns."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from hesscope.assets import prose
from hesscope.assets.train import WARM_UP, WINDOW, byte_ids, initial_model, main, rate_share, sample_windows, train


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return byte_ids(prose("train")[:20_000])


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesscope.assets.train.BATCH", 2)


def weights(model: LlamaForCausalLM) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def test_the_same_seed_gives_the_same_weights(ids: torch.Tensor) -> None:
    first, second, other = (weights(train(3, seed, ids)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_training_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    initial_model(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_windows_are_consecutive_bytes() -> None:
    windows = sample_windows(torch.arange(2_000), torch.Generator().manual_seed(0))
    assert (windows.diff(dim=1) == 1).all()


def test_the_shortest_text_is_one_window() -> None:
    windows = sample_windows(torch.arange(WINDOW), torch.Generator().manual_seed(0))
    assert (windows == torch.arange(WINDOW)).all()


def test_the_rate_warms_up_and_decays() -> None:
    steps = 10 * WARM_UP
    shares = torch.tensor([rate_share(step, steps) for step in range(steps)])
    assert (shares[:WARM_UP].diff() > 0).all()
    assert (shares[WARM_UP:].diff() < 0).all()
    assert shares.max() == 1
    assert shares[-1] < 0.03


def test_the_command_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--output-dir", str(tmp_path), "--steps", "1", "--seed", "3"])
    record = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert (record["steps"], record["seed"]) == (1, 3)
    assert 4 < record["held_out_nats_per_byte"] < 6.5
    assert json.loads(capsys.readouterr().out) == record
