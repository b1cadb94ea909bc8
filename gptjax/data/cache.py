"""Tokenised text on disk: encoded once, memory-mapped ever after.

A cache is a directory whose name follows from the fingerprints of the text and of the tokenizer:

| file | content |
|---|---|
| tokens.bin | the ids of all documents, one after another, in the smallest type that fits |
| offsets.bin | [documents + 1, 2], int64: tokens and UTF-8 bytes before each document |
| meta.json | the fingerprints, the counts, a checksum and the time of each file; written last |

It is built in a directory beside its place and then renamed, so that it is there whole or not at
all. A build that was interrupted goes on where `progress.json` says; of two processes that want the
same cache one builds it and the other waits. Files that were touched since they were written are
checked, and a damaged cache is built anew.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gptjax.config import InputError
from gptjax.data.sources import Documents
from gptjax.data.tokenizers import Tokenizer

TOKENS, OFFSETS, META, PROGRESS = "tokens.bin", "offsets.bin", "meta.json", "progress.json"
VERSION = 1
"""Of this layout; another one is another cache."""
BATCH_CHARACTERS = 1 << 21
"""Characters that are encoded at a time: what of the text is in memory, about."""
CHECKPOINT_TOKENS = 1 << 24
"""Tokens after which a build notes how far it is."""
CHECKED_BYTES = 1 << 24
"""Bytes read at a time for a checksum."""


class TokenStore(NamedTuple):
    """Documents as token ids, one after another.

    Where the tokenizer has an end token, each document ends with it; an empty one has no tokens.
    """

    tokens: np.ndarray
    """[M], unsigned, memory-mapped; of all documents of the cache."""
    offsets: np.ndarray
    """[N + 1, 2], int64: tokens and bytes before each of these N documents, and behind the last."""
    fingerprint: str
    """Of the text and the tokenizer."""
    directory: Path
    """Where it lies."""
    ends: bool
    """Whether each document ends with an end token."""

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """The tokens of a document, without the end token."""
        first, last = self.offsets[index, 0], self.offsets[index + 1, 0]
        return self.tokens[first : last - self.ends]

    @property
    def lengths(self) -> np.ndarray:
        """[N], the tokens of each document, the end token counted."""
        return np.diff(self.offsets[:, 0])

    @property
    def lengths_without_end(self) -> np.ndarray:
        """[N], the tokens of each document as it was."""
        return np.maximum(self.lengths - self.ends, 0)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of its text."""
        return int(self.offsets[-1, 1])


def open_store(documents: Documents, tokenizer: Tokenizer, directory: Path) -> TokenStore:
    """The tokens of `documents`, from the cache below `directory`, where they are put if need be.

    Raises:
      InputError: a directory that cannot be written, a full disk, a cache of other text or of
        another tokenizer in its place; and what the documents raise.
    """
    wanted = {
        "version": VERSION,
        "data_sha256": documents.fingerprint,
        "tokenizer_sha256": tokenizer.fingerprint,
        "documents": len(documents),
    }
    fingerprint = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
    place = directory / fingerprint[:20]
    with _sentence_on_failure(place):
        meta = _finished(place, wanted)
        if meta is None:
            directory.mkdir(parents=True, exist_ok=True)
            with (directory / f"{place.name}.lock").open("w") as lock:
                _wait_for(lock, place)
                meta = _finished(place, wanted)
                if meta is None and place.exists():
                    print(f"{place} is damaged: it is built anew.", file=sys.stderr)
                    shutil.rmtree(place)
                meta = meta or _build(documents, tokenizer, place, wanted)
        tokens = np.memmap(place / TOKENS, meta["dtype"], "r")
        offsets = np.memmap(place / OFFSETS, np.int64, "r", shape=(len(documents) + 1, 2))
    ends = tokenizer.end_token is not None
    return TokenStore(np.asarray(tokens), np.asarray(offsets), fingerprint, place, ends)


def kept(store: TokenStore, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that follows from a store, made once and kept beside its tokens, memory-mapped."""
    path = store.directory / f"{name}.npy"
    with _sentence_on_failure(store.directory):
        if not path.exists():
            temporary = path.with_suffix(f".{os.getpid()}")
            with temporary.open("wb") as file:
                np.save(file, make())
            temporary.replace(path)
        return np.load(path, mmap_mode="r")


@contextlib.contextmanager
def _sentence_on_failure(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"data.cache: cannot write {place}: {error.strerror}; nothing half-written is used."
        ) from error


def _wait_for(lock: Any, place: Path) -> None:
    """Hold the lock, which the system frees when its process ends, however it ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"Another process builds {place}; waiting for it.", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _finished(place: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """What the cache in its place says of itself; None where there is none, or a damaged one.

    Raises:
      InputError: a cache of something else.
    """
    try:
        meta = json.loads((place / META).read_text())
        for name in ("data_sha256", "tokenizer_sha256"):
            if meta[name] != wanted[name]:
                what = "text" if name.startswith("data") else "tokenizer"
                raise InputError(
                    f"data.cache: {place} was made with another {what} ({meta[name][:12]}, this "
                    f"one is {wanted[name][:12]}): choose another directory."
                )
        if any(meta[name] != value for name, value in wanted.items()):
            return None
        touched = False
        for name, noted in meta["files"].items():
            state = (place / name).stat()
            if state.st_size != noted["bytes"]:
                return None
            if state.st_mtime_ns != noted["mtime_ns"]:
                if _checksum(place / name) != noted["crc32"]:
                    return None
                noted["mtime_ns"], touched = state.st_mtime_ns, True
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    if touched:
        with contextlib.suppress(OSError):  # Others' caches can be read, if not written.
            _write_json(place / META, meta)
    return meta


def _build(
    documents: Documents, tokenizer: Tokenizer, place: Path, wanted: dict[str, Any]
) -> dict[str, Any]:
    """Encode all documents and put them in their place; what meta.json says of them."""
    partial = place.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    end = [] if tokenizer.end_token is None else [tokenizer.end_token]
    with _Writer(partial, dtype) as writer, _progress_bar(len(documents)) as show:
        for texts in _batches(documents, writer.documents):
            encoded = tokenizer.encode_documents(texts)
            for text, tokens in zip(texts, encoded, strict=True):
                ended = np.append(tokens, end) if text else tokens
                writer.add(ended, len(text.encode("utf-8")))
            writer.note_progress()
            show(writer.documents)
    if not writer.tokens:
        raise InputError(f"data.source: {documents.name} has no text, only empty documents.")
    files = {}
    for name, checksum in (TOKENS, writer.checksums[0]), (OFFSETS, writer.checksums[1]):
        state = (partial / name).stat()
        files[name] = {
            "bytes": state.st_size,
            "mtime_ns": state.st_mtime_ns,
            "crc32": checksum,
        }
    meta = {**wanted, "dtype": dtype.name, "tokens": writer.tokens, "files": files}
    (partial / PROGRESS).unlink(missing_ok=True)
    _write_json(partial / META, meta)
    partial.rename(place)
    return meta


class _Writer:
    """Appends documents to the files of a cache, from where an earlier process left off."""

    def __init__(self, directory: Path, dtype: np.dtype):
        self._directory = directory
        self._dtype = dtype
        self.documents = self.tokens = self._bytes = self._noted = 0
        self.checksums = [0, 0]
        """Of tokens.bin and offsets.bin so far, CRC-32."""

    def __enter__(self) -> "_Writer":
        try:
            done = json.loads((self._directory / PROGRESS).read_text())
            self.documents, self.tokens, self._bytes, self.checksums = done["state"]
        except (OSError, ValueError, LookupError, TypeError):
            done = {"sizes": [0, 0]}
        self._noted = self.tokens
        self._files: list[BinaryIO] = []
        for name, size in zip((TOKENS, OFFSETS), done["sizes"], strict=True):
            file = (self._directory / name).open("ab")
            self._files.append(file)
            file.truncate(size)
            file.seek(size)
        if self.documents == 0:
            self._append(1, np.zeros(2, np.int64))
        return self

    def __exit__(self, *raised: object) -> None:
        for file in self._files:
            with contextlib.suppress(OSError) if raised[0] else contextlib.nullcontext():
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(OSError):
                file.close()

    def add(self, tokens: np.ndarray, size: int) -> None:
        """One more document, of `size` bytes of UTF-8."""
        self._append(0, tokens.astype(self._dtype))
        self.documents += 1
        self.tokens += len(tokens)
        self._bytes += size
        self._append(1, np.array([self.tokens, self._bytes], np.int64))

    def note_progress(self) -> None:
        """Now and then, make sure that what is there stays there, and note it."""
        if self.tokens - self._noted < CHECKPOINT_TOKENS:
            return
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        state = [self.documents, self.tokens, self._bytes, self.checksums]
        sizes = [file.tell() for file in self._files]
        _write_json(self._directory / PROGRESS, {"state": state, "sizes": sizes})
        self._noted = self.tokens

    def _append(self, which: int, values: np.ndarray) -> None:
        content = values.tobytes()
        self._files[which].write(content)
        self.checksums[which] = zlib.crc32(content, self.checksums[which])


def _batches(documents: Documents, first: int) -> Iterator[list[str]]:
    """The texts from document `first` on, a few at a time."""
    texts, characters = [], 0
    for index in range(first, len(documents)):
        texts.append(documents[index])
        characters += len(texts[-1])
        if characters >= BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


@contextlib.contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A function to be told how many documents of `total` are encoded; it shows a person."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Tokenising", total=total)
        yield lambda done: progress.update(task, completed=done)


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while content := file.read(CHECKED_BYTES):
            checksum = zlib.crc32(content, checksum)
    return checksum


def _write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
