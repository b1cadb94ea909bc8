"""JSON files of a comparison, each with a format version."""

from pathlib import Path
from typing import Any

from gptjax.config import InputError, read_sealed, sealed
from gptjax.system.disk import write_error, write_json

FORMAT = 1
"""Files of other versions are refused."""


def write_versioned(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with the format version, atomically.

    Raises:
      InputError: a file that cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, sealed({"format": FORMAT, **content}))
    except OSError as error:
        raise write_error(error, path) from error


def read_versioned(path: Path) -> dict[str, Any]:
    """Returns what `write_versioned` wrote.

    Raises:
      InputError: a file that another version of gptjax wrote, or that cannot be read.
    """
    saved = read_sealed(path)
    found = saved.get("format")
    if found != FORMAT:
        raise InputError(
            f"{path} is of another version of gptjax (format {found!r}, where {FORMAT} is read): "
            "choose another --out."
        )
    return saved
