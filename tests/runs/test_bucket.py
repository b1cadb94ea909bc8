"""Runs in a bucket: fsspec's own in memory. tests/reliability has a server and processes."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest

from gptjax.config import ExperimentConfig, InputError
from gptjax.models.build import split
from gptjax.runs.bucket import address, is_pushed
from gptjax.runs.directory import UPLOADS, load_config
from gptjax.runs.loading import checkpoint_steps, load_run
from gptjax.runs.run import run
from gptjax.system.buckets import has

URL = "memory://bucket/run"
TIMES = {"tokens_per_second", "data_wait", "mfu", "crc32"}


@pytest.fixture(scope="module")
def config(tiny_run) -> ExperimentConfig:
    config = load_config(tiny_run)
    train = dataclasses.replace(config.train, checkpoint_every=1, keep_every=2, track=())
    return dataclasses.replace(config, train=train)


@pytest.fixture(scope="module")
def stored(config, tmp_path_factory) -> dict[str, bytes]:
    """The objects of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        store = fsspec.filesystem("memory")
        store.store.clear()
        assert run(config, Path(URL), show=None)
        return {at: store.cat_file(at) for at in store.find("/bucket")}


@pytest.fixture
def bucket(stored, monkeypatch, tmp_path) -> Iterator[dict]:
    """A bucket with the finished run, on a machine that has nothing of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    store = fsspec.filesystem("memory")
    store.store.clear()
    for at, content in stored.items():
        store.pipe_file(at, content)
    yield store.store
    store.store.clear()


def _parameters(directory: str | Path, step: int | None = None) -> list[np.ndarray]:
    return jax.tree.leaves(split(load_run(directory, step).model)[1])


def test_a_run_in_a_bucket_is_the_run_on_a_disk(config, bucket, tmp_path):
    assert run(config, tmp_path / "run", show=None)
    assert checkpoint_steps(URL) == checkpoint_steps(tmp_path / "run")
    for step in checkpoint_steps(URL):
        both = _parameters(URL, step), _parameters(tmp_path / "run", step)
        for one, other in zip(*both, strict=True):
            np.testing.assert_array_equal(one, other)
    lines = [load_run(where).metrics for where in (URL, tmp_path / "run")]
    without = [[{k: v for k, v in line.items() if k not in TIMES} for line in of] for of in lines]
    assert without[0] == without[1]
    assert load_config(URL) == load_config(tmp_path / "run")
    names = {at.removeprefix("/bucket/run/").split("/")[0] for at in bucket}
    assert names == {path.name for path in (tmp_path / "run").iterdir()}
    assert not (tmp_path / "caches" / "gptjax" / "buckets").exists()


def test_a_finished_run_is_not_trained_again(config, bucket, capsys):
    before = dict(bucket)
    assert not run(config, Path(URL), show=None)
    assert f"{URL} holds a finished run" in capsys.readouterr().out
    assert bucket == before


def test_another_config_is_refused_by_the_name_of_the_bucket(config, bucket):
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=7))
    with pytest.raises(InputError, match=rf"^{re.escape(URL)} holds a run with another config"):
        run(other, Path(URL), show=None)


def test_a_run_that_was_killed_goes_on_from_what_is_in_the_bucket(config, bucket, capsys):
    """Its last checkpoint had been uploaded in part: without its list of checksums."""
    whole = _parameters(URL)
    names = json.loads(bucket["/bucket/run/checkpoints/4/checksums.json"].getvalue())["files"]
    for name in ("checkpoints/4/checksums.json", f"checkpoints/4/{next(iter(names))}"):
        del bucket[f"/bucket/run/{name}"]
    del bucket["/bucket/run/result.json"]
    assert checkpoint_steps(URL)[-1] < 4
    assert run(config, Path(URL), show=None)
    for one, other in zip(whole, _parameters(URL), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [line["step"] for line in load_run(URL).metrics][-1] == 4


def test_a_run_whose_directory_was_begun_in_part_begins_anew(config, bucket):
    fsspec.filesystem("memory").pipe_file("/bucket/run/.begun", b"")
    assert run(config, Path(URL), show=None)
    assert "/bucket/run/.begun" not in bucket
    assert len(_parameters(URL)) > 0


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damage_in_a_bucket_is_one_sentence(bucket, damage):
    name = max(
        (at for at in bucket if "/checkpoints/4/params/" in at),
        key=lambda at: len(bucket[at].getvalue()),
    )
    if damage == "missing":
        del bucket[name]
    else:
        content = bytearray(bucket[name].getvalue())
        content[len(content) // 2] ^= 1
        fsspec.filesystem("memory").pipe_file(name, bytes(content))
    said = "is missing" if damage == "missing" else "is not what was written"
    with pytest.raises(InputError, match=rf"^The checkpoint {re.escape(URL)}/.*{said}"):
        load_run(URL, 4)


def test_what_is_no_run_is_one_sentence(bucket):
    with pytest.raises(InputError, match=r"^memory://bucket/none: there is nothing\.$"):
        load_run("memory://bucket/none")
    fsspec.filesystem("memory").pipe_file("/bucket/other/a.txt", b"1")
    with pytest.raises(InputError, match=r"^memory://bucket/other holds no run: "):
        load_run("memory://bucket/other")


def test_a_directory_is_named_as_the_user_named_it(bucket, tmp_path):
    assert address(Path(URL)) == URL
    assert address(tmp_path) == str(tmp_path)
    assert has(URL, "checkpoints")
    assert not has(URL, "other")
    assert has(tmp_path.parent, tmp_path.name)


def test_files_are_uploaded_so_that_a_kill_leaves_what_can_be_resumed():
    """A comparison's results without its question would be refused, a run's config is its last."""
    names = ["comparison.json", "runs/a/config.json", "runs/a/.begun", "runs/a/bytes.txt"]
    assert UPLOADS.ordered(names) == [
        ["comparison.json", "runs/a/.begun"],
        ["runs/a/bytes.txt"],
        ["runs/a/config.json"],
    ]


@pytest.mark.parametrize(
    ("name", "pushed"),
    [
        ("config.json", True),
        ("train/events.out.tfevents.1.vm.0", True),
        (".begun", True),
        ("runs/a/result.json", True),
        (".lock", False),
        (".lock.3", False),
        ("config.tmp", False),
        (".123.loss.png", False),
        ("checkpoints/4/params/d/a", False),
        ("runs/a/checkpoints/4/checksums.json", False),
    ],
)
def test_which_files_process_0_uploads(name, pushed):
    assert is_pushed(name) == pushed
