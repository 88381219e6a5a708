"""The package's own small trained language model and the English text it was trained on."""

from pathlib import Path

from hesscope.assets.text import Split, prose

__all__ = ["Split", "model_path", "prose"]


def model_path() -> Path:
    """Return the folder of the embedded byte-level model, in ordinary Hugging Face form."""
    return Path(__file__).parent / "demo_model"
