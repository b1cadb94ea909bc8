"""Datasets of Hugging Face's library, from directories alone: nothing is downloaded."""

import pickle
import sys
from pathlib import Path

import pytest
from test_sources import sentence

from gptjax.data.sources import huggingface, open_source

TEXTS = ["first", "zweiter\n", "", "第四"]


def documents(spec: str) -> list[str]:
    source = open_source(spec)
    assert source.fingerprint == pickle.loads(pickle.dumps(source)).fingerprint
    return [source[number] for number in range(len(source))]


def test_without_the_package_it_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    expected = "hf:name needs the package datasets: pip install 'gptjax[hf-datasets]'."
    assert sentence("hf:name") == expected


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Directories of `save_to_disk`, and files that `load_dataset` finds."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    directory = tmp_path_factory.mktemp("saved")
    rows = datasets.Dataset.from_dict({"text": TEXTS, "other": TEXTS[::-1], "number": range(4)})
    rows.save_to_disk(directory / "rows")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(directory / "splits")
    (directory / "files").mkdir()
    rows.to_parquet(directory / "files" / "train-0.parquet")
    rows.select([2, 3]).to_parquet(directory / "files" / "test-0.parquet")
    return directory


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    if "datasets" in sys.modules and sys.modules["datasets"] is not None:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("spec", "expected"),
    {
        "rows": TEXTS,
        "rows#field=other": TEXTS[::-1],
        "splits": TEXTS,
        "splits#split=test": TEXTS[1:2],
        "files": TEXTS,
        "files#split=test": TEXTS[2:],
        "rows#rows=3": TEXTS[:3],
        "files#rows=2&field=other": TEXTS[::-1][:2],
        "files#rows=9": TEXTS,
    }.items(),
)
def test_rows_are_documents(spec, expected, saved):
    assert documents(f"hf:{saved}/{spec}") == expected


def test_the_fingerprint_is_that_of_the_texts(saved, monkeypatch):
    monkeypatch.setattr(huggingface, "ROWS", 3)
    prints = {
        spec: open_source(f"hf:{saved}/{spec}").fingerprint
        for spec in ("rows", "splits", "files", "files#rows=4", "files#rows=3", "rows#field=other")
    }
    assert len({prints[spec] for spec in ("rows", "splits", "files", "files#rows=4")}) == 1
    assert len(set(prints.values())) == 3


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("rows#field=texts", "has no field 'texts': it has text, other, number"),
        ("files#field=texts&rows=2", "has no field 'texts': it has text, other, number"),
        ("rows#field=number", "the field number in row 1 of "),
        ("splits#split=dev", "has no split 'dev': it has train, test"),
        ("files#split=dev", "the library datasets cannot open"),
        ("none", "the library datasets cannot open"),
        ("rows#rows=0", "has rows=0: it must be a number, from 1"),
        ("rows#column=1", "has the option column, and hf takes name, split, field, rows"),
    ],
)
def test_what_is_not_there_is_one_sentence(spec, what, saved):
    assert what in sentence(f"hf:{saved}/{spec}")
