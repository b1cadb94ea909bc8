"""Validation of configs: an error is one sentence with field, value and what is accepted."""

import difflib
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

LONGEST_SHOWN = 200
"""Characters of a value shown in an error."""
MOST_LISTED = 20
"""Directories listed in an error."""

SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Normal float32 magnitudes; a device may flush subnormal numbers to 0."""
WHOLE = 1 << 32
"""Upper bound of whole numbers, exclusive: devices use 32-bit integers."""
MOST_DIGITS = 18
"""Digits of a whole number in a text: more would not fit into 64 bits."""


class InputError(ValueError):
    """A mistake in the user's input; its message is one sentence for the user."""


def near_names(name: str, known: Iterable[str]) -> str:
    """End of the error for an unknown `name`: close matches among `known`, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name[:LONGEST_SHOWN], known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}."


def near_directories(path: Path) -> str:
    """End of the error for a missing directory: close matches beside it, or all."""
    try:
        directories = [each.name for each in path.parent.iterdir() if each.is_dir()]
    except OSError:
        return f"there is no directory {path.parent}."
    beside = sorted(name for name in directories if not name.startswith("."))
    near = difflib.get_close_matches(path.name[:LONGEST_SHOWN], beside, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(str(path.parent / name) for name in near)}?"
    listed = ", ".join(beside[:MOST_LISTED]) + (", …" if len(beside) > MOST_LISTED else "")
    return f"{path.parent} has {listed or 'no directories'}."


def shown(value: Any) -> str:
    """The repr of a value for an error, truncated to `LONGEST_SHOWN`."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def check(config: Any, name: str, accepted: bool, what: str) -> None:
    """Raise an `InputError` for field `name` unless `accepted`; `what` says what would be."""
    if not accepted:
        value = getattr(config, name)
        raise InputError(f"{type(config).__name__}.{name} is {shown(value)}: it must be {what}.")


def whole_number(text: str) -> int | None:
    """The number written in ASCII digits; None for other text or more than `MOST_DIGITS`."""
    fits = text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS
    return int(text) if fits else None


def check_minimum(config: Any, least: int, *names: str) -> None:
    """Raise an `InputError` unless each of the fields `names` is at least `least`."""
    for name in names:
        check(config, name, getattr(config, name) >= least, f"at least {least}")


def check_types(config: Any) -> None:
    """Raise an `InputError` unless each field has its annotated type; an int passes for a float.

    Numbers must suit the device: 32 bits, finite, and not so small that they are 0 there.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            check(config, name, value in choices, f"one of {', '.join(choices)}")
            continue
        if typing.get_origin(hint) is tuple:
            (kind, _) = typing.get_args(hint)
            if typing.get_origin(kind) is Literal:
                choices = typing.get_args(kind)
                named = type(value) is tuple and all(item in choices for item in value)
                check(config, name, named, f"several of {', '.join(choices)}")
                continue
            accepted = type(value) is tuple and all(_fits(item, kind) for item in value)
            check(config, name, accepted, f"several {kind.__name__}")
            _check_numbers(config, name, value)
            continue
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        accepted = any(_fits(value, kind) for kind in kinds)
        names = ["None" if kind is types.NoneType else kind.__name__ for kind in kinds]
        check(config, name, accepted, " or ".join(names))
        if isinstance(value, float):
            check(config, name, math.isfinite(value), "finite")
        _check_numbers(config, name, (value,))


def _check_numbers(config: Any, name: str, values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, float) and math.isfinite(value):
            sized = value == 0 or SMALLEST <= abs(value) <= LARGEST
            check(config, name, sized, f"0, or from {SMALLEST:.2g} to {LARGEST:.2g} in size")
        elif isinstance(value, int):
            check(config, name, abs(value) < WHOLE, "below 2**32")


def _fits(value: Any, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)
