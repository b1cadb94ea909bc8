"""`gptjax launch`, with scripts that start no JAX."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from gptjax.distributed import launch as launching
from gptjax.distributed.launch import launch

LOST = 75


@pytest.fixture
def run(tmp_path: Path, monkeypatch):
    """Launch a script of these lines; `process` is there the number of each."""
    monkeypatch.chdir(tmp_path)

    def run(lines: str, processes: int = 2) -> int:
        head = "import os, signal, sys, time\nprocess = int(os.environ['JAX_PROCESS_ID'])\n"
        (tmp_path / "script.py").write_text(head + lines)
        return launch([sys.executable, "-S", "script.py"], processes, 3, LOST)

    return run


def test_each_process_knows_which_it_is_and_the_first_alone_prints(run, capfd, tmp_path):
    lines = """
names = ["JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS", "JAX_NUM_CPU_DEVICES"]
open(f"{process}.txt", "w").write(" ".join(os.environ[name] for name in names))
print("printed by", process)
"""
    assert run(lines, processes=3) == 0
    assert capfd.readouterr() == ("printed by 0\n", "")
    (place,) = {(tmp_path / f"{process}.txt").read_text() for process in range(3)}
    count, address, devices = place.split()
    assert (count, devices) == ("3", "3")
    assert address.startswith("localhost:")


@pytest.mark.parametrize(
    ("harm", "code", "sentence"),
    [
        ("sys.exit(2)", 2, "Process 1 ended with code 2.\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "Process 1 was ended by SIGKILL.\n"),
    ],
)
def test_who_ended_first_is_said_and_the_others_end_by_themselves(run, capfd, harm, code, sentence):
    lines = f"""
if process == 1:
    {harm}
time.sleep(0.3)
sys.exit({LOST})
"""
    assert run(lines) == code
    assert capfd.readouterr().err == sentence


class Ending:
    """Stands for a process, by what each poll of it finds."""

    def __init__(self, *polls: int | None):
        self.polls = iter(polls)

    def poll(self) -> int | None:
        return next(self.polls)


@pytest.mark.parametrize(
    ("first", "second", "blamed", "code"),
    [
        ([LOST], [1], 1, 1),
        ([LOST], [None, None, 1], 1, 1),
        ([None, LOST], [1], 1, 1),
        ([None, LOST], [None, None, LOST], 0, LOST),
        ([LOST], [0], 0, LOST),
    ],
)
def test_who_ended_because_another_did_is_not_blamed(
    first, second, blamed, code, capsys, monkeypatch
):
    """In whichever order they are seen to end."""
    monkeypatch.setattr(launching, "POLL_SECONDS", 0)
    running: dict[int, Any] = {0: Ending(*first), 1: Ending(*second)}
    assert launching._watch(running, LOST) == code
    assert capsys.readouterr().err == f"Process {blamed} ended with code {code}.\n"


def test_who_does_not_stop_is_killed(run, capfd, monkeypatch):
    monkeypatch.setattr(launching, "END_SECONDS", 0.2)
    start = time.monotonic()
    assert run("sys.exit(1) if process == 0 else time.sleep(60)") == 1
    assert time.monotonic() - start < 10
    errors = capfd.readouterr().err
    assert errors == "Process 0 ended with code 1.\nProcess 1 did not stop in 0.2 s: killed.\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_go_on_to_all(run, capfd, tmp_path, number):
    lines = f"""
def stop(*_):
    open(f"{{process}}.stopped", "w")
    sys.exit({128 + number})
signal.signal({int(number)}, stop)
open(f"{{process}}.ready", "w")
time.sleep(60)
"""

    def interrupt() -> None:
        while len(list(tmp_path.glob("*.ready"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    handler = signal.getsignal(number)
    assert run(lines) == 128 + number
    thread.join()
    assert signal.getsignal(number) is handler
    assert len(list(tmp_path.glob("*.stopped"))) == 2
    assert capfd.readouterr().err == ""


def test_the_words_behind_a_script_are_its_own(command, tmp_path):
    script, told = tmp_path / "script.py", tmp_path / "told.txt"
    script.write_text(f"import sys; open({str(told)!r}, 'w').write(str(sys.argv[1:]))\n")
    words = ["--train.steps", "20", "--local=7", "--help", "--", "-x"]
    assert command("launch", "--local", "1", script, *words) == (0, "", "")
    assert told.read_text() == str(words)
