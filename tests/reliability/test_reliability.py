"""A small sample of each trial of this folder, and each as experiments/README.md has it."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def trial(name: str, *flags: str) -> str:
    """What the trial prints, in a process of its own, in which JAX has not started."""
    ended = subprocess.run(
        [sys.executable, str(HERE / f"{name}.py"), *flags], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_killed_runs_come_to_what_a_run_left_alone_comes_to():
    printed = trial("kills", "--kills=1", "--at-once=1")
    assert ": 0 problems." in printed


@pytest.mark.slow
def test_damage_is_noticed():
    printed = trial("damage", "--changes=9", "--kinds", "finished run", "dataset", "texts")
    assert ", 0 faults." in printed


@pytest.mark.slow
def test_wrong_invocations_end_in_a_sentence():
    printed = trial("invocations", "--count=5")
    assert "; 0 faults." in printed


@pytest.mark.large
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("kills", ["--kills=900"]),
        ("kills", ["--kills=100", "--processes=2"]),
        ("kills", ["--kills=50", "--processes=2", "--bucket"]),
        ("damage", ["--changes=1000"]),
        ("invocations", ["--count=600"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_whole_trial(name, flags):
    assert trial(name, *flags)
