"""Where text comes from: files and their mistakes (TensorFlow datasets: test_datasets.py)."""

import concurrent.futures
import functools
import gzip
import itertools
import json
import os
import pickle
import sys
import tempfile
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from gptjax.config import InputError
from gptjax.data.sources import Documents, embedded_corpus, files, open_source

SHARED = Path(__file__).parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="shared/ (real text) is not there")

NASTY = "a\ufeff\r\nb\rc\n\n中文 \0\t"


def all_of(source: Documents) -> list[str]:
    return [source[index] for index in range(len(source))]


def documents(spec: object) -> list[str]:
    return all_of(open_source(str(spec)))


def sentence(spec: object) -> str:
    """The mistake of opening a source, or of reading one of its documents."""
    with pytest.raises(InputError) as error:
        documents(spec)
    message = str(error.value)
    assert message.startswith("data.source: ")
    assert message.endswith((".", "?"))
    assert "\n" not in message
    return message.removeprefix("data.source: ")


def packed(name: str, data: bytes) -> bytes:
    """`data` as a file of this name holds it."""
    if name.lower().endswith(".zst"):
        # Two frames, as of a file that was written in two parts.
        return b"".join(
            pyarrow.compress(part, "zstd", asbytes=True) for part in (data[:3], data[3:])
        )
    return gzip.compress(data) if name.lower().endswith(".gz") else data


@pytest.fixture
def write(tmp_path):
    def written(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(packed(name, data))
        return path

    return written


@pytest.fixture
def table(tmp_path):
    """A Parquet file of three row groups, the second one empty."""
    path = tmp_path / "table.parquet"
    schema = pyarrow.schema({"text": pyarrow.string(), "number": pyarrow.int64()})
    with parquet.ParquetWriter(path, schema) as writer:
        for texts in (["a", "中\r\n", ""], [], ["d", "e"]):
            writer.write_table(pyarrow.table([texts, [0] * len(texts)], schema=schema))
    return path


def test_the_embedded_corpus_is_long_english_text():
    text = embedded_corpus()
    assert len(text) > 400_000
    assert text.count(" the ") > 3000
    assert documents("embedded") == [text]


@pytest.mark.parametrize("suffix", ["txt", "md", "", "txt.gz", "txt.zst"])
def test_a_file_of_text_is_a_document_as_it_is(suffix, write):
    assert documents(write(f"text.{suffix}", NASTY)) == [NASTY]


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "txt.zst"])
@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ("documents=line", "a\n\nb\r\n\r\nc\rd\r", ["a", "", "b", "", "c\rd\r"]),
        ("documents=line", "a\n", ["a"]),
        ("documents=line", "\n", [""]),
        ("documents=line", "\n\n", ["", ""]),
        ("documents=block", "\n \n  a\r\nb \n\t\r\n\n\nc\r\n", ["  a\r\nb ", "c"]),
        ("documents=block", "a", ["a"]),
        ("column=1", "a\tb\tc\r\nd\te", ["a", "d"]),
        ("column=2", "a\tb\tc\r\nd\te\r\n\t\n", ["b", "e", ""]),
    ],
)
def test_a_file_has_documents_within_it(options, text, expected, suffix, write):
    source = open_source(f"{write(f'text.{suffix}', text)}#{options}")
    assert all_of(source) == expected
    assert [source[n] for n in reversed(range(len(source)))] == expected[::-1]


def test_a_pattern_is_all_its_files_in_order(write, tmp_path):
    for name in ("b/2.txt", "a/1.txt.gz", "a/deep/er/0.txt", "c.md"):
        write(name, name)
    assert documents(tmp_path / "**" / "*.txt*") == ["a/1.txt.gz", "a/deep/er/0.txt", "b/2.txt"]
    assert documents(f"{tmp_path}/?/*.txt*#documents=line") == ["a/1.txt.gz", "b/2.txt"]


def test_links_in_a_circle_and_second_names_give_no_document_twice(write, tmp_path, monkeypatch):
    write("a/1.txt", "1")
    write("b/2.txt", "2")
    write("b/.hidden/3.txt", "3")
    for name, target in (("a/loop", "."), ("a/up", ".."), ("b/a", "../a"), ("b/up", "..")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "b" / "0.txt").symlink_to("2.txt")
    (tmp_path / "b" / "9.txt").hardlink_to(tmp_path / "b" / "2.txt")
    assert documents(f"{tmp_path}/**/*.txt") == ["1", "2"]
    assert documents(f"{tmp_path}/**/**/[0-9].txt") == ["1", "2"]
    assert documents(f"{tmp_path}/a/**") == ["1", "2"]  # By the link to the directory above.
    monkeypatch.chdir(tmp_path)
    assert documents("**/*.txt") == ["1", "2"]
    assert documents("b/*.txt") == ["2"]
    (tmp_path / "b" / "nowhere.txt").symlink_to("none")
    assert sentence("b/*.txt") == "cannot read b/nowhere.txt: No such file or directory."


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "TXT.GZ", "Txt.Gz", "txt.ZST"])
def test_a_byte_order_mark_is_no_text(suffix, tmp_path):
    path, same = tmp_path / f"text.{suffix}", tmp_path / "same.txt"
    text = "a\tb\n\n\ufeffc\td\n"
    same.write_text(text)
    data = b"\xef\xbb\xbf" + text.encode()
    path.write_bytes(packed(path.name, data))
    expected = {
        "": [text],
        "#documents=line": ["a\tb", "", "\ufeffc\td"],
        "#documents=block": ["a\tb", "\ufeffc\td"],
        "#column=1": ["a"],
    }
    for options, found in expected.items():
        source = open_source(f"{path}{options}")
        assert [source[n] for n in range(len(found))] == found
        assert source.fingerprint == open_source(f"{same}{options}").fingerprint
    data = b"\xef\xbb\xbfabc\xff"
    path.write_bytes(packed(path.name, data))
    assert "byte 0xff at offset 6" in sentence(path)
    path.write_bytes(packed(path.name, data[:3]))
    assert sentence(path).endswith(("is empty.", "holds nothing."))


@pytest.mark.parametrize("name", ["a.JSONL", "a.Jsonl", "a.jsonl.GZ", "a.JSONL.gz", "a.jsonl.zst"])
def test_suffixes_in_capitals_are_the_same(name, table, tmp_path):
    data = '\ufeff{"text": "a"}\n \t\r\n\n{"text": "b"}\n\n'.encode()
    path = tmp_path / name
    path.write_bytes(packed(path.name, data))
    assert documents(path) == ["a", "b"]
    assert len(documents(table.rename(tmp_path / "table.Parquet"))) == 5
    assert "is Parquet in .gz" in sentence(tmp_path / "t.PARQUET.GZ")
    assert "is packed as .xz" in sentence(tmp_path / "t.txt.XZ")


def test_an_empty_file_among_many_is_a_document_like_an_empty_line(write, tmp_path):
    for number, content in enumerate(["", "a\nb\n", "", " \n", ""]):
        write(f"{number}.txt{'.gz' if number > 2 else ''}", content)
    assert documents(f"{tmp_path}/*.txt*") == ["", "a\nb\n", "", " \n", ""]
    assert documents(f"{tmp_path}/*.txt*#documents=line") == ["a", "b", " "]
    assert documents(f"{tmp_path}/*.txt*#documents=block") == ["a\nb"]
    assert sentence(f"{tmp_path}/[02].txt") == f"{tmp_path}/0.txt is empty."
    write("a.jsonl", "")
    write("b.jsonl", '{"text": "b"}')
    assert documents(f"{tmp_path}/*.jsonl") == ["b"]
    write("b.jsonl", "\n \n")
    assert sentence(f"{tmp_path}/*.jsonl") == f"{tmp_path}/b.jsonl has only blank lines."


def test_a_name_that_looks_like_a_pattern_or_an_option_is_a_name_where_it_is_there(write):
    for name in ("a[1]*.txt", "a#b.txt", "a#b=c.txt"):
        assert documents(write(name, name)) == [name]
        assert documents(f"{write(name, name)}#documents=line") == [name]


def test_a_long_file_is_cut_at_line_ends(write, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 8)
    path = write("text.txt", "abc\ndef\nghi\n0123456中9\nz")
    assert documents(path) == ["abc\ndef\n", "ghi\n", "0123456", "中9\nz"]


def test_a_line_longer_than_a_chunk_is_one_line_of_its_block(write, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 8)
    line, spaces = "0123456789 中", " " * 20
    path = write("text.txt", f"{spaces}\n{line}{spaces}\n{spaces}{line}\n{spaces}\n{line}")
    expected = [f"{line}{spaces}\n{spaces}{line}", line]
    assert documents(f"{path}#documents=block") == expected


def test_json_lines_and_parquet_have_a_field_of_each_record(write, table):
    lines = [{"text": NASTY, "id": 1}, {"id": 2, "text": ""}]
    text = "\r\n".join(json.dumps(line) for line in lines)
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert documents(write(name, text)) == [NASTY, ""]
    assert documents(table) == ["a", "中\r\n", "", "d", "e"]
    other = write("b.jsonl", '{"body": "x"}')
    assert documents(f"{other}#field=body") == ["x"]


def test_bytes_that_are_not_utf8_can_be_replaced(write):
    path = write("text.txt", b"a\xff\nb")
    assert documents(f"{path}#errors=replace") == ["a\ufffd\nb"]
    assert documents(f"{path}#documents=line&errors=replace") == ["a\ufffd", "b"]


def test_a_fingerprint_is_of_the_content_and_of_how_it_is_read(write, table, tmp_path):
    def fingerprint(spec: object) -> str:
        return open_source(str(spec)).fingerprint

    path, same = write("a.txt", "x\ny"), write("other/b.txt.gz", "x\ny")
    assert fingerprint(path) == fingerprint(same)
    write("parts/1.txt", "x")
    write("parts/2.txt", "\ny")
    others = [path, "embedded", write("c.txt", "x\nz"), tmp_path / "parts" / "*.txt", table]
    options = ["documents=line", "documents=block", "column=1", "errors=replace"]
    others += [f"{path}#{option}" for option in options]
    fingerprints = [fingerprint(spec) for spec in others]
    assert len({*fingerprints}) == len(fingerprints)
    assert all(len(bytes.fromhex(each)) == 32 for each in fingerprints)


def test_threads_read_at_the_same_time(write, table, request):
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)  # Threads take turns so often that they meet everywhere.
    lines = [f"{n} {'x' * (n % 97)}" for n in range(2000)]
    path = write("a.txt.gz", "\n".join(lines))
    sources = {
        open_source(f"{path}#documents=line"): lines,
        open_source(str(table)): ["a", "中\r\n", "", "d", "e"],
    }
    for source, expected in sources.items():
        order = np.random.default_rng(0).integers(0, len(source), 4000)
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            read = list(threads.map(source.__getitem__, order))
        assert read == [expected[index] for index in order]


def test_threads_hold_one_row_group_together(table, monkeypatch):
    source = open_source(str(table))
    within: list[int] = []
    most: list[int] = []

    def slowly(_) -> None:
        within.append(1)
        most.append(len(within))
        time.sleep(0.02)
        within.pop()

    monkeypatch.setattr(files.File, "check_unchanged", slowly)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(source.__getitem__, [0, 4, 0, 4]))
    assert set(most) == {1}


def test_a_source_is_opened_again_where_it_is_unpickled(write, table):
    path = write("a.txt.gz", "a\nb")
    for spec in ("embedded", f"{path}#documents=line", str(table)):
        source = open_source(spec)
        again = pickle.loads(pickle.dumps(source))
        assert (all_of(again), again.fingerprint) == (all_of(source), source.fingerprint)
    pickled = pickle.dumps(open_source(str(path)))
    write("a.txt.gz", "a\nc")
    with pytest.raises(InputError, match="is not the text that it was"):
        pickle.loads(pickled)


def test_an_index_that_is_not_there_is_an_index_error(write, table):
    line = write("a.jsonl", '{"text": ""}')
    for spec in ("embedded", f"{write('a.txt', 'a')}#documents=line", line, table):
        source = open_source(str(spec))
        for index in (-1, len(source)):
            with pytest.raises(IndexError):
                source[index]


def test_files_that_cannot_be_read_are_one_sentence(write, tmp_path):
    none = tmp_path / "none.txt"
    assert sentence(none) == f"cannot read {none}: No such file or directory."
    assert sentence(tmp_path) == f"cannot read {tmp_path}: Is a directory."
    assert sentence(f"{tmp_path}/*.md") == f"no file fits {tmp_path}/*.md."
    assert "is empty" in sentence(write("empty.txt", ""))
    assert "holds nothing" in sentence(write("empty.txt.gz", ""))
    blank = write("blank.txt", "\n \n")
    assert sentence(f"{blank}#documents=block") == f"{blank} has only blank lines."
    assert "no regular file" in sentence("/dev/null")


def test_a_file_without_permission_is_one_sentence(write, monkeypatch):
    path = write("secret.txt", "a")

    def refuse(path, *_, **__):  # As the system does, but to root too.
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    assert sentence(path) == f"cannot read {path}: Permission denied."


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"\xff\xfeh\x00i\x00", "byte 0xff at offset 0"),
        (b"caf\xe9 au lait", "byte 0xe9 at offset 3"),
        ("abc 中".encode()[:-1], "byte 0xe4 at offset 4"),
        (b"ab\xed\xa0\x80", "byte 0xed at offset 2"),
        (b"line\n" * 7 + b"\x80\x80\x80\x80\x80\x80\x80\x80\x80", "byte 0x80 at offset 35"),
    ],
    ids=["UTF-16", "Latin-1", "cut short", "a lone surrogate", "behind the first chunk"],
)
@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "txt.zst"])
def test_a_file_that_is_not_utf8_is_one_sentence_with_the_place(
    data, where, suffix, write, monkeypatch
):
    monkeypatch.setattr(files, "CHUNK", 16)
    path = write(f"text.{suffix}", data)
    for options in ("", "#documents=line", "#documents=block", "#column=1"):
        assert f"{path} is not UTF-8: {where} (#errors" in sentence(f"{path}{options}")


def test_a_file_that_changes_while_it_is_read_is_one_sentence(write, table):
    path = write("a.txt", "a\nb\nc\n")
    source = open_source(f"{path}#documents=line")
    os.truncate(path, 3)
    with pytest.raises(InputError, match="has shrunk from 6 to 3 bytes"):
        source[0]
    write("a.txt", "a\nb\nd\n")
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputError, match="has changed since it was opened"):
        source[0]
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        source[0]
    source = open_source(str(table))
    os.truncate(table, 10)
    with pytest.raises(InputError, match="has shrunk"):
        source[0]


def test_a_file_that_shrinks_within_a_read_is_one_sentence(write, monkeypatch):
    source = open_source(str(write("a.txt", "abc")))
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    with pytest.raises(InputError, match="has shrunk while it was read"):
        source[0]


def test_a_damaged_gzip_file_is_one_sentence(write, tmp_path):
    whole = gzip.compress(bytes(range(256)) * 9, mtime=0)
    flipped = bytes([*whole[:-30], whole[-30] ^ 255, *whole[-29:]])
    for data in (whole[:-5], whole[:12], flipped, b"no gzip", whole + b"more"):
        path = tmp_path / "a.txt.gz"
        path.write_bytes(data)
        assert f"{path} is a damaged gzip file: " in sentence(path)


def test_a_damaged_zstd_file_is_one_sentence(tmp_path):
    whole = pyarrow.compress(bytes(range(256)) * 9, "zstd", asbytes=True)
    for data in (whole[:-5], whole[:12], b"no zstd", whole + b"more"):
        path = tmp_path / "a.txt.zst"
        path.write_bytes(data)
        assert f"{path} is a damaged zstd file: " in sentence(path)
    path.unlink()
    assert sentence(path) == f"cannot read {path}: No such file or directory."


def test_a_full_disk_is_one_sentence(write, monkeypatch):
    path, full = write("a.txt.gz", "a"), write("full", "")
    made = os.open("/dev/full", os.O_RDWR), str(full)
    monkeypatch.setattr(tempfile, "mkstemp", lambda: made)
    assert f"cannot unpack {path} into " in (message := sentence(path))
    assert message.endswith("No space left on device.")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "is not JSON"),
        ("\u00a0", "is not JSON"),
        ('{"text": "", "id": ' + "9" * 5000 + "}", "it has a number of 5,000 digits"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"body": "", "id": 1}', "has no field 'text': it has body, id"),
        ("{}", "has no field 'text': it has none"),
        ('{"text": 1}', "int, not a string"),
        ('{"text": null}', "null, not a string"),
        (r'{"text": "\ud800"}', "has half of a surrogate pair"),
    ],
)
def test_a_line_that_is_no_record_is_one_sentence(line, what, write):
    path = write("a.jsonl", f'{{"text": "good"}}\n{line}\n')
    assert what in (message := sentence(path))
    assert f"line 2 of {path}" in message
    assert "line 1 of" in sentence(write("b.jsonl", f"{line}\n"))
    # Blank lines are counted too, where they are passed over.
    assert "line 5 of" in sentence(write("c.jsonl", f'\n{{"text": ""}}\n\t\n \r\n{line}\n'))


def test_a_line_without_the_column_is_one_sentence(write):
    path = write("a.txt", "a\tb\nc\n")
    expected = f"line 2 of {path} has 1 columns, and column 2 is asked for."
    assert sentence(f"{path}#column=2") == expected


def test_parquet_that_does_not_fit_is_one_sentence(table, write, tmp_path):
    assert sentence(f"{table}#field=txt") == f"{table} has no field 'txt': it has text, number."
    assert "holds int64, not strings" in sentence(f"{table}#field=number")
    assert "is no whole Parquet file" in sentence(write("b.parquet", b"PAR1 and no more"))
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    assert "row 2 of row group 1" in (message := sentence(tmp_path / "null.parquet"))
    assert "is null, not a string" in message
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], "str")}), tmp_path / "0.parquet")
    assert "has no rows" in sentence(tmp_path / "0.parquet")
    twice = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "2.parquet")
    assert sentence(tmp_path / "2.parquet").endswith("has 2 columns of the name text.")
    wide = pyarrow.table([["a"]] * 30, names=[f"c{n}\n" for n in range(30)])
    parquet.write_table(wide, tmp_path / "30.parquet")
    assert sentence(tmp_path / "30.parquet").endswith(r"'c18\n', 'c19\n' and 10 more.")


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()], ids=str
)
def test_strings_are_read_however_they_are_held(kind, tmp_path):
    texts = pyarrow.array(["a", "a text of more than twelve bytes", "a"])
    for number, held in enumerate([texts.cast(kind), texts.dictionary_encode()]):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.table({"text": held}), path)
        assert documents(path) == texts.to_pylist()


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("", "names no text"),
        ("#column=1", "names no text"),
        ("embedded#column=1", "has the option column, and embedded takes no options"),
        ("{dir}/a.jsonl#column=1", "has the option column, and JSON lines takes field, errors"),
        ("{dir}/a.parquet#errors=replace", "has the option errors, and Parquet takes field"),
        ("{dir}/a.txt#split=train", "has the option split, and text takes documents, column"),
        ("{dir}/a.txt#colum=1", "has an unknown option 'colum': did you mean column?"),
        ("{dir}/a.txt#column=1&error=x", "has an unknown option 'error': did you mean errors?"),
        ("{dir}/a.txt#column=1&column=2", "has the option column twice"),
        ("{dir}/a.txt#column=", "has the option column without a value"),
        ("{dir}/a.txt#column=0", "has the column '0': it must be a number, from 1"),
        ("{dir}/a.txt#column=²", "has the column '²': it must be a number, from 1"),
        ("{dir}/a.txt#column=1&documents=file", "cannot have documents=file"),
        ("{dir}/a.txt#documents=lines", "it must be one of file, line, block"),
        ("{dir}/a.txt#errors=ignore", "it must be one of strict, replace"),
        ("{dir}/a.parquet.gz", "is Parquet in .gz"),
        ("{dir}/a.txt.xz", "is packed as .xz; of packed files, .gz and .zst are read"),
        ("{dir}/a.*", "fits files of several kinds: JSON lines, Parquet, text"),
    ],
)
def test_a_spec_of_another_form_is_one_sentence(spec, what, write):
    for name in ("a.txt", "a.jsonl", "a.parquet", "b.txt"):
        directory = write(name, "a").parent
    assert what in sentence(spec.format(dir=directory))


@needs_shared
def test_real_text_is_read_as_it_is():
    shakespeare = SHARED / "tinyshakespeare" / "input.txt"
    assert documents(shakespeare) == [shakespeare.read_bytes().decode()]
    english = open_source(f"{SHARED}/multi30k/train.en.gz#documents=line")
    german = open_source(f"{SHARED}/multi30k/train.de.gz#documents=line")
    assert len(english) == len(german) == 29_000
    with gzip.open(SHARED / "multi30k" / "train.de.gz", "rt", newline="\n") as lines:
        for index, line in enumerate(itertools.islice(lines, 1000)):
            assert german[index] == line.removesuffix("\n")
    pairs = [open_source(f"{SHARED}/tatoeba_cmn/cmn.txt#column={n}") for n in (1, 2)]
    assert len(pairs[0]) == len(pairs[1]) > 20_000
    assert (pairs[0][0], pairs[1][0]) == ("Hi.", "嗨。")


def test_text_in_a_bucket_is_the_text_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    store = fsspec.filesystem("memory")
    store.store.clear()
    texts = {"a.txt": b"one\ntwo\n", "b.txt": b"three\n"}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
        store.pipe_file(f"/bucket/below/{name}", text)
    store.pipe_file("/bucket/c.txt.gz", gzip.compress(b"four\n"))
    for pattern, options in (("a.txt", "#documents=line"), ("*.txt", "")):
        here = open_source(f"{tmp_path}/{pattern}{options}")
        there = open_source(f"memory://bucket/below/{pattern}{options}")
        assert all_of(there) == all_of(here)
        assert there.fingerprint == here.fingerprint
        assert all_of(pickle.loads(pickle.dumps(there))) == all_of(here)
        assert there.name == f"memory://bucket/below/{pattern}{options}"
    assert all_of(open_source("memory://bucket/c.txt.gz")) == ["four\n"]
    for missing in ("none.txt", "*.md"):
        with pytest.raises(InputError, match=r"no such bucket or file|no file fits memory://"):
            open_source(f"memory://bucket/{missing}")
    store.store.clear()
