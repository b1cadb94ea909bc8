"""Goodput: the share of a run's wall time that went into steps that are kept.

Counted from `sessions.jsonl` alone, of process 0 (gptjax/training/trackers/sessions.py). The term
is that of github.com/AI-Hypercomputer/ml-goodput-measurement.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import InputError
from gptjax.training.trackers.sessions import SESSIONS, SPENT, read_sessions

KINDS = {
    "steps": "steps that are kept",
    "lost": "steps made again, since they were after the last checkpoint",
    "data": "waiting for batches",
    "evaluation": "evaluation",
    "checkpoint": "waiting for checkpoints",
    "profile": "starting and reading a profile",
    "compile": "making the state, and compiling",
    "waiting": "waiting for other processes to join",
    "start": "starting: imports, data, checkpoint",
    "down": "no process, or one whose time is unknown",
}
"""The kinds of time, in the order of tables and pictures."""


class Goodput(NamedTuple):
    """Where the wall time of a run went."""

    seconds: dict[str, float]
    """By kind, from the start of the first session to the end of the last."""
    sessions: int
    """How often the run was started."""
    lost_steps: int
    """Steps that were made again."""
    first_start: float
    """Seconds from the first start to the first step."""

    @property
    def total(self) -> float:
        """Seconds from the start of the first session to the end of the last."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """The share of steps that are kept."""
        return self.seconds["steps"] / self.total if self.total else 0.0

    @property
    def per_restart(self) -> float:
        """Seconds that a further session cost, on average, all in all; 0 without one."""
        if self.sessions < 2:
            return 0.0
        costs = sum(self.seconds[kind] for kind in ("lost", "compile", "waiting", "start", "down"))
        return (costs - self.first_start) / (self.sessions - 1)


def table(found: Goodput) -> str:
    """The seconds and shares of each kind, and what a restart cost."""
    lines = [
        f"{kind:<12}{seconds:>10,.1f} s{seconds / (found.total or 1):>8.1%}  {KINDS[kind]}"
        for kind, seconds in found.seconds.items()
    ]
    times = "session" if found.sessions == 1 else "sessions"
    lines.append(
        f"{'total':<12}{found.total:>10,.1f} s  in {found.sessions} {times}: "
        f"goodput {found.share:.1%}."
    )
    if found.sessions > 1:
        lines.append(
            f"A restart cost {found.per_restart:.1f} s on average; {found.lost_steps:,} steps were "
            "made again."
        )
    return "\n".join(lines)


def goodput(directory: Path) -> Goodput:
    """Where the wall time of the run in `directory` went.

    Raises:
      InputError: no run that was trained here.
    """
    sessions = read_sessions(directory / SESSIONS)
    if not sessions:
        raise InputError(f"{directory / SESSIONS} has no session.")
    seconds, lost_steps, first_start = dict.fromkeys(KINDS, 0.0), 0, 0.0
    for number, events in enumerate(sessions):
        start, last = events[0], events[-1]
        own = _session(events)
        following = sessions[number + 1][0] if number + 1 < len(sessions) else None
        if following is not None:
            reached = last.get("step", start["step"])
            kept = _steps_until(events, following["step"])
            lost_steps += max(reached - following["step"], 0)
            own["lost"], own["steps"] = own["steps"] - kept, kept
            own["down"] = max(following["started"] - last["time"], 0.0)
        if number == 0:
            first_start = own["start"] + own["waiting"] + own["compile"]
        for kind, value in own.items():
            seconds[kind] += value
    return Goodput(seconds, len(sessions), lost_steps, first_start)


def _session(events: list[dict[str, Any]]) -> dict[str, float]:
    """The seconds of each kind in a session, all steps as kept."""
    own = dict.fromkeys(KINDS, 0.0)
    start, last = events[0], events[-1]
    ready = next((event for event in events if event["event"] == "ready"), None)
    begun = last if ready is None else ready
    own["waiting"] = start["waited"]
    own["compile"] = 0.0 if ready is None else ready["compile"]
    own["start"] = begun["time"] - start["started"] - own["waiting"] - own["compile"]
    if ready is not None:
        for kind in SPENT:
            own[kind] = last.get(kind, 0.0)
        own["steps"] = _stepping(last, ready)
    return {kind: max(value, 0.0) for kind, value in own.items()}


def _stepping(event: dict[str, Any], ready: dict[str, Any]) -> float:
    """Seconds of a session that had gone into steps by an event."""
    other = sum(event.get(kind, 0.0) for kind in SPENT)
    return max(event["time"] - ready["time"] - other, 0.0)


def _steps_until(events: list[dict[str, Any]], step: int) -> float:
    """Seconds that a session put into its steps up to `step`, between its events in proportion."""
    ready = next((event for event in events if event["event"] == "ready"), None)
    if ready is None:
        return 0.0
    counted = [event for event in events if "step" in event and event["time"] >= ready["time"]]
    steps = [events[0]["step"], *(event["step"] for event in counted)]
    seconds = [0.0, *(_stepping(event, ready) for event in counted)]
    return float(np.interp(step, steps, seconds))
