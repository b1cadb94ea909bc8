from types import SimpleNamespace

from gptjax import distributed
from gptjax.training import checkpoint_clock
from gptjax.training.checkpoint_clock import CheckpointClock


def saved_at(monkeypatch, seconds_of, minutes: float = 1.0, until: int = 400, others=lambda t: t):
    """Times and number of messages of a run whose step n takes `seconds_of(n)` seconds."""
    now, times, asked = [0.0], [], []
    monkeypatch.setattr(checkpoint_clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(
        distributed, "meet", lambda name, own: [own, others(own), asked.append(own) or 0]
    )
    clock = CheckpointClock(minutes, 0)
    for step in range(1, until):
        now[0] += seconds_of(step)
        if clock.over(step):
            times.append(now[0])
            clock.saved(step)
    return times, len(asked)


def test_a_checkpoint_is_due_when_the_minutes_are_over(monkeypatch):
    times, asked = saved_at(monkeypatch, lambda step: 1.0, until=361)
    assert times == [60.0, 120.0, 180.0, 240.0, 300.0, 360.0]
    # After 1, 2, 4, 8, 16 and 32 steps, and then each time half of what is left is over.
    assert asked <= 12 * len(times)


def test_steps_that_become_slower_are_noticed_on_the_way(monkeypatch):
    # Planned by steps of 1 s alone, the first checkpoint would be after step 60, at 184 s. After 32
    # steps, at 44 s, half of what is left is 5 steps by their mean; they take 5 s each.
    times, _ = saved_at(monkeypatch, lambda step: 1.0 if step < 30 else 5.0, until=100)
    assert times[0] == 69
    assert times[1] - times[0] == 60


def test_steps_that_are_only_dispatched_when_asked_do_not_delay_a_checkpoint(monkeypatch):
    """Planned by them alone, the first exchange after step 1 would be 30,000 steps later."""
    times, _ = saved_at(monkeypatch, lambda step: 1.0 if step % 60 > 2 else 0.001)
    assert 60 <= times[0] <= 62
    assert 60 <= times[1] - times[0] <= 62


def test_the_clock_that_is_furthest_decides(monkeypatch):
    times, _ = saved_at(monkeypatch, lambda step: 1.0, others=lambda own: 2 * own)
    assert times[:2] == [30.0, 60.0]


def test_a_step_longer_than_the_minutes_is_saved_each_time(monkeypatch):
    assert saved_at(monkeypatch, lambda step: 90.0, until=4)[0] == [90.0, 180.0, 270.0]


def test_without_minutes_nobody_is_asked(monkeypatch):
    assert saved_at(monkeypatch, lambda step: 1.0, minutes=0.0) == ([], 0)
