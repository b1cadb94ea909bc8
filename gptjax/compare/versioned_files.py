"""JSON files that a comparison leaves, each with the number of its format."""

from pathlib import Path
from typing import Any

from gptjax.config import InputError, read_sealed, sealed
from gptjax.system.disk import write_error, write_json

FORMAT = 1
"""Another one's is refused."""


def write_saved(path: Path, content: dict[str, Any]) -> None:
    """Write `content` under this format, whole or not at all.

    Raises:
      InputError: a file that cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, sealed({"format": FORMAT, **content}))
    except OSError as error:
        raise write_error(error, path) from error


def read_saved(path: Path) -> dict[str, Any]:
    """What `write_saved` wrote.

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
