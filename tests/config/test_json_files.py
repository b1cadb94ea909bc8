"""JSON that is damaged, endless or a trap is one sentence, before it takes time or memory."""

import json
import os
from pathlib import Path

import pytest

from gptjax.config import (
    InputError,
    json_files,
    parse_json,
    read_json,
    read_json_object,
    read_sealed,
    sealed,
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", ": Expecting value"),
        (b"\xff{}", ": 'utf-8' codec can't decode byte 0xff"),
        ("[" * 100_000 + "]" * 100_000, r"its brackets are more than 100 deep\."),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, r"its brackets are more than 100 deep\."),
        ("[" * 100_000, r"its brackets are more than 100 deep\."),
        ("[" * 101 + "]" * 101, r"its brackets are more than 100 deep\."),
        ("[" + "7" * 5_000 + "]", r"it has a number of 5,000 digits, not of 300\."),
        ("-" + "7" * 300, r"it has a number of 301 digits"),
    ],
)
def test_what_is_not_read_is_one_sentence(text, sentence):
    with pytest.raises(InputError, match=f"^here is not JSON.*{sentence}") as error:
        parse_json(text, "here")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_what_is_within_the_limits_is_read():
    assert parse_json("[" * 100 + "]" * 100, "here")
    assert parse_json("7" * 300, "here") == int("7" * 300)
    assert parse_json(b'\xef\xbb\xbf{"a": [1, -2, 2.5e3, null, "\xc3\xa9"]}', "here") == {
        "a": [1, -2, 2500.0, None, "é"]
    }
    assert json_files.MOST_DIGITS <= 308  # More would not fit into a float.


def test_a_file_that_is_no_file_of_json_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    with pytest.raises(InputError, match=r"^cannot read .*config\.json: No such file or directory"):
        read_json(path)
    with pytest.raises(InputError, match=r"^cannot read .*: File name too long\.$"):
        read_json(tmp_path / ("x" * 300))
    path.write_text("[1]")
    assert read_json(path) == [1]
    with pytest.raises(InputError, match=r"config\.json holds list, not a JSON object\.$"):
        read_json_object(path)
    monkeypatch.setattr(json_files, "MOST_BYTES", 2)
    with pytest.raises(InputError, match=r"config\.json is larger than 0 MiB"):
        read_json(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_is_not_waited_for(tmp_path: Path, make):
    make(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"config\.json is not a regular file\.$"):
        read_json(tmp_path / "config.json")


def test_every_bit_of_what_is_sealed_counts(tmp_path, capsys):
    path, content = tmp_path / "config.json", {"config": {"rate": 3e-3, "é": [1, None]}, "n": 2}
    written = json.dumps(sealed(content), indent=2, ensure_ascii=False).encode()
    path.write_bytes(written)
    assert read_sealed(path) == content
    assert capsys.readouterr().err == ""
    for place in range(len(written)):
        for bit in range(8):
            damaged = bytearray(written)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                same = read_sealed(path) == content
            except InputError:
                continue
            # White space between values says nothing, and a damaged name is as one that is missing.
            assert same or capsys.readouterr().err.startswith(f"{path} has no crc32")
            json_files._say_unsealed.cache_clear()


def test_what_an_older_version_wrote_is_read_with_a_line(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text('{"config": {}}')
    for _ in range(2):
        assert read_sealed(path) == {"config": {}}
    assert capsys.readouterr().err == (
        f"{path} has no crc32: whether it is damaged is not known.\n"
    )
