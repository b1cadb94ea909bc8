from pathlib import Path

import pytest

from gptjax.config import InputError
from gptjax.data.sources import embedded_corpus, read_text


def test_the_embedded_corpus_is_long_english_text():
    text = embedded_corpus()
    assert len(text) > 400_000
    assert text.count(" the ") > 3000
    assert read_text(None) == text


def test_a_file_is_read_as_it_is(tmp_path):
    text = "\ufeffa\r\nb\rc\n\n中文 \0\t"
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode("utf-8"))
    assert read_text(str(path)) == text


def _sentence(path: object) -> str:
    with pytest.raises(InputError) as error:
        read_text(str(path))
    return str(error.value)


def test_a_missing_file_is_one_sentence(tmp_path):
    path = tmp_path / "none.txt"
    assert _sentence(path) == f"data.path: cannot read {path}: No such file or directory."


def test_a_directory_is_one_sentence(tmp_path):
    assert _sentence(tmp_path) == f"data.path: cannot read {tmp_path}: Is a directory."


def test_an_empty_file_is_one_sentence(tmp_path):
    path = tmp_path / "empty.txt"
    path.touch()
    assert _sentence(path) == f"data.path: {path} is empty."


def test_an_unreadable_file_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "secret.txt"

    def refuse(path):  # As the system does, but to root too.
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert _sentence(path) == f"data.path: cannot read {path}: Permission denied."


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"\xff\xfeh\x00i\x00", "byte 0xff at offset 0"),
        (b"caf\xe9 au lait", "byte 0xe9 at offset 3"),
        ("abc 中".encode()[:-1], "byte 0xe4 at offset 4"),
        (b"ab\xed\xa0\x80", "byte 0xed at offset 2"),
    ],
    ids=["UTF-16", "Latin-1", "cut short", "a lone surrogate"],
)
def test_a_file_that_is_not_utf8_is_one_sentence_with_the_place(data, where, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    assert _sentence(path) == f"data.path: {path} is not UTF-8: {where}."
