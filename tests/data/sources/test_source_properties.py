"""What every text must satisfy, read in any of the ways of reading it (hypothesis)."""

import gzip
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.sources import files, open_source

characters = st.one_of(
    st.sampled_from("ab \t\n\r\n\n\x0b\x85\u2028é中👍"), st.characters(codec="utf-8")
)
texts = st.text(characters, min_size=1, max_size=60).filter(lambda text: text[0] != "\ufeff")
"""Of a file; a byte order mark before it is no text."""
chunk_sizes = st.sampled_from([4, 5, 7, 16, 1 << 20])
"""Bytes read at a time; the least that holds every UTF-8 character is 4."""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Documents of one or several files of these contents, read in pieces of `chunk` bytes."""
    directory = tmp_path_factory.mktemp("properties")

    def documents(contents: list[str], options: str, chunk: int, suffix: str = "txt") -> list[str]:
        for path in directory.iterdir():
            path.unlink()
        for number, text in enumerate(contents):
            path = directory / f"{number:02}.{suffix}{'.gz' if number % 2 else ''}"
            data = text.encode()
            path.write_bytes(gzip.compress(data, 1) if number % 2 else data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files, "CHUNK", chunk)
            source = open_source(f"{directory}/*{options}")
            return [source[index] for index in range(len(source))]

    return documents


def lines(text: str) -> list[str]:
    parts = [part.removesuffix("\r") for part in text.split("\n")]
    # The last one is ended by nothing: a `\r` is its own, and without anything it is no line.
    last = text.split("\n")[-1]
    return [*parts[:-1], last] if last else parts[:-1]


def blocks(text: str) -> list[str]:
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip(" \t\r"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    ended = text.split("\n")[-1].strip(" \t\r")
    joined = ["\n".join(block) for block in found if block]
    # The last line's `\r` belongs to its end, unless it is the file's last and has no `\n`.
    within = [block.removesuffix("\r") for block in joined]
    return [*within[:-1], joined[-1]] if ended else within


@given(contents=st.lists(texts, min_size=1, max_size=3), chunk=chunk_sizes)
def test_files_joined_are_the_text_and_no_document_is_too_large(read, contents, chunk):
    documents = read(contents, "", chunk)
    assert "".join(documents) == "".join(contents)
    assert all(len(document.encode()) <= chunk for document in documents)


@given(contents=st.lists(texts, min_size=1, max_size=3), chunk=chunk_sizes)
def test_documents_are_the_lines_of_each_file(read, contents, chunk):
    documents = read(contents, "#documents=line", chunk)
    assert documents == [line for text in contents for line in lines(text)]


@given(text=texts, chunk=chunk_sizes)
def test_lines_joined_are_the_text_but_for_the_end_of_the_last_one(read, text, chunk):
    text = re.sub("\r+\n", "\n", text)
    assert "\n".join(read([text], "#documents=line", chunk)) == text.removesuffix("\n")


@given(contents=st.lists(texts, min_size=1, max_size=3), chunk=chunk_sizes)
def test_documents_are_the_blocks_of_each_file(read, contents, chunk):
    contents = [f"{text}\nend" if not text.strip(" \t\r\n") else text for text in contents]
    documents = read(contents, "#documents=block", chunk)
    assert documents == [block for text in contents for block in blocks(text)]


@given(
    table=st.lists(st.lists(st.text(characters, max_size=9), min_size=2, max_size=2), min_size=1),
    chunk=chunk_sizes,
)
def test_columns_are_read_as_they_were_written(read, table, chunk):
    table = [[re.sub("[\t\r\n\ufeff]", "", cell) for cell in row] for row in table]
    text = "".join("\t".join(row) + "\n" for row in table)
    for column in (0, 1):
        documents = read([text], f"#column={column + 1}", chunk)
        assert documents == [row[column] for row in table]


@given(written=st.lists(st.text(max_size=30), min_size=1), chunk=chunk_sizes, ascii=st.booleans())
def test_json_lines_are_read_as_they_were_written(read, written, chunk, ascii):
    text = "\n".join(json.dumps({"text": each}, ensure_ascii=ascii) for each in written)
    assert read([text, text], "", chunk, "jsonl") == written * 2
