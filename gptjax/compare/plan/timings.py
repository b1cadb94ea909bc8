"""What a comparison owes to a clock, kept so that the next call says the same."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.compare.versioned_files import read_saved, write_saved
from gptjax.config import InputError
from gptjax.runs.directory import environment


class Measured:
    """A file of measurements, each under what was measured and on what machine."""

    def __init__(self, path: Path):
        """Read what is there.

        Raises:
          InputError: a file that another version of gptjax wrote, or that cannot be read.
        """
        self._path = path
        self._known: dict[str, Any] = {}
        if path.exists():
            self._known = _measured(path)

    def known(self, what: str, of: Any, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, plain values, or gave when this was asked before.

        `of` is all that it depends on beside the machine, as plain values too.
        """
        made = environment()
        content = [what, of, made["versions"]["jax"], made["device"], made["machine"]]
        text = json.dumps(content, sort_keys=True)
        key = f"{what} {hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if key not in self._known:
            # Through JSON now too, so that the first call computes with what the next one reads.
            self._known[key] = json.loads(json.dumps(measure()))
            if self._path.exists():  # A dry run beside a comparison measures, too.
                self._known = _measured(self._path) | self._known
            write_saved(self._path, {"measured": self._known})
        return self._known[key]


def _measured(path: Path) -> dict[str, Any]:
    """What a file holds.

    Raises:
      InputError: a file that another version of gptjax wrote, or that cannot be read.
    """
    known = read_saved(path).get("measured")
    if not isinstance(known, dict):
        raise InputError(f"{path} is damaged: it has no measurements.")
    return known
