"""Trackers of other packages: how they are called, resumed, missed and survived."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

from gptjax.config import InputError, TrainConfig, sealed
from gptjax.system.disk import write_json
from gptjax.training.trackers import SERVICES, check_installed, open_trackers

CONFIG = {"model": {"depth": 2}, "train": {"steps": 2}}
SCALARS = {"loss": 3.0, "tokens_per_second": 10.0, "mfu": 0.5}


@pytest.fixture
def run_directory(tmp_path, monkeypatch):
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    directory = tmp_path / "run"
    directory.mkdir()
    write_json(directory / "config.json", sealed({"config": CONFIG}))
    return directory


def write_steps(directory, service, steps, resume_step=0):
    """A session of a run that logs these steps."""
    config = TrainConfig(steps=9, log_every=1, track=(service,))
    with open_trackers(directory, config, resume_step) as trackers:
        for step in steps:
            for tracker in trackers:
                tracker.write(step, SCALARS)


class FakeWandb:
    """What the package offers, recorded."""

    def __init__(self):
        self.given, self.logged, self.finished = [], [], 0

    def init(self, **given):
        self.given.append(given)
        return self

    def log(self, scalars, step):
        self.logged.append((step, scalars))

    def finish(self):
        self.finished += 1


def test_a_run_of_weights_and_biases_has_one_identity(run_directory, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    write_steps(run_directory, "wandb", [1])
    monkeypatch.setenv("WANDB_PROJECT", "laboratory")
    write_steps(run_directory, "wandb", [2], resume_step=1)
    first, second = wandb.given
    assert first["id"] == second["id"]
    assert (first["project"], second["project"]) == ("gptjax", "laboratory")
    assert first["config"] == CONFIG
    assert wandb.logged == [(1, SCALARS), (2, SCALARS)]
    assert wandb.finished == 2


def test_mlflow_gets_each_step_once(run_directory, tmp_path, monkeypatch):
    """By MLflow itself, into a store of its own on the disk."""
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "laboratory")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    write_steps(run_directory, "mlflow", [1, 2, 3])
    write_steps(run_directory, "mlflow", [3, 4], resume_step=2)  # Killed after step 3.
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("laboratory").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [
        (step, 3.0) for step in (1, 2, 3, 4)
    ]
    assert run.data.params == {"model.depth": "2", "train.steps": "2"}
    assert run.info.status == "FINISHED"


def test_trackio_resumes_a_run(run_directory, tmp_path, monkeypatch):
    """By Trackio itself, into a store of its own on the disk."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    pytest.importorskip("trackio", reason="Trackio is not installed")
    write_steps(run_directory, "trackio", [1, 2])
    write_steps(run_directory, "trackio", [3], resume_step=2)
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    (name,) = storage.get_runs("gptjax")
    logged = storage.get_logs("gptjax", name)
    assert [(line["step"], line["loss"]) for line in logged] == [(1, 3.0), (2, 3.0), (3, 3.0)]


@pytest.mark.parametrize("name", SERVICES)
def test_a_package_that_is_missing_is_one_sentence(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=rf"track names {name}, and the package {name} is not"):
        check_installed(TrainConfig(track=(name,)))
    check_installed(TrainConfig())


def test_a_service_that_cannot_be_reached_is_refused(run_directory, monkeypatch):
    def init(**_):
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(InputError, match="track names wandb, which fails: no route to host"):
        write_steps(run_directory, "wandb", [1])


def test_a_service_that_fails_later_costs_a_line_and_not_the_run(
    run_directory, monkeypatch, capsys
):
    wandb = FakeWandb()

    def log(scalars, step):
        wandb.logged.append(step)
        if step == 2:
            raise ConnectionError("reset by peer")

    wandb.log = log
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    write_steps(run_directory, "wandb", [1, 2, 3])
    assert wandb.logged == [1, 2]
    assert capsys.readouterr().err == (
        "wandb failed after step 2, and gets no more scalars: reset by peer\n"
    )
    assert len((run_directory / "metrics.jsonl").read_text().splitlines()) == 3
