"""Timings kept on disk, so that a second call has the same plan."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.compare.versioned_files import read_versioned, write_versioned
from gptjax.config import InputError
from gptjax.runs.result import environment


class Timings:
    """A file of timings, keyed by what was timed and on what machine."""

    def __init__(self, path: Path):
        """Read the file if it exists.

        Raises:
          InputError: a file that another version of gptjax wrote, or that cannot be read.
        """
        self._path = path
        self._known: dict[str, Any] = {}
        if path.exists():
            self._known = _read(path)

    def get_or_measure(self, what: str, of: Any, measure: Callable[[], Any]) -> Any:
        """Returns the kept result of `measure`, calling it if there is none; plain values.

        `of` is everything that it depends on beside the machine, as plain values.
        """
        made = environment()
        content = [what, of, made["versions"]["jax"], made["device"], made["machine"]]
        text = json.dumps(content, sort_keys=True)
        key = f"{what} {hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if key not in self._known:
            # Through JSON, so that the first call has exactly the values that the next one reads.
            self._known[key] = json.loads(json.dumps(measure()))
            if self._path.exists():  # A dry run beside a comparison may have written it.
                self._known = _read(self._path) | self._known
            write_versioned(self._path, {"measured": self._known})
        return self._known[key]


def _read(path: Path) -> dict[str, Any]:
    """Returns the timings in a file.

    Raises:
      InputError: a file that another version of gptjax wrote, or that cannot be read.
    """
    known = read_versioned(path).get("measured")
    if not isinstance(known, dict):
        raise InputError(f"{path} is damaged: it has no timings.")
    return known
