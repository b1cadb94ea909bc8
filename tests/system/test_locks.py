"""Who holds a lock, and who takes over one whose owner is gone."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from gptjax.system import locks
from gptjax.system.locks import LOCK, InUse, locked

HOLDER = """
import sys, time
from pathlib import Path
from gptjax.system.locks import LOCK, locked
with locked(Path(sys.argv[1]) / LOCK, "it"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path) -> Path:
    return tmp_path / LOCK


def owner(**changed) -> str:
    own = {
        "host": "elsewhere",
        "boot": locks._boot(),
        "process": 2**22 + 1,  # Above what Linux gives.
        "started": 1.0,
        "since": "2026-01-01 00:00:00+00:00",
    }
    return json.dumps(own | changed)


def test_one_process_holds_it_and_the_next_one_takes_over_when_that_is_killed(tmp_path, lock):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InUse) as refused, locked(lock, "runs/mine"):
            pass
        holder.send_signal(signal.SIGKILL)
    since = json.loads(lock.read_text())["since"]
    assert str(refused.value) == (
        f"runs/mine is in use by process {holder.pid} on {socket.gethostname()} since {since}: "
        "wait until it ends, or choose another directory."
    )
    with locked(lock, "runs/mine"):
        assert json.loads(lock.read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_process_holds_it_once(lock):
    with locked(lock, "it"):
        with pytest.raises(InUse, match=f"in use by process {os.getpid()} on "), locked(lock, "it"):
            pass
        assert lock.exists()
    assert not lock.exists()


@pytest.mark.parametrize("left", ["", "{", "[]", '{"host": 3}', "\0\0\0"])
def test_a_file_in_which_nobody_stands_is_taken(lock, left):
    lock.write_text(left)
    with locked(lock, "it"):
        assert json.loads(lock.read_text())["process"] == os.getpid()


def test_another_machines_owner_is_looked_for_by_its_touch(lock, monkeypatch, capsys):
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0.4)
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.05)
    lock.write_text(owner(boot="another"))
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.05):
            os.utime(lock)

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(InUse, match=r"in use by process 4194305 on elsewhere since"):
        locked(lock, "it").__enter__()
    ended.set()
    thread.join()
    with locked(lock, "it"):
        assert json.loads(lock.read_text())["host"] == socket.gethostname()
    assert "it was in use by process 4194305 on elsewhere" in capsys.readouterr().err


def test_an_owner_touches_its_file(lock, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.02)
    with locked(lock, "it"):
        before, end = lock.stat().st_mtime_ns, time.monotonic() + 10
        while lock.stat().st_mtime_ns == before:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_where_there_is_no_flock_an_owner_is_asked_for_by_its_process(lock, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.0)
    with locked(lock, "it"), pytest.raises(InUse), locked(lock, "it"):
        pass
    started = psutil.Process().create_time()
    lock.write_text(owner(process=os.getpid(), started=started))
    with pytest.raises(InUse), locked(lock, "it"):
        pass
    for gone in ({"process": os.getpid(), "started": started - 100}, {}):
        lock.write_text(owner(**gone))
        with locked(lock, "it"):
            pass


def test_who_is_to_wait_says_so_once_and_waits(lock, monkeypatch, capsys):
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.01)
    entered = threading.Event()

    def hold() -> None:
        with locked(lock, "it"):
            entered.set()
            time.sleep(0.1)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    with locked(lock, "it", waiting="Waiting."):
        pass
    thread.join()
    assert capsys.readouterr().err == "Waiting.\n"
