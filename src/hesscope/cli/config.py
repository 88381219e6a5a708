"""A file of options in place of flags."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import typer

from hesscope.errors import HesscopeError


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of this command; flags given beside it win.

    Raises HesscopeError for a missing or unreadable file, or an option that the verb does not have.
    """
    if path is None:
        return None
    known = {parameter.name for parameter in context.command.params}
    values = {key.replace("-", "_"): value for key, value in _parse(path).items()}
    unknown = sorted(set(values) - known)
    if unknown:
        raise HesscopeError(
            f"Expected options of this command in {path.name}, got {unknown[0].replace('_', '-')!r}; see --help."
        )
    context.default_map = {**(context.default_map or {}), **{key: _as_flag(key, v) for key, v in values.items()}}
    return path


def _as_flag(name: str, value: Any) -> Any:
    """A value in the form that the flag of that name takes."""
    if name == "params" and isinstance(value, str):
        return [value]
    if name in ("layers", "blocks", "rows") and isinstance(value, list):
        return ",".join(map(str, value))
    return json.dumps(value) if name == "indices" and isinstance(value, dict) else value


def read_indices(given: str) -> dict[str, list[int]]:
    """{parameter: flat indices} from a JSON file, or from JSON itself; raises HesscopeError for anything else."""
    is_json = given.lstrip().startswith("{")
    try:
        found = json.loads(given if is_json else Path(given).read_text(encoding="utf-8"))
    except OSError as error:
        raise HesscopeError(f"Could not read the file of indices {given!r}: {error.strerror}.") from error
    except ValueError as error:
        raise HesscopeError(f"Expected the indices as JSON, {{parameter: [flat indices]}}: {error}") from error
    if not isinstance(found, dict) or not all(_is_indices(value) for value in found.values()):
        raise HesscopeError("Expected the indices as {parameter: [flat indices]}, every one a list of whole numbers.")
    return found


def _is_indices(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def _parse(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, _loader())  # a safe loader's child
    except OSError as error:
        raise HesscopeError(f"Could not read the options file {path.name!r}: {error.strerror}.") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise HesscopeError(f"Expected {path.name} to be YAML or JSON: {reason}") from error
    if not isinstance(values, dict):
        raise HesscopeError(f"Expected {path.name} to map option names to values, got {type(values).__name__}.")
    return {str(key): value for key, value in values.items()}


def _loader() -> Any:
    """YAML's safe loader, for which 1:30 is text, as it is for a flag, and not a time in seconds."""
    import yaml

    number = "tag:yaml.org,2002:int"
    forms = {
        start: [(tag, form) for tag, form in known if tag != number]
        for start, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader: Any = type("Loader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": forms})
    Loader.add_implicit_resolver(number, re.compile(r"[-+]?\d+$"), list("-+0123456789"))
    return Loader
