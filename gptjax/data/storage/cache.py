"""A cache of tokenised text on disk: encoded once, then memory-mapped.

A cache is a directory named by the fingerprints of the text and of the tokenizer:

| file | content |
|---|---|
| tokens.bin | the ids of all documents, one after another, in the smallest type that fits |
| offsets.bin | [documents + 1], two int64: tokens and UTF-8 bytes before each document |
| meta.json | the fingerprints, the counts, a checksum and the time of each file; written last |
| rows-*.bin, rows-*.json | arrays that `kept` derived from them, with the same metadata |

It is built in a directory beside its own and then renamed, so that it is complete or absent. An
interrupted build resumes from `progress.json`; of two processes that want the same cache, one
builds it and the other waits. Files touched since they were written are verified, and a damaged
cache is rebuilt; a change that leaves size and time of a file as they were is not noticed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np

from gptjax.config import InputError, read_json
from gptjax.data.sources import Documents
from gptjax.data.sources.protocol import EncodedDocuments
from gptjax.data.storage.store import OFFSET, Mapped, TokenStore
from gptjax.data.tokenizers import Tokenizer
from gptjax.system.bucket_locks import locked_in_bucket
from gptjax.system.buckets import caches, url_of
from gptjax.system.disk import DiskError, check_local, is_failure, replacing
from gptjax.system.locks import locked
from gptjax.system.mirrors import Mirror, Rules

TOKENS, OFFSETS, META, PROGRESS = "tokens.bin", "offsets.bin", "meta.json", "progress.json"
VERSION = 1
"""Version of this layout, part of a cache's name."""
BATCH_CHARACTERS = 1 << 21
"""Characters encoded at a time: about as much of the text is in memory."""
CHECKPOINT_TOKENS = 1 << 24
"""Tokens between two records of a build's progress."""
CHECKED_BYTES = 1 << 24
"""Bytes read at a time for a checksum."""

Item = TypeVar("Item", str, np.ndarray)


def open_store(documents: Documents, tokenizer: Tokenizer, directory: Path) -> TokenStore:
    """The tokens of `documents`, from the cache below `directory`, which is built if missing.

    Raises:
      InputError: a directory that cannot be written, a full disk, a cache of another text or
        tokenizer under its name, a tokenizer with ids beyond its vocabulary; and what the
        documents raise.
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    wanted = {
        "version": VERSION,
        "data_sha256": documents.fingerprint,
        "tokenizer_sha256": tokenizer.fingerprint,
        "documents": len(documents),
        "dtype": dtype.name,
    }
    fingerprint = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
    name = fingerprint[:20]
    if url := url_of(directory):
        cache_dir = _from_bucket(documents, tokenizer, f"{url}/{name}", wanted)
    else:
        cache_dir = directory / name
        _make(documents, tokenizer, cache_dir, wanted)
    with _sentence_on_failure(cache_dir):
        tokens, offsets = Mapped(cache_dir / TOKENS, dtype), Mapped(cache_dir / OFFSETS, OFFSET)
    return TokenStore(tokens, offsets, cache_dir, tokenizer.end_token is not None)


def _make(
    documents: Documents, tokenizer: Tokenizer, cache_dir: Path, wanted: dict[str, Any]
) -> None:
    """Build the cache if it is missing or damaged; wait if another process does."""
    with _sentence_on_failure(cache_dir):
        if _finished(cache_dir, wanted):
            return
        check_local(cache_dir.parent).mkdir(parents=True, exist_ok=True)
        waiting = f"Another process builds {cache_dir}; waiting for it."
        with locked(cache_dir.with_name(f"{cache_dir.name}.lock"), cache_dir, waiting=waiting):
            if not _finished(cache_dir, wanted):
                if cache_dir.exists():
                    print(f"{cache_dir} is damaged: it is rebuilt.", file=sys.stderr)
                    shutil.rmtree(cache_dir)
                _build(documents, tokenizer, cache_dir, wanted)


def _from_bucket(
    documents: Documents, tokenizer: Tokenizer, url: str, wanted: dict[str, Any]
) -> Path:
    """This machine's copy of a cache in a bucket, which one process builds if it is missing there.

    Raises:
      InputError: a bucket that cannot be used, or a damaged cache in it.
    """
    directory = caches("tokens")
    cache_dir = directory / url.rpartition("/")[2]
    with contextlib.ExitStack() as held, _sentence_on_failure(cache_dir):
        directory.mkdir(parents=True, exist_ok=True)
        waiting = f"Another process of this machine gets {cache_dir}; waiting for it."
        held.enter_context(locked(directory / f"{cache_dir.name}.copy", cache_dir, waiting=waiting))
        copy = Path(held.enter_context(tempfile.TemporaryDirectory(dir=directory))) / "copy"
        copy.mkdir()
        mirror = Mirror(url, copy, Rules())
        if META not in mirror.refresh():
            with locked_in_bucket(mirror, waiting=f"Another process builds {url}; waiting for it."):
                if META not in mirror.refresh():
                    _make(documents, tokenizer, cache_dir, wanted)
                    mirror.put({name: cache_dir / name for name in (TOKENS, OFFSETS)})
                    mirror.put({META: cache_dir / META})
        if not _finished(cache_dir, wanted):
            shutil.rmtree(cache_dir, ignore_errors=True)
            mirror.get([TOKENS, OFFSETS, META])
            copy.rename(cache_dir)
            if not _finished(cache_dir, wanted):
                shutil.rmtree(cache_dir)
                raise InputError(f"data.cache: {url} is damaged: delete it, or choose another.")
    return cache_dir


def kept(
    store: TokenStore, name: str, dtype: np.dtype, make: Callable[[], Iterable[np.ndarray]]
) -> Mapped:
    """An array derived from a store, made once, in parts, and saved beside its tokens.

    Two processes may both make it; each then writes the same file, atomically.
    """
    path = store.directory / f"{name}.bin"
    note = path.with_suffix(".json")
    with _sentence_on_failure(store.directory):
        noted = _read_note(note)
        if noted is None or not _intact(note, noted):
            with replacing(path) as file:
                for part in make():
                    file.write(part.tobytes())
            _write_note(note, {"files": {path.name: _state(path, _checksum(path))}})
        return Mapped(path, dtype)


@contextlib.contextmanager
def _sentence_on_failure(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = DiskError if is_failure(error) else InputError
        raise kind(
            f"data.cache: cannot write {cache_dir}: {error.strerror}; nothing half-written is used."
        ) from error


def _finished(cache_dir: Path, wanted: dict[str, Any]) -> bool:
    """Whether `cache_dir` holds a complete, intact cache.

    Raises:
      InputError: it holds a cache of another text or tokenizer.
    """
    meta = _read_note(cache_dir / META)
    if meta is None:
        return False
    for name in ("data_sha256", "tokenizer_sha256"):
        if meta.get(name) != wanted[name]:
            what = "text" if name.startswith("data") else "tokenizer"
            other = str(meta.get(name))[:12]
            raise InputError(
                f"data.cache: {cache_dir} was made with another {what} ({other}, "
                f"this one is {wanted[name][:12]}): choose another directory."
            )
    same = all(meta.get(name) == value for name, value in wanted.items())
    return same and _intact(cache_dir / META, meta)


def _build(
    documents: Documents, tokenizer: Tokenizer, cache_dir: Path, wanted: dict[str, Any]
) -> None:
    """Encode all documents and move the finished cache to `cache_dir`."""
    partial = cache_dir.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    dtype = np.dtype(wanted["dtype"])
    end = np.array([] if tokenizer.end_token is None else [tokenizer.end_token], np.int32)
    with _Writer(partial, dtype) as writer, _progress_bar(len(documents)) as show:
        for encoded, sizes in _encoded(documents, tokenizer, writer.documents):
            _check_ids(np.concatenate(encoded), tokenizer)
            if end.size:
                pairs = zip(encoded, sizes, strict=True)
                encoded = [np.append(tokens, end) if size else tokens for tokens, size in pairs]
            writer.add(encoded, sizes)
            writer.note_progress()
            show(writer.documents)
    if not writer.tokens:
        raise InputError(f"data.source: {documents.name} has no text, only empty documents.")
    files = {
        name: _state(partial / name, checksum)
        for name, checksum in zip((TOKENS, OFFSETS), writer.checksums, strict=True)
    }
    (partial / PROGRESS).unlink(missing_ok=True)
    _write_note(partial / META, {**wanted, "tokens": writer.tokens, "files": files})
    partial.rename(cache_dir)


def _check_ids(tokens: np.ndarray, tokenizer: Tokenizer) -> None:
    """Check that ids lie in the vocabulary, and so fit the stored dtype.

    Raises:
      InputError: one does not.
    """
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < tokenizer.vocab_size)
        raise InputError(
            f"data.tokenizer: {tokenizer.name} gives the id {wrong}, beyond its vocabulary of "
            f"{tokenizer.vocab_size}."
        )


class _Writer:
    """Appends documents to the files of a cache, from where an earlier process left off."""

    def __init__(self, directory: Path, dtype: np.dtype):
        self._directory = directory
        self._dtype = dtype
        self.documents = self.tokens = self._bytes = self._noted = 0
        self.checksums = [0, 0]
        """Of tokens.bin and offsets.bin so far, CRC-32."""

    def __enter__(self) -> "_Writer":
        sizes = [0, 0]
        noted = _read_note(self._directory / PROGRESS)
        if noted is not None and self._is_there(noted):
            self.documents, self.tokens, self._bytes, self.checksums = noted["state"]
            sizes = noted["sizes"]
        self._noted = self.tokens
        self._files: list[BinaryIO] = []
        for name, size in zip((TOKENS, OFFSETS), sizes, strict=True):
            file = (self._directory / name).open("ab")
            self._files.append(file)
            file.truncate(size)
            file.seek(size)
        if self.documents == 0:
            self._append(1, np.zeros(1, OFFSET))
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            if raised[0] is None:
                self._to_disk()
        finally:
            for file in self._files:
                with contextlib.suppress(OSError):
                    file.close()

    def add(self, documents: Sequence[np.ndarray], sizes: Sequence[int]) -> None:
        """Append documents, whose texts have `sizes` bytes of UTF-8."""
        self._append(0, np.concatenate(documents).astype(self._dtype))
        offsets = np.empty(len(documents), OFFSET)
        offsets["tokens"] = self.tokens + np.cumsum([len(tokens) for tokens in documents])
        offsets["bytes"] = self._bytes + np.cumsum(sizes)
        self._append(1, offsets)
        self.documents += len(documents)
        self.tokens, self._bytes = offsets[-1].item()

    def note_progress(self) -> None:
        """Every `CHECKPOINT_TOKENS`, flush the files to disk and record the progress."""
        if self.tokens - self._noted < CHECKPOINT_TOKENS:
            return
        self._to_disk()
        state = [self.documents, self.tokens, self._bytes, self.checksums]
        sizes = [file.tell() for file in self._files]
        _write_note(self._directory / PROGRESS, {"state": state, "sizes": sizes})
        self._noted = self.tokens

    def _is_there(self, noted: dict[str, Any]) -> bool:
        """Whether the files still begin with the content recorded in `noted`."""
        *_, checksums = noted["state"]
        try:
            return checksums == [
                _checksum(self._directory / name, size)
                for name, size in zip((TOKENS, OFFSETS), noted["sizes"], strict=True)
            ]
        except OSError:
            return False

    def _to_disk(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def _append(self, which: int, values: np.ndarray) -> None:
        content = values.tobytes()
        self._files[which].write(content)
        self.checksums[which] = zlib.crc32(content, self.checksums[which])


def _encoded(
    documents: Documents, tokenizer: Tokenizer, first: int
) -> Iterator[tuple[list[np.ndarray], list[int]]]:
    """Token ids and UTF-8 bytes of the documents from `first` on, a few at a time.

    Ids that the documents have already, by the same tokenizer, are taken as they are.
    """
    made_by: Tokenizer | None = getattr(documents, "encoded_by", None)
    if made_by is None or made_by.fingerprint != tokenizer.fingerprint:
        texts_of = (documents[number] for number in range(first, len(documents)))
        for texts in _groups(texts_of, BATCH_CHARACTERS):
            yield tokenizer.encode_documents(texts), [len(text.encode("utf-8")) for text in texts]
        return
    has_ids = cast(EncodedDocuments, documents)
    sizes = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    sizes[list(tokenizer.special.values())] = 0
    numbers = range(first, len(documents))
    for ids in _groups((has_ids.tokens(number) for number in numbers), BATCH_CHARACTERS):
        yield ids, [int(sizes[tokens].sum()) for tokens in ids]


def _groups(items: Iterable[Item], most: int) -> Iterator[list[Item]]:
    """`items` in groups whose lengths add up to at least `most`, but for the last."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += len(item)
        if total >= most:
            yield group
            group, total = [], 0
    if group:
        yield group


@contextlib.contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A function that shows how many of `total` documents are encoded, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Tokenising", total=total)
        yield lambda done: progress.update(task, completed=done)


def _checksum(path: Path, size: int = sys.maxsize) -> int:
    """CRC-32 of a file, or of its first `size` bytes."""
    checksum = 0
    with path.open("rb") as file:
        while content := file.read(min(size, CHECKED_BYTES)):
            checksum = zlib.crc32(content, checksum)
            size -= len(content)
    return checksum


def _state(path: Path, checksum: int) -> dict[str, int]:
    """The recorded metadata of a file."""
    state = path.stat()
    return {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "crc32": checksum}


def _intact(note: Path, noted: dict[str, Any]) -> bool:
    """Whether the files beside `note` match it; a touched one is verified by its checksum."""
    touched = False
    try:
        for name, before in noted["files"].items():
            path = note.parent / name
            now = _state(path, before["crc32"])
            if now != before:
                if now["bytes"] != before["bytes"] or _checksum(path) != before["crc32"]:
                    return False
                noted["files"][name], touched = now, True
    except OSError:
        return False
    if touched:
        with contextlib.suppress(OSError):  # A cache of another user may be read-only.
            _write_note(note, noted)
    return True


def _read_note(path: Path) -> dict[str, Any] | None:
    """What `_write_note` wrote; None if missing or invalid."""
    try:
        note = read_json(path)
        content, checksum = note["content"], note["crc32"]
    except (InputError, LookupError, TypeError):
        return None
    return content if zlib.crc32(json.dumps(content).encode()) == checksum else None


def _write_note(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with a checksum of its own."""
    checksum = zlib.crc32(json.dumps(content).encode())
    with replacing(path) as file:
        file.write(json.dumps({"content": content, "crc32": checksum}).encode())
