import json
import os
import shutil

import pytest

from gptjax.config import TrainConfig, sealed
from gptjax.system.disk import DiskError
from gptjax.training.trackers.jsonl import JsonlTracker, line_of, read_jsonl

EACH = TrainConfig(log_every=1)


def test_scalars_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]
    tracker = JsonlTracker(path, resume_step=1, config=EACH)
    tracker.write(2, {"loss": 2.5})
    tracker.close()
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
    JsonlTracker(path, resume_step=steps[-1], config=EACH).close()
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


@pytest.mark.parametrize(("cut", "lost"), [(None, ""), (-1, "after step 3"), (0, "all")])
def test_lines_that_a_checkpoint_followed_are_missed(tiny_run, tmp_path, capsys, cut, lost):
    """In the directory of a real run, whose config says which steps have lines."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:cut]))
    assert len(read_jsonl(path)) == len(lines[:cut])
    said = capsys.readouterr().err
    assert f"{lost} up to step 4" in said if lost else said == ""
    path.unlink()
    assert read_jsonl(path) == []
    assert "all up to step 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kept", "log_every", "eval_every", "said"),
    [
        (6, 1, 9, ""),
        (4, 1, 9, "lines are missing, those after step 4 up to step 6."),
        (0, 1, 9, "lines are missing, all up to step 6."),
        (4, 4, 9, ""),  # Step 6 is none that is logged.
        (4, 4, 3, "lines are missing, those after step 4 up to step 6."),  # It is evaluated.
    ],
)
def test_lines_that_are_cut_off_are_named(tmp_path, capsys, kept, log_every, eval_every, said):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES[:kept]))
    JsonlTracker(
        path, resume_step=6, config=TrainConfig(steps=9, log_every=log_every, eval_every=eval_every)
    ).close()
    assert capsys.readouterr().err == (said and f"{path}: {said}\n")


def test_a_line_is_on_the_disk_before_it_is_said_to_be(tmp_path, monkeypatch):
    path, synced = tmp_path / "metrics.jsonl", []
    tracker = JsonlTracker(path, resume_step=0, config=EACH)
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))
    tracker.write(1, {"loss": 1.5})
    assert not synced
    tracker.write_through()
    assert synced == [line_of({"step": 1, "loss": 1.5}).encode()]
    monkeypatch.undo()
    path.unlink()
    with pytest.raises(DiskError, match=r"metrics\.jsonl was deleted or replaced"):
        tracker.write_through()
    path.write_text("of another")
    with pytest.raises(DiskError, match=r"metrics\.jsonl was deleted or replaced"):
        tracker.write_through()
    tracker.close()
