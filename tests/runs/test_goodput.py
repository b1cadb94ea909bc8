"""Where the time of a run went, counted from its sessions."""

import json

import pytest

from gptjax.config import InputError
from gptjax.runs.goodput import KINDS, goodput, table
from gptjax.training.trackers import sessions
from gptjax.training.trackers.sessions import SESSIONS, SessionTracker, read_sessions


def _event(event: str, time: float, **fields) -> str:
    return json.dumps({"event": event, "time": time, **fields}) + "\n"


def _spent(event: str, time: float, step: int, data=0.0, evaluation=0.0, checkpoint=0.0) -> str:
    return _event(event, time, step=step, data=data, evaluation=evaluation, checkpoint=checkpoint)


KILLED = [
    _event("start", 110.0, step=0, started=100.0, waited=3.0),
    _event("ready", 125.0, compile=12.0),
    _spent("spent", 135.0, 10, data=1.0, evaluation=2.0),
    _spent("spent", 145.0, 20, data=1.0, evaluation=2.0, checkpoint=1.0),
]
"""Steps took 7 s of the first ten, 9 s of the next, and the process was killed soon after."""
GOES_ON = [
    _event("start", 158.0, step=15, started=155.0, waited=1.0),
    _event("ready", 160.0, compile=1.5),
    _event("end", 180.0, step=35, data=0.5, evaluation=3.0, checkpoint=1.0, profile=0.5),
]


def test_every_second_is_of_one_kind(tmp_path):
    (tmp_path / SESSIONS).write_text("".join(KILLED + GOES_ON))
    found = goodput(tmp_path)
    assert found.seconds == pytest.approx(
        {
            # Of the first session 7 s, and half of 9 s: up to step 15; all of the second's.
            "steps": 11.5 + 15.0,
            "lost": 4.5,
            "data": 1.5,
            "evaluation": 5.0,
            "checkpoint": 2.0,
            "profile": 0.5,
            "compile": 13.5,
            "waiting": 4.0,
            "start": 10.0 + 2.5,
            "down": 10.0,
        }
    )
    assert found.total == pytest.approx(80.0)  # From 100 to 180.
    assert found.lost_steps == 5
    assert found.share == pytest.approx(26.5 / 80)
    # The second start took 5 s, 10 s passed before it, and 4.5 s of steps were made again.
    assert found.per_restart == pytest.approx(5.0 + 10.0 + 4.5)
    assert list(found.seconds) == list(KINDS)
    printed = table(found)
    assert "steps             26.5 s   33.1%  steps that are kept" in printed
    assert "total             80.0 s  in 2 sessions: goodput 33.1%." in printed
    assert "A restart cost 19.5 s on average; 5 steps were made again." in printed


def test_a_session_that_never_began_a_step_is_all_start(tmp_path):
    (tmp_path / SESSIONS).write_text("".join([KILLED[0], *GOES_ON]))
    found = goodput(tmp_path)
    assert found.seconds["steps"] == pytest.approx(15.0)
    assert (found.seconds["lost"], found.lost_steps) == (0.0, 0)
    assert found.total == pytest.approx(80.0)


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path, monkeypatch):
    path = tmp_path / SESSIONS
    path.write_text("".join(KILLED)[:-30])
    monkeypatch.setattr(sessions, "EVERY_SECONDS", 0.0)
    tracker = SessionTracker(path, 10)
    tracker.ready(2.0)
    tracker.spent(11, {"data": 0.1, "evaluation": 0.0, "checkpoint": 0.0})
    tracker.close()
    first, second = read_sessions(path)
    assert [event["event"] for event in first] == ["start", "ready", "spent"]
    assert [event["event"] for event in second] == ["start", "ready", "spent", "end"]
    assert [event.get("step") for event in second] == [10, None, 11, 11]
    assert second[0]["started"] <= second[0]["time"] <= second[1]["time"]


def test_time_spent_is_written_now_and_then(tmp_path):
    tracker = SessionTracker(tmp_path / SESSIONS, 0)
    for step in range(100):
        tracker.spent(step, {"data": 0.0})
    tracker.close()
    (events,) = read_sessions(tmp_path / SESSIONS)
    assert [event["event"] for event in events] == ["start", "end"]
    assert events[-1]["step"] == 99


def test_a_run_tells_where_its_time_went(tiny_run):
    found = goodput(tiny_run)
    assert found.sessions == 1
    assert found.lost_steps == 0
    assert 0 < found.seconds["steps"] < found.total
    for kind in ("evaluation", "checkpoint", "compile"):
        assert found.seconds[kind] > 0, kind
    assert found.seconds["lost"] == found.seconds["down"] == found.per_restart == 0


@pytest.mark.parametrize("text", [None, "", "no JSON\n"])
def test_what_has_no_session_is_one_sentence(tmp_path, text):
    if text is not None:
        (tmp_path / SESSIONS).write_text(text)
    with pytest.raises(InputError, match=r"has no (session|sessions\.jsonl)"):
        goodput(tmp_path)
