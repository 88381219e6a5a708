"""Helpers beside this file can be imported whatever the import mode; fixtures that several folders use."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# Workers share the cores: a thread each, before torch is imported; what tests start inherits it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job in the background inherits an interrupt that is ignored; the tests of interrupts need Python's own.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared" / "assets"


@pytest.fixture(scope="session")
def stories() -> tuple[Path, Path]:
    """A trained Llama of 260 thousand parameters and whole stories, kept beside the project."""
    model, texts = SHARED / "stories260k", SHARED / "text" / "tinystories_sample.jsonl"
    if not (model.is_dir() and texts.is_file()):
        pytest.skip("shared/assets, with stories260k and the TinyStories sample, is not beside this checkout")
    return model, texts


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and the tokenizer of `characters`, saved as Hugging Face does; the weights are stored in bfloat16."""
    import torch

    from architectures import tiny
    from characters import tokenizer

    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny("llama", torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
