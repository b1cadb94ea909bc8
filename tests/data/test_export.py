"""TensorFlow datasets: ours, built and read, and those that cannot be had."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from gptjax import cli
from gptjax.config import InputError
from gptjax.data.export import build_dataset
from gptjax.data.sources import Documents, open_source
from gptjax.data.sources import tfds as tfds_sources

ENGLISH = [f"{n} and {n * n} are a number and its square" for n in range(40)]
CHINESE = [f"{n} 和 {n * n} 是一个数和它的平方" for n in range(39)] + [""]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    """The specs of parallel text."""
    directory = tmp_path_factory.mktemp("texts")
    specs = {}
    for name, lines in (("source", ENGLISH), ("target", CHINESE)):
        path = directory / f"{name}.txt"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        specs[name] = f"{path}#documents=line"
    return specs


@pytest.fixture(scope="module")
def data_dir(texts, tmp_path_factory) -> Path:
    """A directory with the dataset `pairs`, 1.0.0, of several shards."""
    directory = tmp_path_factory.mktemp("datasets")
    columns = {field: open_source(spec) for field, spec in texts.items()}
    build_dataset(columns, directory, name="pairs", validation_fraction=0.25, shard_bytes=5000)
    return directory


def all_of(source: Documents) -> list[str]:
    return [source[index] for index in range(len(source))]


def sentence(spec: str) -> str:
    with pytest.raises(InputError) as error:
        all_of(open_source(spec))
    message = str(error.value)
    assert message.startswith("data.source: ")
    assert message.endswith((".", "?"))
    assert "\n" not in message
    return message.removeprefix("data.source: ")


def test_a_dataset_has_the_documents_in_their_order(data_dir):
    where = f"tfds:pairs#data_dir={data_dir}"
    assert all_of(open_source(f"{where}&field=source")) == ENGLISH[:30]
    assert all_of(open_source(f"{where}&field=target&split=validation")) == CHINESE[30:]
    assert all_of(open_source(f"{where}&field=target&split=train[10:12]")) == CHINESE[10:12]
    everything = f"tfds:pairs:1.0.0#split=train+validation&field=source&data_dir={data_dir}"
    source = open_source(everything)
    assert all_of(source) == ENGLISH
    assert all_of(pickle.loads(pickle.dumps(source))) == ENGLISH
    with pytest.raises(IndexError):
        source[-1]
    assert len(list(data_dir.glob("pairs/1.0.0/*train.array_record*"))) > 1
    assert not (data_dir / "downloads").exists()


def test_users_of_tfds_read_it_without_gptjax_and_tensorflow(data_dir):
    code = f"""
import sys
class Missing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "gptjax":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import tensorflow_datasets as tfds
read = tfds.data_source("pairs", split="train", data_dir={str(data_dir)!r})
builder = tfds.builder_from_directory({str(data_dir / "pairs" / "1.0.0")!r})
again = builder.as_data_source(split="validation")
print(len(read), read[2]["source"].decode(), len(again), again[0]["source"].decode(), sep="|")
assert "tensorflow" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == f"30|{ENGLISH[2]}|10|{ENGLISH[30]}\n"


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(data_dir, texts, tmp_path):
    spec = "tfds:pairs#field=source&data_dir="
    fingerprint = open_source(f"{spec}{data_dir}").fingerprint
    shutil.copytree(data_dir, tmp_path / "moved")
    assert open_source(f"{spec}{tmp_path / 'moved'}").fingerprint == fingerprint
    # As many bytes and examples: what tells them apart is what build_dataset wrote beside them.
    other = texts["source"].replace("source", "other")
    Path(other.partition("#")[0]).write_text("\n".join(ENGLISH).replace("number", "nombre"))
    columns = {"source": open_source(other), "target": open_source(texts["target"])}
    build_dataset(columns, tmp_path, name="pairs", validation_fraction=0.25, shard_bytes=5000)
    others = [f"{spec}{tmp_path}", f"{spec}{data_dir}&split=validation"]
    others.append(f"tfds:pairs#field=target&data_dir={data_dir}")
    assert len({fingerprint, *(open_source(each).fingerprint for each in others)}) == 4


def test_what_a_dataset_lacks_is_one_sentence(data_dir, tmp_path):
    where = f"tfds:pairs#data_dir={data_dir}"
    assert sentence(where) == "tfds:pairs has no field 'text': it has source, target."
    assert "no field 'source/en': it has none" in sentence(f"{where}&field=source/en")
    assert "has no split 'test': known are" in sentence(f"{where}&field=source&split=test")
    assert "Error parsing split" in sentence(f"{where}&field=source&split=train[:x]")
    assert "no examples in its split" in sentence(f"{where}&field=source&split=train[:0]")
    assert "none is prepared in" in sentence(f"tfds:pears#data_dir={data_dir}")
    assert "unknown option 'fields': did you mean field?" in sentence("tfds:pairs#fields=x")
    assert "is no name of TFDS" in sentence("tfds:huggingface:pairs")
    assert "did you mean lm1b?" in sentence("tfds:lm1bb")
    assert "cannot be loaded at version 9.9.9, only: 1.1.0" in sentence("tfds:lm1b:9.9.9")
    shutil.copytree(data_dir, tmp_path / "damaged")
    shards = sorted((tmp_path / "damaged").glob("pairs/1.0.0/*train.array_record*"))
    damaged = f"tfds:pairs#field=source&data_dir={tmp_path / 'damaged'}"
    shards[1].write_bytes(shards[1].read_bytes()[:1000])
    assert "cannot read example" in sentence(damaged)
    shards[1].unlink()
    assert "lacks its file" in sentence(damaged)


def renamed_features(directory: Path, edit: Callable[[str], str]) -> None:
    path = directory / "pairs" / "1.0.0" / "features.json"
    path.write_text(edit(path.read_text()))


def test_a_dataset_runs_no_code_that_lies_beside_it(data_dir, tmp_path, monkeypatch):
    own = "tensorflow_datasets.core.features."
    interventions = {
        "its dictionary": lambda text: text.replace(f"{own}features_dict.", "owner.evil."),
        "a field": lambda text: text.replace(f"{own}text_feature.", "owner.evil.", 1),
        "as older versions wrote it": lambda _: json.dumps(
            {"type": "owner.evil.Text", "content": {}}
        ),
    }
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, edit in interventions.items():
        directory = tmp_path / name
        shutil.copytree(data_dir, directory)
        renamed_features(directory, edit)
        said = sentence(f"tfds:pairs#field=source&data_dir={directory}")
        assert "it has a feature 'owner.evil." in said
        assert said.endswith("which is none of TFDS's own.")
    assert not (tmp_path / "owned").exists()
    assert "owner" not in sys.modules
    # What TFDS builds for others is theirs again.
    with pytest.raises(ValueError, match="Could not import owner"):
        tfds.features.FeatureConnector.cls_from_name("owner.none.Text")


def test_a_relative_directory_is_found_and_so_is_one_that_the_environment_names(
    data_dir, monkeypatch
):
    monkeypatch.chdir(data_dir.parent)
    expected = open_source(f"tfds:pairs#field=source&data_dir={data_dir}")
    found = open_source(f"tfds:pairs#field=source&data_dir={data_dir.name}")
    assert (all_of(found), found.fingerprint) == (all_of(expected), expected.fingerprint)
    for named in (data_dir.name, f"./{data_dir.name}/", str(data_dir)):
        monkeypatch.setenv("TFDS_DATA_DIR", named)
        assert all_of(open_source("tfds:pairs#field=source")) == all_of(expected)


def test_damaged_descriptions_are_one_sentence(data_dir, tmp_path, monkeypatch):
    where = f"tfds:pairs#field=source&data_dir={tmp_path / 'ds'}"
    bad = {
        "features.json": ["{", "[" * 100_000, '{"pythonClassName": 1}', "9" * 5000, "null"],
        "dataset_info.json": ["{", "[" * 100_000, '{"name": "pairs"}', "9" * 5000, "null"],
    }
    for name, contents in bad.items():
        for content in contents:
            shutil.rmtree(tmp_path / "ds", ignore_errors=True)
            shutil.copytree(data_dir, tmp_path / "ds")
            (tmp_path / "ds" / "pairs" / "1.0.0" / name).write_text(content)
            assert len(sentence(where)) < 600
    path = tmp_path / "ds" / "pairs" / "1.0.0" / "features.json"
    path.unlink()
    os.mkfifo(path)
    assert sentence(where) == f"{path} is no regular file."
    path.unlink()
    monkeypatch.setattr(tfds_sources, "DESCRIPTION", 10)
    assert "is larger than 0 MiB, which no description is" in sentence(where)
    assert "File name too long" in sentence(f"tfds:pairs#data_dir=/{'a' * 300}")


def test_without_a_network_a_dataset_is_refused_within_seconds(tmp_path, monkeypatch, request):
    ended = threading.Event()
    request.addfinalizer(ended.set)

    def unreachable(*_, **__):
        ended.wait()  # As for a name server or a firewall that says nothing.
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(tfds_sources, "PROBE_SECONDS", 0.2)
    begun = time.monotonic()
    message = sentence(f"tfds:lm1b#data_dir={tmp_path}")
    assert time.monotonic() - begun < 5
    assert message.startswith(f"lm1b/1.1.0 is not prepared in {tmp_path / 'lm1b'}, and ")
    assert "cannot be reached" in message
    assert "#data_dir=DIR" in message
    assert not list(tmp_path.iterdir())


def test_a_builder_that_needs_tensorflow_says_so_before_it_downloads(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_sources, "any_answers", lambda hosts: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = sentence(f"tfds:lm1b#data_dir={tmp_path}")
    assert message.endswith("TFDS needs TensorFlow to prepare it: install gptjax[tensorflow].")
    assert not list(tmp_path.iterdir())


def test_a_host_answers_or_does_not():
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = server.getsockname()
        assert tfds_sources.any_answers([here])
    assert not tfds_sources.any_answers([here])


def test_a_version_is_never_overwritten(data_dir, texts):
    before = {path: path.read_bytes() for path in data_dir.rglob("*") if path.is_file()}
    columns = {"text": open_source(texts["source"])}
    with pytest.raises(InputError, match=r"1\.0\.0 is there, and is not overwritten"):
        build_dataset(columns, data_dir, name="pairs")
    assert before == {path: path.read_bytes() for path in data_dir.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"name": "My-corpus"}, "name is 'My-corpus': it must be lower case letters"),
        ({"name": "lm1b"}, "TFDS has a dataset of that name"),
        ({"version": "1.0"}, "version is '1.0': it must be three numbers"),
        ({"validation_fraction": 1.0}, "it must be at least 0 and below 1"),
        ({"validation_fraction": 0.001}, "leaves a split without any"),
    ],
)
def test_a_dataset_that_cannot_be_built_is_one_sentence(flags, what, texts, tmp_path):
    columns = {"text": open_source(texts["source"])}
    with pytest.raises(InputError, match=what):
        build_dataset(columns, tmp_path, **{"name": "corpus", **flags})
    assert not list(tmp_path.iterdir())


def test_a_document_that_cannot_be_read_leaves_nothing(texts, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{}\n')
    with pytest.raises(InputError, match="line 2"):
        build_dataset({"text": open_source(str(path))}, tmp_path / "built", name="corpus")
    assert not (tmp_path / "built").exists()
    columns = {"source": open_source(texts["source"]), "target": open_source("embedded")}
    with pytest.raises(InputError, match="parallel text needs as many in both"):
        build_dataset(columns, tmp_path / "built", name="corpus")


def test_the_command_builds_what_its_last_word_names(texts, tmp_path, monkeypatch, capsys):
    arguments = ["build-dataset", texts["target"], "--name", "corpus", "--data-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gptjax", *arguments, "--version", "2.1.0"])
    cli.main()
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'corpus' / '2.1.0'} has 40 documents: ")
    assert all_of(open_source(out.split()[-1])) == CHINESE
    builder = tfds.builder("corpus", data_dir=tmp_path)
    assert str(builder.version) == "2.1.0"
