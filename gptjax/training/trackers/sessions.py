"""sessions.jsonl: where the wall time of a run went, which `gptjax goodput` reads.

A session is one life of the run's process 0. Each of its lines is an event:

| event | when | fields |
|---|---|---|
| start | the trackers are opened | first `step`; `started`: the process; `waited`: for others |
| ready | the first step begins | `compile`: state, step and evaluation made and compiled |
| spent | every `EVERY_SECONDS` | `step`; since `ready`: `data`, `evaluation`, … (`SPENT`) |
| end | the trackers are closed | as of `spent` |

`time` and `started` are seconds since 1970, the others seconds. Lines are never rewritten: what a
killed session did since its last line is unknown.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil

from gptjax import distributed
from gptjax.config import InputError, parse_json

SESSIONS = "sessions.jsonl"
EVERY_SECONDS = 5.0
SPENT = ("data", "evaluation", "checkpoint", "profile")
"""Where time goes between steps."""


class SessionTracker:
    """Appends the events of a session that begins after `resume_step`."""

    def __init__(self, path: Path, resume_step: int):
        cut = path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("ab", buffering=0)
        if cut and self._file.tell():  # A killed session's last line.
            self._file.write(b"\n")
        self._last: dict[str, Any] = {}
        self._written = time.monotonic()
        started = psutil.Process(os.getpid()).create_time()
        self._event("start", step=resume_step, started=started, waited=distributed.waited())

    def ready(self, compile_seconds: float) -> None:
        """The first step begins."""
        self._event("ready", compile=compile_seconds)

    def spent(self, step: int, seconds: dict[str, float]) -> None:
        """The seconds of each kind since `ready`, after `step`."""
        self._last = {"step": step, **seconds}
        if time.monotonic() - self._written >= EVERY_SECONDS:
            self._event("spent", **self._last)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Scalars are for the other trackers."""

    def close(self) -> None:
        """The session's training is over, as far as it came."""
        self._event("end", **self._last)
        self._file.close()

    def _event(self, event: str, **fields: float) -> None:
        self._written = time.monotonic()
        line = {"event": event, "time": time.time(), **fields}
        self._file.write(json.dumps(line).encode() + b"\n")


def read_sessions(path: Path) -> list[list[dict[str, Any]]]:
    """The events of each session, in order; a line that a kill cut short is left out.

    Raises:
      InputError: no such file.
    """
    if not path.exists():
        raise InputError(f"{path.parent} has no {SESSIONS}: it is no run that was trained here.")
    sessions: list[list[dict[str, Any]]] = []
    for text in path.read_bytes().split(b"\n"):
        try:
            event = parse_json(text, "a line")
        except InputError:
            continue
        if not isinstance(event, dict) or "time" not in event:
            continue
        if event.get("event") == "start":
            sessions.append([])
        if sessions:
            sessions[-1].append(event)
    return sessions
