"""JSON, read with limits: whatever is wrong with it is one sentence.

Python's own reader ends in a RecursionError in brackets a thousand deep, makes an integer of any
number of digits (from 4,301 on another error), waits for ever at a pipe and takes a file of any
size into memory. None of that occurs in a config, an index or a tokenizer.
"""

import functools
import json
import sys
import zlib
from pathlib import Path
from typing import Any

from gptjax.config.checks import InputError

MOST_BYTES = 1 << 26
"""Of a file; the largest that are published, tokenizers of 260,000 tokens, take 35 MB."""
MOST_DEPTH = 100
"""Of objects and lists in each other; a tokenizer's have about ten."""
MOST_DIGITS = 300
"""Of an integer, so that each fits into a float too; tokenizer_config.json has some of 31."""


SEAL = "crc32"
"""The field with the checksum of the others, in JSON that gptjax writes and reads again."""


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with its checksum, which `unsealed` looks at."""
    return {**content, SEAL: zlib.crc32(json.dumps(content).encode())}


def unsealed(content: dict[str, Any], where: str) -> dict[str, Any]:
    """What `sealed` was given, of what was read from `where`.

    Raises:
      InputError: it is not what was written.
    """
    inner = {name: value for name, value in content.items() if name != SEAL}
    if sealed(inner) != content:
        raise InputError(f"{where} is damaged or was edited: its {SEAL} is of other content.")
    return inner


def read_sealed(path: Path) -> dict[str, Any]:
    """The object in a file that was written `sealed`, without its checksum.

    A file that has none, as older versions wrote it, is read with a line on standard error.

    Raises:
      InputError: as `read_json_object`, or a file that is not what was written.
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
    """The content of a file that others wrote.

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
      InputError: as `read_json`, or another value than an object.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not a JSON object.")
    return content


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of `text`, JSON (bytes in UTF-8), which `where` names in an error.

    Raises:
      InputError: something else than JSON; deeper than `MOST_DEPTH`; an integer of more than
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
    """Whether more than `depth` objects and lists lie in each other, level by level."""
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
