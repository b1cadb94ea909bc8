"""`python experiments/compare.py` as its user has it: mistakes, a kill, Ctrl-C, a second call."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compared import TINY, text
from conftest import EXPERIMENTS

from gptjax.compare.grid import grid
from gptjax.runs.directory import hold
from gptjax.system.locks import LOCK

FLAGS = {
    "--match": ["none"],
    "--budget": ["tokens=2560"],
    "--seeds": ["3"],
    "--rates": ["1e-3", "1e-2"],
    "--search-seeds": ["1"],
    "--evaluations": ["4"],
    "--context-length": ["16"],
    "--batch-size": ["4"],
    "--data.tokenizer": ["characters"],
    "--optimizer.warmup-steps": ["2"],
}


def words(directory: Path, *variants: str, **changed: str) -> list[str]:
    flags = FLAGS | {
        f"--{name.replace('_', '-')}": value.split() for name, value in changed.items()
    }
    flags |= {"--data.source": [str(text(directory))], "--out": [str(directory / "out")]}
    return ["--variants", *variants, *(word for flag in flags for word in (flag, *flags[flag]))]


@pytest.fixture
def command(monkeypatch, capsys):
    """The script in this process: exit code, output and errors."""
    monkeypatch.setattr(sys, "path", [str(EXPERIMENTS), *sys.path])
    script = importlib.import_module("compare")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compare.py", *words])
        code = 0
        try:
            script.run_command(script.compare, script.__doc__)
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("variants", "changed", "sentence"),
    [
        (["quickstrat"], {}, "Unknown preset 'quickstrat': did you mean quickstart?"),
        (["quickstart:nrom=rmsnorm"], {}, "an unknown field 'nrom': did you mean norm"),
        (["quickstart:norm=batchnorm"], {}, "it must be one of layernorm, rmsnorm."),
        ([TINY], {"budget": "tokens=99"}, "that is 1 steps of 64 tokens, too small for 4 eval"),
        (["gpt2"], {"match": "params=10"}, "gpt2 cannot be matched: no width comes within 1% of"),
        ([TINY], {"seeds": "0"}, "Comparison.seeds is 0: it must be at least 1."),
        ([TINY], {"sedes": "3"}, "Unknown flag --sedes: did you mean"),
        ([TINY], {"rates": "fast"}, "--rates"),
        ([TINY], {"match": "params=1e30"}, "A model whose params are 1e+30 takes at least "),
        ([TINY], {"match": "flops=1e30"}, "A model whose flops are 1e+30 takes at least "),
    ],
)
def test_a_mistake_is_one_sentence(command, tmp_path, variants, changed, sentence):
    code, out, errors = command(*words(tmp_path, *variants, **changed))
    assert code == 2
    assert sentence in errors
    assert errors.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_results_of_another_version_are_one_sentence(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.json").write_text('{"format": 99}')
    code, _, errors = command(*words(tmp_path, TINY))
    assert code == 2
    assert errors.endswith("(format 99, where 1 is read): choose another --out.\n")


def test_a_directory_in_which_another_process_compares_is_one_sentence(command, tmp_path):
    out = tmp_path / "out"
    with hold(out):
        code, _, errors = command(*words(tmp_path, TINY))
        assert {path.name for path in out.iterdir()} == {LOCK}
    assert code == 2
    assert errors.startswith(f"{out} is in use by process {os.getpid()} on ")
    assert errors.count("\n") == 1


def test_a_full_disk_stops_a_comparison(command, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(grid, "keep", fail)
    code, _, errors = command(*words(tmp_path, TINY))
    assert code == 74
    assert errors == (
        f"{tmp_path / 'out'}: No space left on device; what is saved in {tmp_path / 'out'} stays, "
        "and once there is room the same command resumes from it.\n"
    )


@pytest.fixture(autouse=True)
def interruptible():
    """A shell lets its background jobs ignore Ctrl-C, and their children would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(EXPERIMENTS / "compare.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
    )


def wait_for_another_result(out: Path, known: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while len(list(out.glob("runs/*/result.json"))) <= known:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def losses(out: Path) -> dict[str, dict]:
    """What is not a clock's, nor the checksum of a line with that, by run."""
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {line.pop("directory"): line | {"seconds": 0, "crc32": 0} for line in lines}


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.large),
    ],
)
def test_a_killed_comparison_goes_on_to_the_same_report(tmp_path, number, code):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for directory in (whole, broken):
        directory.mkdir()
    # A variant's seeds end together: of two variants, one is left.
    variants = TINY, f"{TINY},activation=silu"
    asked = words(broken, *variants, rates="1e-2", seeds="2")
    process = start(*asked)
    wait_for_another_result(broken / "out", 0, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert ("the same command resumes." in errors) == (number == signal.SIGINT)
    kept = {path: path.stat().st_mtime_ns for path in broken.glob("out/runs/*/result.json")}
    for asked_of in (asked, words(whole, *variants, rates="1e-2", seeds="2")):
        process = start(*asked_of)
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "report.html" in printed
    assert (
        kept.items()
        <= {path: path.stat().st_mtime_ns for path in broken.glob("out/runs/*/result.json")}.items()
    )
    assert 0 < len(kept) < 2 * 2
    ours, theirs = losses(broken / "out"), losses(whole / "out")
    assert len(ours) == 2 * 2
    # By order: the directories' hashes hold the text's path, which differs.
    assert list(ours.values()) == list(theirs.values())


@pytest.mark.slow
def test_a_dry_run_trains_nothing_and_estimates(tmp_path):
    process = start(*words(tmp_path, TINY), "--dry-run")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "5 runs, of which" in printed
    assert "by quickstart:depth=1,width=16,heads=2's measured step" in printed
    assert not (tmp_path / "out" / "runs").exists()
