"""Exit codes, as a command has them and as the README's restart loops read them."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from gptjax import cli
from gptjax.config import InputError
from gptjax.system.disk import DiskError
from gptjax.system.exits import Diverged, Exit, Interrupted

README = (ROOT / "gptjax" / "distributed" / "README.md").read_text(encoding="utf-8")
ENDS = [
    (InputError("It is wrong."), 2, "It is wrong."),
    (Diverged("Step 3: the loss is nan."), 65, "Step 3: the loss is nan."),
    (DiskError("It is full."), 74, "It is full."),
    (OSError(errno.EDQUOT, "Quota exceeded", "a.txt"), 74, "a.txt: Quota exceeded."),
    (OSError(errno.EIO, "Input/output error"), 74, "the output: Input/output error."),
    (Interrupted(7, signal.SIGTERM), 143, "Stopped by SIGTERM; step 7 is saved, the same command"),
    (Interrupted(7, signal.SIGINT), 130, "Stopped by SIGINT; step 7 is saved, the same command"),
    (KeyboardInterrupt(), 130, "Stopped."),
]


@pytest.mark.parametrize(("error", "code", "sentence"), ENDS)
def test_each_end_has_its_code_and_one_sentence(error, code, sentence, monkeypatch, capsys):
    def command() -> None:
        """Ends."""
        raise error

    monkeypatch.setattr(sys, "argv", ["program"])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        cli.run_command(command, "")
    assert ended.value.code == code
    said = capsys.readouterr().err
    assert said.startswith(sentence)
    assert said.count("\n") == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_a_command_at_once():
    program = """
import os, signal, sys, threading, time
from gptjax import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
def command():
    threading.Thread(target=time.sleep, args=(60,)).start()  # As of one that saves.
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
cli.run_command(command, "")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50
    )
    assert ended.returncode == 130
    assert ended.stderr == "Stopped at once; what was saved before stays.\n"


def test_the_readme_names_every_code():
    rows = re.findall(r"^\| ([\d, ]+) \| .+ \| (\w+)", README, flags=re.MULTILINE)
    stated = {int(code): again for codes, again in rows for code in codes.split(", ")}
    assert set(Exit) <= set(stated)
    assert {code for code, again in stated.items() if again == "yes"} == {75, 134, 137, 139}


def loop(first: str) -> str:
    """The README's lines of shell between a comment that begins like this and an empty line."""
    (found,) = re.findall(rf"^{re.escape(first)}.*\n((?:.+\n)+)", README, flags=re.MULTILINE)
    return found.partition("```")[0]


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Commands that note their calls: python and srun end with one code after another."""
    calls = tmp_path / "calls"
    for name, line in {
        "python": "code=$(head -n 1 codes); sed -i 1d codes; exit $code",
        "srun": 'exec "$@"',
        "sleep": "",
        "scontrol": "",
    }.items():
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho "$(basename $0) $*" >> {calls}\n{line}\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")

    def run(script: str, codes: list[int]) -> tuple[int, list[str]]:
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        calls.write_text("")
        ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, timeout=60)
        return ended.returncode, calls.read_text().splitlines()

    return run


LAST = [(0, 0), (1, 1), (2, 2), (65, 65), (74, 74), (130, 130)]


@pytest.mark.parametrize(("last", "code"), LAST)
def test_the_loop_of_the_readme_tries_again_what_another_try_mends(fakes, last, code):
    tried = [75, 143, 137, 134]
    ended, calls = fakes(loop("# On every host"), [*tried, last])
    assert ended == code
    runs = [call for call in calls if call.startswith("python experiments/quickstart.py --out ")]
    assert len(runs) == len(tried) + 1
    assert calls.count("sleep 10") == len(tried)


@pytest.mark.parametrize(
    ("code", "again"), [(75, True), (143, True), (137, True), *((code, False) for code, _ in LAST)]
)
def test_the_job_of_the_readme_is_put_back_into_the_queue_when_another_try_mends_it(
    fakes, code, again
):
    ended, calls = fakes(loop("# In the script for Slurm's sbatch"), [code])
    assert ended == code
    assert ("scontrol requeue 17" in calls) is again
    assert Path(calls[0].split()[2]).name == "quickstart.py"
