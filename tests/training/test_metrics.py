import json
import sys
from types import SimpleNamespace

import pytest

from gptjax.config import InputError
from gptjax.training.metrics import JsonlWriter, open_writers, read_jsonl


def test_scalars_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]
    writer = JsonlWriter(path, resume_step=1)
    writer.write(2, {"loss": 2.5})
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


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
        with open_writers(run_directory, steps=2, resume_step=step - 1) as writers:
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
        open_writers(run_directory, steps=2, resume_step=0),
    ):
        pass
