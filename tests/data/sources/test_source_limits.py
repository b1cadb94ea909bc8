"""What a file may not do to its reader: keep it waiting, fill its memory, be read as another."""

import os
import socket
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from test_sources import documents, packed, sentence

from gptjax.config import InputError
from gptjax.data.sources import files, open_source, text


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(packed(path.name, content))
    return path


@pytest.mark.parametrize("name", ["f", "f.gz", "f.zst", "f.jsonl", "f.parquet"])
def test_what_is_no_file_is_refused_at_once(name, tmp_path):
    path = tmp_path / name
    os.mkfifo(path)
    assert sentence(path) == f"{path} is no regular file, which random access needs."
    assert "no regular file" in sentence(f"{tmp_path}/*{name}")
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        assert "no regular file" in sentence(path)
    assert "no regular file" in sentence("/dev/zero")
    too_long = tmp_path / ("n" * 300)
    assert sentence(too_long) == f"cannot read {too_long}: File name too long."
    assert sentence("a\0b") == r"'a\x00b' has a zero byte, which no path has."


def test_a_file_that_has_become_a_pipe_is_not_waited_for(tmp_path):
    path = written(tmp_path / "a.txt", b"a\nb\n")
    source = open_source(f"{path}#documents=line")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="has shrunk from 4 to 0 bytes"):
        source[0]


def test_a_file_that_grows_while_it_is_read_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 4)
    path = written(tmp_path / "a.txt", b"abc\ndef\n")

    def growing(begin: bytes) -> int:
        with path.open("ab") as file:
            file.write(b"more\n")
        return 0

    monkeypatch.setattr(files, "_mark", growing)
    assert "has changed since it was opened" in sentence(path)


def test_what_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "UNPACKED", 1 << 20)
    monkeypatch.setattr(files, "CHUNK", 1 << 16)
    for name in ("bomb.txt.gz", "bomb.txt.zst"):
        path = written(tmp_path / name, bytes(2 << 20))
        assert f"{name} unpacks to more than 200 times its " in (message := sentence(path))
        assert message.endswith(" bytes and 1 MiB, as no text does.")
    assert len(documents(written(tmp_path / "small.txt.gz", bytes(1 << 20)))) == 16
    large = pyarrow.table({"text": ["a" * (2 << 20)]})
    parquet.write_table(large, tmp_path / "bomb.parquet", compression="gzip")
    assert "unpacks to more than" in sentence(tmp_path / "bomb.parquet")
    # A dictionary of one long string that all rows have: two terabytes, were they not one.
    texts = pyarrow.DictionaryArray.from_arrays(np.zeros(1 << 21, np.int32), ["a" * (1 << 20)])
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "same.parquet")
    source = open_source(str(tmp_path / "same.parquet"))
    assert (len(source), len(source[1 << 20])) == (1 << 21, 1 << 20)
    monkeypatch.setattr(text, "LONGEST", 1 << 17)
    line = written(tmp_path / "line.txt", b"a\n" + bytes(1 << 19))
    for options in ("#documents=line", "#documents=block", "#column=1"):
        assert sentence(f"{line}{options}").startswith(f"document {1 + ('k' not in options)} of ")
    assert "is longer than 0 MiB" in sentence(written(tmp_path / "line.jsonl", bytes(1 << 19)))


def test_damaged_parquet_is_one_sentence_and_with_checksums_never_another_text(tmp_path):
    draw, path = np.random.default_rng(0), tmp_path / "a.parquet"
    texts = [f"text {number}" for number in range(30)]
    table = pyarrow.table({"text": texts})
    options = {"compression": "none", "write_page_checksum": True}
    parquet.write_table(table, path, row_group_size=12, **options)
    raw, said = path.read_bytes(), []
    for place in draw.integers(len(raw), size=150):
        damaged = bytearray(raw)
        damaged[place] ^= draw.integers(1, 256)
        path.write_bytes(damaged)
        try:
            assert documents(path) == texts
        except InputError as error:
            said.append(str(error))
    assert len(said) > 50
    for message in said:
        assert message.startswith("data.source: ")
        assert str(path) in message
        assert "\n" not in message
