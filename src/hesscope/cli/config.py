"""A file of options in place of flags."""

from __future__ import annotations

import json
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
    if isinstance(values.get("params"), str):
        values["params"] = [values["params"]]
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _parse(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise HesscopeError(f"Could not read the options file {path.name!r}: {error.strerror}.") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise HesscopeError(f"Expected {path.name} to be YAML or JSON: {reason}") from error
    if not isinstance(values, dict):
        raise HesscopeError(f"Expected {path.name} to map option names to values, got {type(values).__name__}.")
    return {str(key): value for key, value in values.items()}
