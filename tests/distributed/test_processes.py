"""Runs in several processes of this machine, which must come to what one process comes to."""

import importlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import EXPERIMENTS, ROOT

from gptjax.cli import run_experiment
from gptjax.models.build import split
from gptjax.runs.loading import load_run
from gptjax.runs.run import run
from gptjax.system.mirrors import copied
from gptjax.training.trackers.jsonl import read_jsonl

SCRIPT = Path(__file__).with_name("process_of_a_run.py")
STEPS, SAVED = 8, 4
FLAGS = [
    f"--train.steps={STEPS}",
    "--train.batch-size=8",
    "--train.log-every=1",
    f"--train.eval-every={SAVED}",
    f"--train.checkpoint-every={SAVED}",
    "--optimizer.warmup-steps=1",
    "--model.depth=1",
    "--model.width=16",
    "--model.heads=2",
    "--model.context_length=32",
]
SECONDS_TO_STOP = 10
"""Which the README states; the others of a killed process take less than one where it is idle."""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{n} and {n * n} are a number and its square.\n" for n in range(200)))
    return path


def launched(out: Path, text: Path, *flags: str, processes: int = 2, trouble: str = "none 0 0"):
    """Exit code, output, errors and seconds from the first line of errors to the end."""
    words = ["launch", f"--local={processes}", str(SCRIPT), *FLAGS, f"--out={out}", *flags]
    printed, errors, first = text.with_suffix(".printed"), "", math.inf
    with (
        printed.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", "gptjax", *words, f"--data.source={text}"],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TROUBLE": trouble},
        ) as process,
    ):
        alarm = threading.Timer(300, process.terminate)
        alarm.start()
        assert process.stderr
        for line in process.stderr:
            first = min(first, time.monotonic())
            errors += line
        alarm.cancel()
    return process.returncode, printed.read_text(), errors, time.monotonic() - first


def in_one_process(out: Path, text: Path, monkeypatch, *flags: str) -> None:
    """The same, here, on eight devices."""
    monkeypatch.setattr(sys, "path", [str(EXPERIMENTS), *sys.path])
    quickstart = importlib.import_module("quickstart")

    def run_alone(config, out, overwrite) -> None:
        run(config, out, overwrite, show=lambda *_: "no samples")

    words = ["quickstart", *FLAGS, f"--data.source={text}", f"--out={out}", *flags]
    monkeypatch.setattr(sys, "argv", words)
    run_experiment(run_alone, {"quickstart": quickstart.DEFAULTS}, "none", "")


def losses(out: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in read_jsonl(out / "metrics.jsonl") if name in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text) -> Path:
    """The run in one process, from beginning to end."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_one_process(out, text, monkeypatch)
    return out


def assert_same_losses(out: Path, whole: Path, every: int = 1) -> None:
    """Of a run that logs every so many steps."""
    expected = losses(whole)[every - 1 :: every]
    np.testing.assert_allclose(losses(out), expected[: len(losses(out))], rtol=1e-5)
    found = losses(out, "validation_loss")
    np.testing.assert_allclose(found, losses(whole, "validation_loss")[: len(found)], rtol=1e-5)


def saved_arrays(out: Path, step: int) -> list[np.ndarray]:
    with np.load(out / f"{step}.npz") as arrays:
        return [arrays[name] for name in arrays.files]


def restored_arrays(out: Path, step: int) -> list[np.ndarray]:
    params = split(load_run(out, step).model)[1]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


@pytest.fixture(params=["disk", "bucket"])
def out(request, tmp_path, monkeypatch) -> Iterator[Path]:
    """Where a run is: in a directory, or in a bucket, where its processes share none."""
    if request.param == "disk":
        yield tmp_path / "run"
        return
    # A directory taken for a bucket; tests/reliability has an S3 server.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    yield Path(f"file://{tmp_path}/bucket/run")


@pytest.mark.slow
def test_a_killed_process_stops_the_others_and_one_process_goes_on(out, text, whole, monkeypatch):
    code, printed, errors, seconds = launched(out, text, trouble=f"SIGKILL 1 {SAVED + 2}")
    assert code == 128 + 9
    assert "Process 1 was ended by SIGKILL.\n" in errors
    assert re.search(
        r"Process 1 on \S+ exited without notice; process 0 stops, the same command resumes from "
        r"the last checkpoint\.\n",
        errors,
    )
    assert "Traceback" not in errors
    assert seconds < SECONDS_TO_STOP
    assert printed.count("parameters; training on") == 1  # Process 0 alone prints.
    assert re.search(rf"^step {SAVED}/{STEPS}  loss", printed, flags=re.MULTILINE)

    with copied(out) as left:
        assert len(losses(left)) >= SAVED
        assert_same_losses(left, whole)
        saved = saved_arrays(left, SAVED)
    restored = restored_arrays(out, SAVED)  # On one device of one process.
    assert len(saved) == len(restored) > 10
    for array, again in zip(saved, restored, strict=True):
        np.testing.assert_array_equal(array, again)

    in_one_process(out, text, monkeypatch)
    with copied(out) as left:
        steps = [line["step"] for line in read_jsonl(left / "metrics.jsonl")]
        assert steps == [*range(1, STEPS + 1)]
        assert_same_losses(left, whole)  # Of other batches they would be others.
        assert json.loads((left / "result.json").read_text())["tokens_seen"] == STEPS * 8 * 32


@pytest.mark.slow
def test_four_processes_share_parameters_and_go_on_as_one(tmp_path, text, whole, monkeypatch):
    out = tmp_path / "run"
    mesh = ["--mesh.fsdp=2", "--mesh.tensor=2"]
    code, printed, errors, _ = launched(
        out, text, *mesh, processes=4, trouble=f"SIGTERM 2 {SAVED + 1}"
    )
    assert code == 128 + 15, errors
    stopped = re.search(r"Stopped by SIGTERM; step (\d+) is saved, the same command", errors)
    assert stopped
    assert errors.count("Stopped by") == 1
    step = int(stopped[1])
    assert SAVED < step < STEPS
    assert f"step {step}/{STEPS}" in printed
    saved = saved_arrays(out, step)
    for array, again in zip(saved, restored_arrays(out, step), strict=True):
        np.testing.assert_array_equal(array, again)
    in_one_process(out, text, monkeypatch)
    assert_same_losses(out, whole)
    assert len(losses(out)) == STEPS


@pytest.mark.slow
def test_two_processes_come_to_the_end_of_a_run(tmp_path, text, whole):
    out = tmp_path / "run"
    flags = ["--mesh.tensor=2", "--mesh.data=1", "--train.log-every=2"]
    flags += ["--train.steps-per-dispatch=2", "--train.checkpoint-minutes=0.001"]
    code, printed, errors, _ = launched(out, text, *flags)
    assert code == 0, errors
    assert printed.count("Best validation loss") == 1
    assert_same_losses(out, whole, every=2)
    result = json.loads((out / "result.json").read_text())
    assert result["device"] == "2 × cpu"
    assert result["best_step"] == json.loads((whole / "result.json").read_text())["best_step"]
    code, printed, errors, _ = launched(out, text, *flags)
    assert (code, errors) == (0, "")
    assert printed.count("holds a finished run of this config") == 1


@pytest.mark.slow
@pytest.mark.parametrize("process", [pytest.param(0, marks=pytest.mark.large), 1])
def test_a_mistake_in_one_process_stops_all(tmp_path, text, process):
    code, _, errors, seconds = launched(tmp_path / "run", text, trouble=f"mistake {process} 3")
    assert code == 2
    assert "a mistake of its own.\n" in errors
    assert f"Process {process} ended with code 2.\n" in errors
    assert seconds < SECONDS_TO_STOP


@pytest.mark.slow
def test_all_stop_when_process_0_is_killed(tmp_path, text):
    code, _, errors, seconds = launched(tmp_path / "run", text, trouble="SIGKILL 0 3")
    assert code == 128 + 9
    assert "Process 0 was ended by SIGKILL.\n" in errors
    assert seconds < SECONDS_TO_STOP


@pytest.mark.slow
def test_doctor_compares_hosts_and_names_one_that_differs(tmp_path):
    program = f"{ROOT / 'gptjax' / '__main__.py'}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "gptjax", "launch", "--local=2", "--devices=3", program]
    same = subprocess.run(
        [*words, "doctor"], capture_output=True, text=True, env=environment, check=True
    )
    host = socket.gethostname()
    assert "2 processes, each with 3 × cpu.\n" in same.stdout
    assert same.stdout.endswith(
        f"process 0 of 2: 3 × cpu on {host}\nprocess 1 of 2: 3 × cpu on {host}\n"
    )
    unequal = tmp_path / "unequal.py"
    unequal.write_text(
        "import os, runpy, sys\n"
        "os.environ['JAX_NUM_CPU_DEVICES'] = str(1 + int(os.environ['JAX_PROCESS_ID']))\n"
        f"runpy.run_path({program!r}, run_name='__main__')\n"
    )
    differs = subprocess.run(
        [*words[:-1], str(unequal), "doctor"], capture_output=True, text=True, env=environment
    )
    assert differs.returncode == 2
    assert (
        f"All processes need the same devices of process 0 on {host}, but process 1 on {host} has "
        "devices: 1 × cpu -> 2 × cpu.\n"
    ) in differs.stderr
