"""What hesscope has to know about a model: how to load it, borrow it and hand it back unchanged."""

from hesscope.models.borrow import borrowed
from hesscope.models.inspect import context_length, first_nonfinite_module, require_one_device
from hesscope.models.loading import load_model, load_skeleton, load_tokenizer, place_model
from hesscope.models.parameters import aliases, fingerprint, named_parameters, state_key

__all__ = [
    "aliases",
    "borrowed",
    "context_length",
    "fingerprint",
    "first_nonfinite_module",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "named_parameters",
    "place_model",
    "require_one_device",
    "state_key",
]
