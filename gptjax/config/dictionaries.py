"""Configs as nested dicts of plain values, for JSON, and back."""

import dataclasses
import json
import typing
from typing import Any, TypeVar

from gptjax.config.checks import InputError, near_names, shown

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested dicts of plain values, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[Config], values: dict[str, Any], where: str = "config.json") -> Config:
    """A config of class `kind` from nested dicts; `where` names them in an error.

    Raises:
      InputError: a field that `kind` lacks, or a value that it does not accept.
    """
    hints = typing.get_type_hints(kind)
    if not isinstance(values, dict):
        what = f"the fields of {kind.__name__}"
        raise InputError(f"{where} holds {shown(values)} where {what} belong.")
    for name in values:
        if name not in hints:
            raise InputError(
                f"{where} has an unknown field {shown(name)}: {near_names(name, hints)}"
            )
    nested = {
        name: from_dict(hints[name], value, f"{where}: {name}")
        if dataclasses.is_dataclass(hints[name])
        else tuple(value)
        if typing.get_origin(hints[name]) is tuple and isinstance(value, list)
        else value
        for name, value in values.items()
    }
    return kind(**nested)


def differences(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two nested dicts differ, as `model.depth: 4 -> 6`."""
    found = []
    for name in [*first, *(name for name in second if name not in first)]:
        old, new = first.get(name), second.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {old} -> {new}")
    return found
