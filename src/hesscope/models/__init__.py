"""What hesscope has to know about a model: how to load it, borrow it and hand it back unchanged."""

from hesscope.models.anatomy import Place, Trunk, find_trunk, layer_names, places
from hesscope.models.borrow import borrowed
from hesscope.models.hooked import hooked_logits, is_hooked
from hesscope.models.inspect import context_length, first_nonfinite_module, require_one_device
from hesscope.models.loading import load_model, load_skeleton, load_tokenizer, place_model
from hesscope.models.parameters import aliases, fingerprint, named_parameters, state_key

__all__ = [
    "Place",
    "Trunk",
    "aliases",
    "borrowed",
    "context_length",
    "find_trunk",
    "fingerprint",
    "first_nonfinite_module",
    "hooked_logits",
    "is_hooked",
    "layer_names",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "named_parameters",
    "place_model",
    "places",
    "require_one_device",
    "state_key",
]
