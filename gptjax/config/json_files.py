"""JSON read with limits; any fault is an error of one sentence.

Python's own reader raises a RecursionError at a thousand nested brackets, parses integers of any
length (another error from 4,301 digits on), blocks for ever on a pipe and reads a file of any size
into memory. None of that occurs in a valid config, index or tokenizer.
"""

import functools
import json
import sys
import zlib
from pathlib import Path
from typing import Any

from gptjax.config.checks import InputError

MOST_BYTES = 1 << 26
"""Size limit of a file; the largest published tokenizers (260,000 tokens) take 35 MB."""
MOST_DEPTH = 100
"""Nesting limit of objects and lists; a tokenizer's have about ten levels."""
MOST_DIGITS = 300
"""Digit limit of an integer, so that it fits a float; tokenizer_config.json has some of 31."""

SEAL = "crc32"
"""The checksum field of JSON that gptjax writes and reads back."""


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with its checksum, which `unsealed` verifies."""
    return {**content, SEAL: zlib.crc32(json.dumps(content).encode())}


def unsealed(content: dict[str, Any], where: str) -> dict[str, Any]:
    """The content that `sealed` was given, checked; `where` names the file in an error.

    Raises:
      InputError: a checksum that does not match.
    """
    inner = {name: value for name, value in content.items() if name != SEAL}
    if sealed(inner) != content:
        raise InputError(f"{where} is damaged or was edited: its {SEAL} is of other content.")
    return inner


def read_sealed(path: Path) -> dict[str, Any]:
    """The object in a file that was written `sealed`, without its checksum.

    A file without one, from an older version, is read with a warning on standard error.

    Raises:
      InputError: as `read_json_object`, or a checksum that does not match.
    """
    content = read_json_object(path)
    if SEAL in content:
        return unsealed(content, str(path))
    _say_unsealed(path)
    return content


@functools.cache
def _say_unsealed(path: Path) -> None:
    print(f"{path} has no {SEAL}: whether it is damaged is not known.", file=sys.stderr)


def read_json(path: Path) -> Any:
    """The value in a file of JSON.

    Raises:
      InputError: what `read_limited` and `parse_json` refuse.
    """
    return parse_json(read_limited(path), str(path))


def read_limited(path: Path) -> bytes:
    """The bytes of a file from elsewhere, at most `MOST_BYTES`.

    Raises:
      InputError: a file that is missing, no regular file, or larger than `MOST_BYTES`.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a regular file.")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from error
    if len(content) > MOST_BYTES:
        raise InputError(f"{path} is larger than {MOST_BYTES >> 20} MiB, the most that is read.")
    return content


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
      InputError: as `read_json`, or a value that is not an object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not a JSON object.")
    return content


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of JSON `text` (bytes in UTF-8); `where` names it in an error.

    Raises:
      InputError: not JSON; deeper than `MOST_DEPTH`; an integer of more than
        `MOST_DIGITS` digits.
    """

    def integer(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise _unread(where, f"it has a number of {len(digits):,} digits, not of {MOST_DIGITS}")
        return int(digits)

    try:
        value = json.loads(text, parse_int=integer)
    except InputError:
        raise
    except RecursionError as error:
        raise _unread(where, f"its brackets are more than {MOST_DEPTH} deep") from error
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}.") from error
    if _deeper(value, MOST_DEPTH):
        raise _unread(where, f"its brackets are more than {MOST_DEPTH} deep")
    return value


def _deeper(value: Any, depth: int) -> bool:
    """Whether objects and lists are nested more than `depth` deep, level by level."""
    level = [value]
    for _ in range(depth + 1):
        containers = [inner for inner in level if isinstance(inner, (dict, list))]
        if not containers:
            return False
        level = [
            inner
            for outer in containers
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return True


def _unread(where: str, why: str) -> InputError:
    return InputError(f"{where} is not JSON that gptjax reads: {why}.")
