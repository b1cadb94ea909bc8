"""Tokenised text on disk: the right tokens whatever happened to it before, encoded once."""

import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.config import InputError
from gptjax.data.corpus import Text
from gptjax.data.storage import cache
from gptjax.data.storage.cache import META, OFFSETS, PROGRESS, TOKENS, kept, open_store
from gptjax.data.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer

LINES = [f"line {number} é\n" * (number % 3) for number in range(40)]
NUMBER = np.dtype(np.int64)


class Lines:
    """Documents in memory."""

    name = "lines"

    def __init__(self, texts: list[str]):
        self.texts = texts
        self.fingerprint = Text(json.dumps(texts), "").fingerprint

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:
        return self.texts[index]


class Ended(ByteTokenizer):
    """Bytes of ASCII and an end token; it counts what it encodes, and can stop before a text."""

    name = "ended"

    def __init__(self, vocab_size: int = 257, stop: str | None = None):
        self.vocab_size = vocab_size
        self.special = {"end": 256}
        self.encoded: list[str] = []
        self._stop = stop

    def encode(self, text: str) -> np.ndarray:
        if text == self._stop:
            raise KeyboardInterrupt
        self.encoded.append(text)
        return super().encode(text)

    def save(self) -> bytes:
        return str(self.vocab_size).encode()


def tokens_of(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    end = [] if tokenizer.end_token is None else [tokenizer.end_token]
    return [[*tokenizer.encode(text).tolist(), *end] if text else [] for text in texts]


def assert_holds(store: cache.TokenStore, texts: list[str], tokenizer: Tokenizer) -> None:
    expected = tokens_of(texts, tokenizer)
    assert store.tokens[:].tolist() == list(itertools.chain(*expected))
    ((starts, lengths),) = store.blocks()
    assert lengths.tolist() == [len(tokens) for tokens in expected]
    assert starts.tolist() == [0, *np.cumsum(lengths)[:-1]]
    ((_, without_end),) = store.blocks(ends=False)
    assert store.bytes == len("".join(texts).encode())
    for index, tokens in enumerate(expected):
        alone = tokens[: len(tokens) - (tokenizer.end_token is not None)] if tokens else []
        assert store.document(index).tolist() == alone
        assert without_end[index] == len(alone)


@settings(max_examples=15)
@given(st.lists(st.text(max_size=9), min_size=1, max_size=6).filter(any), st.booleans())
@example(["", "a", ""], True)
def test_the_tokens_are_those_of_the_tokenizer(tmp_path_factory, texts, ends):
    tokenizer = Ended() if ends else ByteTokenizer()
    directory = tmp_path_factory.mktemp("cache")
    for _ in range(2):
        assert_holds(open_store(Lines(texts), tokenizer, directory), texts, tokenizer)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(257, np.uint16), (1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)],
)
def test_a_token_takes_two_bytes_where_the_vocabulary_allows(tmp_path, vocabulary, dtype):
    store = open_store(Lines(LINES), Ended(vocabulary), tmp_path)
    assert store.tokens.dtype == dtype
    assert (store.directory / TOKENS).stat().st_size == store.tokens[:].nbytes
    assert open_store(Lines(LINES), ByteTokenizer(), tmp_path).tokens.dtype == np.uint8


def test_the_second_time_nothing_is_encoded_and_the_tokens_stay_on_the_disk(tmp_path):
    first, second = Ended(), Ended()
    open_store(Lines(LINES), first, tmp_path)
    assert first.encoded == LINES
    store = open_store(Lines(LINES), second, tmp_path)
    assert second.encoded == []
    mapped = Path("/proc/self/maps")
    if mapped.exists():  # On Linux.
        assert str(store.directory / TOKENS) in mapped.read_text()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def garble(path: Path) -> None:
    path.write_text('{"content": ')


def nest(path: Path) -> None:
    path.write_text("[" * 100_000)


def without_files(path: Path) -> None:
    path.write_text('{"files": {}}')


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in (TOKENS, OFFSETS, META) for damage in (flip, cut_short)),
        *((name, Path.unlink) for name in (TOKENS, OFFSETS, META)),
        (META, garble),
        (META, nest),
        (META, without_files),
    ],
)
def test_a_damaged_cache_is_built_anew(tmp_path, capsys, name, damage):
    store = open_store(Lines(LINES), Ended(), tmp_path)
    damage(store.directory / name)
    again = Ended()
    rebuilt = open_store(Lines(LINES), again, tmp_path)
    assert again.encoded == LINES
    assert_holds(rebuilt, LINES, Ended())
    assert capsys.readouterr().err == f"{store.directory} is damaged: it is rebuilt.\n"


def test_an_intact_cache_that_was_touched_or_copied_is_taken_as_it_is(tmp_path):
    store = open_store(Lines(LINES), Ended(), tmp_path / "one")
    (store.directory / TOKENS).touch()
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    for directory in ("one", "two"):
        tokenizer = Ended()
        assert_holds(open_store(Lines(LINES), tokenizer, tmp_path / directory), LINES, Ended())
        assert tokenizer.encoded == []


def test_what_was_touched_is_read_once(tmp_path, monkeypatch):
    store = open_store(Lines(LINES), Ended(), tmp_path)
    (store.directory / TOKENS).touch()
    open_store(Lines(LINES), Ended(), tmp_path)
    monkeypatch.setattr(cache, "_checksum", pytest.fail)
    open_store(Lines(LINES), Ended(), tmp_path)


def test_a_finished_cache_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    store = open_store(Lines(LINES), Ended(), tmp_path)
    (store.directory / TOKENS).touch()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    opened = Path.open

    def read_only(path: Path, mode: str = "r", *arguments, **named):
        if not mode.startswith("r"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, mode, *arguments, **named)

    monkeypatch.setattr(Path, "open", read_only)
    assert_holds(open_store(Lines(LINES), Ended(), tmp_path), LINES, Ended())
    with pytest.raises(InputError, match=r"^data.cache: cannot write .*: Read-only file system; "):
        open_store(Lines(LINES[1:]), Ended(), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def content(store: cache.TokenStore) -> list[bytes]:
    return [(store.directory / name).read_bytes() for name in (TOKENS, OFFSETS)]


def torn(partial: Path) -> None:
    for name in (TOKENS, OFFSETS):
        with (partial / name).open("ab") as file:
            file.write(b"torn")


def lost(partial: Path) -> None:
    os.truncate(partial / TOKENS, 2)


def garbled(partial: Path) -> None:
    garble(partial / PROGRESS)


@pytest.mark.parametrize(
    ("happened", "goes_on"),
    [(lambda _: None, True), (torn, True), (lambda partial: flip(partial / TOKENS), False),
     (lost, False), (lambda partial: (partial / OFFSETS).unlink(), False), (garbled, False)],
    ids=["nothing", "torn", "flipped", "lost", "missing", "garbled"],
)  # fmt: skip
def test_an_interrupted_build_goes_on_where_it_was_sure(tmp_path, monkeypatch, happened, goes_on):
    whole = open_store(Lines(LINES), Ended(), tmp_path / "whole")
    monkeypatch.setattr(cache, "CHECKPOINT_TOKENS", 50)
    monkeypatch.setattr(cache, "BATCH_CHARACTERS", 10)
    with pytest.raises(KeyboardInterrupt):
        open_store(Lines(LINES), Ended(stop=LINES[26]), tmp_path / "stopped")
    (partial,) = (tmp_path / "stopped").glob("*.partial")
    happened(partial)
    rest = Ended()
    store = open_store(Lines(LINES), rest, tmp_path / "stopped")
    assert len(rest.encoded) == (16 if goes_on else 40)
    assert rest.encoded == LINES[-len(rest.encoded) :]
    assert content(store) == content(whole)
    assert sorted(path.name for path in store.directory.iterdir()) == [META, OFFSETS, TOKENS]
    (store.directory / TOKENS).touch()  # What is noted of it is right.
    assert_holds(open_store(Lines(LINES), Ended(stop=""), tmp_path / "stopped"), LINES, Ended())


def test_a_file_where_the_cache_belongs_is_one_sentence(tmp_path):
    place = tmp_path / "cache"
    place.write_text("mine")
    with pytest.raises(InputError, match=r"^data.cache: cannot write .*: File exists; nothing "):
        open_store(Lines(LINES), Ended(), place)
    assert place.read_text() == "mine"


@pytest.mark.parametrize("what", ["text", "tokenizer"])
def test_a_cache_of_something_else_is_refused(tmp_path, what):
    store = open_store(Lines(LINES), Ended(), tmp_path)
    other = Lines(LINES[1:]) if what == "text" else Lines(LINES)
    tokenizer = Ended() if what == "text" else Ended(300)
    its = open_store(other, tokenizer, tmp_path).directory
    shutil.rmtree(its)
    store.directory.rename(its)
    with pytest.raises(InputError) as error:
        open_store(other, tokenizer, tmp_path)
    assert str(error.value).startswith(f"data.cache: {its} was made with another {what} (")
    assert str(error.value).endswith("): choose another directory.")
    assert "\n" not in str(error.value)


def test_another_text_or_tokenizer_has_a_place_of_its_own(tmp_path):
    several = [
        open_store(documents, tokenizer, tmp_path)
        for documents in (Lines(LINES), Lines([*LINES[:-1], "other"]))
        for tokenizer in (Ended(), Ended(300), ByteTokenizer())
    ]
    assert len({store.directory for store in several}) == 6


def test_empty_documents_alone_are_one_sentence(tmp_path):
    for _ in range(2):
        with pytest.raises(InputError) as error:
            open_store(Lines(["", ""]), Ended(), tmp_path)
        assert str(error.value) == "data.source: lines has no text, only empty documents."


def test_an_id_beyond_the_vocabulary_is_one_sentence(tmp_path):
    with pytest.raises(InputError) as error:
        open_store(Lines(["abc"]), Ended(vocab_size=99), tmp_path)
    assert str(error.value) == (
        "data.tokenizer: ended gives the id 99, beyond its vocabulary of 99."
    )


def test_a_character_that_the_tokenizer_lacks_stops_the_build(tmp_path):
    tokenizer = CharacterTokenizer.train("abc")
    with pytest.raises(InputError):
        open_store(Lines(["abc", "abd"]), tokenizer, tmp_path)
    assert open_store(Lines(["abc"]), tokenizer, tmp_path).tokens[:].tolist() == [0, 1, 2]


def test_what_is_kept_beside_the_tokens_is_made_once_and_again_if_damaged(tmp_path):
    store = open_store(Lines(LINES), Ended(), tmp_path)
    made, whole = [], np.arange(12)

    def make() -> Iterator[np.ndarray]:
        made.append(1)
        yield whole[:5]
        yield whole[5:]

    for damage, times in (None, 1), (Path.touch, 1), (flip, 2), (cut_short, 3), (Path.unlink, 4):
        path = store.directory / "rows.bin"
        if damage:
            damage(path)
        np.testing.assert_array_equal(kept(store, "rows", NUMBER, make)[:], whole)
        assert len(made) == times
    garble(path.with_suffix(".json"))
    assert len(kept(store, "rows", NUMBER, make)) == 12
    assert len(made) == 5
    assert len(kept(store, "none", NUMBER, list)) == 0


def test_two_that_keep_the_same_at_once_both_have_it(tmp_path):
    store = open_store(Lines(LINES), Ended(), tmp_path)

    def make() -> list[np.ndarray]:
        # Another process comes in between, and is done first.
        return [kept(store, "rows", NUMBER, lambda: [np.arange(5)])[:]]

    assert kept(store, "rows", NUMBER, make)[:].tolist() == [0, 1, 2, 3, 4]
    names = {path.name for path in store.directory.iterdir()}
    assert names == {META, OFFSETS, TOKENS, "rows.bin", "rows.json"}
    assert kept(store, "rows", NUMBER, pytest.fail)[:].tolist() == [0, 1, 2, 3, 4]


def test_a_full_disk_while_keeping_rows_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    store = open_store(Lines(LINES), Ended(), tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left on device; nothing half-written"):
            kept(store, "rows", NUMBER, lambda: [np.arange(5)])
    assert sorted(path.name for path in store.directory.iterdir()) == [META, OFFSETS, TOKENS]
    assert kept(store, "rows", NUMBER, lambda: [np.arange(5)])[:].tolist() == [0, 1, 2, 3, 4]


@pytest.fixture
def bucket(monkeypatch, tmp_path) -> Iterator[dict]:
    """A bucket of fsspec's own, in memory, and a machine of its own per `XDG_CACHE_HOME`."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    yield store.store
    store.store.clear()


def test_a_cache_in_a_bucket_is_built_once_for_all_machines(bucket, monkeypatch, tmp_path):
    tokenizer, url = Ended(), Path("memory://bucket/cache")
    built = open_store(Lines(LINES), tokenizer, url)
    encoded = len(tokenizer.encoded)
    assert encoded
    assert {at.rpartition("/")[2] for at in bucket} == {TOKENS, OFFSETS, META}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    for _ in range(2):  # Downloaded, and then there.
        again = open_store(Lines(LINES), tokenizer, url)
        np.testing.assert_array_equal(again.tokens[:], built.tokens[:])
        np.testing.assert_array_equal(again.offsets[:], built.offsets[:])
        # What is derived from it is kept on each machine.
        assert again.directory.is_relative_to(tmp_path / "another")
    assert len(tokenizer.encoded) == encoded


def test_a_build_that_was_not_uploaded_to_its_end_is_uploaded_again(bucket):
    tokenizer, url = Ended(), Path("memory://bucket/cache")
    open_store(Lines(LINES), tokenizer, url)
    (meta,) = (at for at in bucket if at.endswith(META))
    del bucket[meta]
    open_store(Lines(LINES), tokenizer, url)
    assert meta in bucket


def test_a_damaged_cache_in_a_bucket_is_one_sentence(bucket, monkeypatch, tmp_path):
    url = Path("memory://bucket/cache")
    open_store(Lines(LINES), Ended(), url)
    (tokens,) = (at for at in bucket if at.endswith(TOKENS))
    content = bytearray(bucket[tokens].getvalue())
    content[5] ^= 1
    fsspec.filesystem("memory").pipe_file(tokens, bytes(content))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    sentence = (
        r"^data\.cache: memory://bucket/cache/\w+ is damaged: delete it, or choose another\.$"
    )
    for _ in range(2):  # Nothing of it is kept.
        with pytest.raises(InputError, match=sentence):
            open_store(Lines(LINES), Ended(), url)
