import json
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from tensorboardX.proto import event_pb2

from gptjax.config import InputError, TrainConfig, sealed
from gptjax.system.disk import DiskError
from gptjax.training import metrics, tensorboard
from gptjax.training.console import ConsoleWriter
from gptjax.training.metrics import JsonlWriter, line_of, open_writers, read_jsonl
from gptjax.training.tensorboard import TensorBoardWriter


def test_scalars_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]
    writer = JsonlWriter(path, resume_step=1, log_every=1)
    writer.write(2, {"loss": 2.5})
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [sealed({"step": 1, "loss": 3.0}), sealed({"step": 2, "loss": 2.5})]
    assert read_jsonl(path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


LINES = [f'{{"step": {step}, "loss": {step}.5}}\n'.encode() for step in range(1, 7)]


@pytest.mark.parametrize(
    ("damaged", "steps", "said"),
    [
        ({2: b"\0" * 30 + b"\n"}, [1, 2, 4, 5, 6], "line 3 (after step 2 and before step 4) is"),
        ({0: b'{"step": 1, "lo\xffs": 1.5}\n'}, [2, 3, 4, 5, 6], "line 1 (before step 2) is"),
        ({1: b'{"step": 2, \n', 2: b"3\n"}, [1, 4, 5, 6], "lines 2-3 (after step 1 and"),
        ({1: b'{"loss": 2.5}\n'}, [1, 3, 4, 5, 6], "line 2 (after step 1 and before step 3) is"),
        ({1: b'{"step": 92, "loss": 2.5}\n'}, [1, 3, 4, 5, 6], "line 2 (after step 1 and"),
        ({4: b'{"step": 1, "loss": 5.5}\n'}, [1, 2, 3, 4, 6], "line 5 (after step 4 and"),
        ({4: b'{"step": 5, "loss": "5.5"}\n'}, [1, 2, 3, 4, 6], "line 5 (after step 4 and"),
        ({1: LINES[1][:-1]}, [1, 4, 5, 6], "line 2 (after step 1 and before step 4) is"),
        ({5: b"\xff\n", 1: b"[" * 2000 + b"\n"}, [1, 3, 4, 5], "line 2 (after step 1 and befo"),
    ],
)
def test_damaged_lines_are_left_out_and_named(tmp_path, capsys, damaged, steps, said):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(damaged.get(place, line) for place, line in enumerate(LINES)))
    kept = read_jsonl(path)
    assert [line["step"] for line in kept] == steps
    assert all(line["loss"] == line["step"] + 0.5 for line in kept)
    error = capsys.readouterr().err
    assert error.startswith(f"{path}: {said}")
    assert error.endswith(" skipped.\n")
    assert error.count("\n") == 1
    JsonlWriter(path, resume_step=steps[-1], log_every=1).close()
    capsys.readouterr()
    assert read_jsonl(path) == kept
    assert capsys.readouterr().err == ""


def test_every_bit_of_a_line_counts(tmp_path, capsys):
    path, lines = tmp_path / "metrics.jsonl", [line_of({"step": n, "loss": n / 3}) for n in (1, 2)]
    for place in range(len(lines[0]) - 1):
        for bit in range(8):
            damaged = bytearray("".join(lines).encode())
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            assert [line["step"] for line in read_jsonl(path)] in ([2], [])
    assert capsys.readouterr().err


@pytest.mark.parametrize(("cut", "lost"), [(None, ""), (-1, "after step 5"), (0, "all")])
def test_lines_that_a_checkpoint_followed_are_missed(tmp_path, capsys, cut, lost):
    lines = [line_of({"step": step, "loss": step / 3}) for step in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:cut]))
    (tmp_path / "config.json").write_text('{"train": {"log_every": 1}}')
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == len(lines[:cut])
    said = capsys.readouterr().err
    assert lost in said if lost else said == ""


@pytest.mark.parametrize(
    ("kept", "log_every", "said"),
    [
        (6, 1, ""),
        (4, 1, "lines are missing, those after step 4 up to step 6."),
        (0, 1, "lines are missing, all up to step 6."),
        (4, 4, ""),  # Step 6 is none that is logged.
    ],
)
def test_lines_that_are_cut_off_are_named(tmp_path, capsys, kept, log_every, said):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES[:kept]))
    JsonlWriter(path, resume_step=6, log_every=log_every).close()
    assert capsys.readouterr().err == (said and f"{path}: {said}\n")


def test_a_line_is_on_the_disk_before_it_is_said_to_be(tmp_path, monkeypatch):
    path, synced = tmp_path / "metrics.jsonl", []
    writer = JsonlWriter(path, resume_step=0, log_every=1)
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))
    writer.write(1, {"loss": 1.5})
    assert not synced
    writer.write_through()
    assert synced == [line_of({"step": 1, "loss": 1.5}).encode()]
    monkeypatch.undo()
    path.unlink()
    with pytest.raises(DiskError, match=r"metrics\.jsonl was deleted or replaced"):
        writer.write_through()
    path.write_text("of another")
    with pytest.raises(DiskError, match=r"metrics\.jsonl was deleted or replaced"):
        writer.write_through()
    writer.close()


def shown(directory: Path) -> list[tuple[int, float]]:
    """The points of the loss that TensorBoard shows, in the order in which they were written."""
    points = []
    for path in sorted(directory.glob("events*")):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            event = vars(event_pb2)["Event"].FromString(content[start + 12 : start + 12 + length])
            start += 16 + length
            if event.HasField("session_log"):
                points = [point for point in points if point[0] < event.step]
            points += [(event.step, value.simple_value) for value in event.summary.value]
    return points


@pytest.mark.parametrize("lost", [None, 0, 1, 40, 150, 10_000])
def test_what_tensorboard_lacks_is_written_again(tmp_path, lost):
    directory, lines = tmp_path / "train", [json.loads(line) for line in LINES]
    first = TensorBoardWriter(tmp_path, [])
    for line in lines:
        first.write(line["step"], {"loss": line["loss"]})
    if lost is None:  # As at a kill: nothing was closed.
        assert shown(directory) == [(line["step"], line["loss"]) for line in lines]
    first.close()
    (path,) = directory.glob("events*")
    if lost:
        path.write_bytes(path.read_bytes()[:-lost] if lost < 1000 else b"")
    second = TensorBoardWriter(tmp_path, lines[:4])  # It goes on from step 4.
    for step in (5, 6):
        second.write(step, {"loss": step + 0.25})
    second.close()
    # Of a record that is cut the rest is no longer read.
    if lost:
        path.write_bytes(path.read_bytes()[: whole_records(path)])
    assert shown(directory) == [(1, 1.5), (2, 2.5), (3, 3.5), (4, 4.5), (5, 5.25), (6, 6.25)]


def test_tensorboard_has_training_and_validation_in_one_chart(tmp_path):
    lines = [
        {"step": 1, "cross_entropy": 3.5},
        {"step": 2, "cross_entropy": 2.5, "validation_loss": 2.75},
    ]
    first = TensorBoardWriter(tmp_path, [])
    for line in lines:
        first.write(line["step"], {name: line[name] for name in line if name != "step"})
    first.close()
    again = TensorBoardWriter(tmp_path, lines)
    again.write(3, {"cross_entropy": 1.5})
    again.write(4, {"cross_entropy": 1.25, "validation_loss": 1.75})
    again.close()
    # The directory is the curve, and the name is the chart.
    assert shown(tmp_path / "validation") == [(2, 2.75)] * 2 + [(4, 1.75)] * 2
    assert names(tmp_path / "validation") == {"loss", "cross_entropy"}
    assert names(tmp_path / "train") == {"cross_entropy"}
    assert {path.parent.name for path in tmp_path.rglob("*tfevents*")} == {"train", "validation"}


def names(directory: Path) -> set[str]:
    """The tags of all points."""
    found = set()
    for path in directory.glob("events*"):
        for event in tensorboard._events(path.read_bytes()):
            found |= {value.tag for value in event.summary.value}
    return found


def whole_records(path: Path) -> int:
    """Bytes of a file's records that are whole."""
    content, start = path.read_bytes(), 0
    while start + 16 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        if start + 16 + length > len(content):
            break
        start += 16 + length
    return start


def test_the_log_says_a_validation_loss_at_its_step_alone(capsys):
    writer = ConsoleWriter(steps=3)
    for step, validation in ((1, {}), (2, {"validation_loss": 2.5}), (3, {})):
        writer.write(step, {**SCALARS, **validation})
    writer.close()
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "step 1/3  loss 3.0000  10 tokens/s  MFU 50.0%"
    assert second.startswith(
        "step 2/3  loss 3.0000  validation 2.5000  10 tokens/s  MFU 50.0%  0:0"
    )
    assert third.startswith("step 3/3  loss 3.0000  10 tokens/s  MFU 50.0%  0:00 left")


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (0.05, "float32 product, measured now"),
        (0.8, "measured now while other programs took 40% of the CPU, so MFU reads too high"),
    ],
)
def test_a_peak_that_a_busy_cpu_measured_is_said_to_be_low(others, said, monkeypatch):
    # Of 2 CPU seconds of the machine this process takes 1.
    times = iter([CpuTimes(5.0, 3.0), CpuTimes(6.0 + others, 4.0 - others)])
    monkeypatch.setattr(metrics, "measured_matmul_flops", lambda: 1e11)
    monkeypatch.setattr(metrics.time, "process_time", iter([0.0, 1.0]).__next__)
    monkeypatch.setattr(metrics.psutil, "cpu_times", times.__next__)
    peak = metrics.peak_flops()
    assert peak.flops == 1e11
    assert peak.source.endswith(said)


class CpuTimes(NamedTuple):
    """A part of psutil's."""

    user: float
    idle: float


class FakeRun:
    """What `wandb.init` returns."""

    def __init__(self, **given):
        self.given, self.logged, self.finished = given, [], False

    def log(self, scalars, step):
        self.logged.append((step, scalars))

    def finish(self):
        self.finished = True


@pytest.fixture
def run_directory(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"train": {"steps": 2}}')
    monkeypatch.setenv("WANDB_PROJECT", "laboratory")
    return tmp_path


SCALARS = {"loss": 3.0, "tokens_per_second": 10.0, "mfu": 0.5}


def test_a_run_goes_to_weights_and_biases_under_one_identity(run_directory, monkeypatch):
    runs = []

    def init(**given):
        runs.append(FakeRun(**given))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for step in (1, 2):
        with open_writers(run_directory, TrainConfig(steps=2), resume_step=step - 1) as writers:
            for writer in writers:
                writer.write(step, SCALARS)
    first, second = runs
    assert first.given == second.given
    assert first.given["project"] == "laboratory"
    assert first.given["config"] == {"train": {"steps": 2}}
    assert (first.logged, second.logged) == ([(1, SCALARS)], [(2, SCALARS)])
    assert second.finished


def test_weights_and_biases_without_its_package_is_one_sentence(run_directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(InputError, match="WANDB_PROJECT is set, but the package wandb is not"),
        open_writers(run_directory, TrainConfig(steps=2), resume_step=0),
    ):
        pass
