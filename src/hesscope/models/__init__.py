"""What hesscope has to know about a model: how to load it, borrow it and hand it back unchanged."""

from hesscope.models.anatomy import Place, Trunk, find_trunk, layer_names, places
from hesscope.models.borrow import borrowed
from hesscope.models.elsewhere import device_of, devices_of, elsewhere, sharded, values_of
from hesscope.models.hooked import hooked_logits, is_hooked
from hesscope.models.inspect import (
    context_length,
    first_nonfinite_module,
    is_shadow,
    mark_as_shadow,
    require_one_device,
)
from hesscope.models.loading import load_model, load_skeleton, load_tokenizer, place_model
from hesscope.models.offload import Offloaded, Reload, offloaded
from hesscope.models.parameters import (
    aliases,
    class_name,
    fingerprint,
    is_sharded,
    named_parameters,
    state_key,
    unwrapped,
)
from hesscope.models.sharded import Sharded, is_fully_sharded, without_weights

__all__ = [
    "Offloaded",
    "Place",
    "Reload",
    "Sharded",
    "Trunk",
    "aliases",
    "borrowed",
    "class_name",
    "context_length",
    "device_of",
    "devices_of",
    "elsewhere",
    "find_trunk",
    "fingerprint",
    "first_nonfinite_module",
    "hooked_logits",
    "is_fully_sharded",
    "is_hooked",
    "is_shadow",
    "is_sharded",
    "layer_names",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "mark_as_shadow",
    "named_parameters",
    "offloaded",
    "place_model",
    "places",
    "require_one_device",
    "sharded",
    "state_key",
    "unwrapped",
    "values_of",
    "without_weights",
]
