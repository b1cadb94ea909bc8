"""Documents of token shards: files of token ids, as others' code prepares a large text once.

| file | content |
|---|---|
| .bin, 1,024 bytes of header | llm.c's and modded-nanogpt's: uint16, or uint32 of Llama 3 |
| .bin | nanoGPT's: the ids alone, in `#dtype=` |
| .npy | NumPy's format, or without its header OLMo's: the ids alone, in `#dtype=` |

The files are one stream, in sorted order, so that a document may go on in the next file. Documents
are what is between end tokens: those at the beginning of each, as llm.c writes them, are the ends
of the one before. The ids are those of `#tokenizer=`; a run with the same tokenizer takes them as
they are, and with another one encodes their text anew.
"""

import hashlib
import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gptjax.config import InputError
from gptjax.data.sources.files import CHUNK, File
from gptjax.data.sources.protocol import Spec, check_index, first_line, refuse
from gptjax.data.tokenizers import LEARNT, MODEL_FILE, Tokenizer, train_tokenizer

HEADER = 1024
"""Bytes of llm.c's header, 256 int32: magic number, version, number of tokens."""
MAGIC = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
"""llm.c's magic numbers (dev/data/data_common.py), and the type of the ids after them."""
NPY = b"\x93NUMPY"
DTYPES = ("uint16", "uint32")
LONGEST = 1 << 26
"""Most tokens of a document."""


class Shard(NamedTuple):
    """A file of token ids."""

    file: File
    begin: int
    """Bytes before the first id."""
    dtype: np.dtype
    tokens: int

    def read(self, first: int, last: int) -> np.ndarray:
        """The ids from `first` to `last`."""
        size = self.dtype.itemsize
        return np.frombuffer(
            self.file.read(self.begin + size * first, size * (last - first)), self.dtype
        )


class Shards:
    """The documents of a stream of token ids.

    Raises:
      InputError: a file that is cut, or of another type; ids beyond the vocabulary; a stream
        without a token, or with a document above `LONGEST`.
    """

    def __init__(self, spec: Spec, paths: list[str], tokenizer: Tokenizer, dtype: str):
        self.name = spec.text
        self.encoded_by = tokenizer
        """The tokenizer of the ids."""
        self._shards = [_opened(path, np.dtype(dtype)) for path in paths]
        self._ends = np.cumsum([shard.tokens for shard in self._shards])
        bounds, digest = [np.array([-1])], hashlib.sha256(tokenizer.fingerprint.encode())
        for start, ids in self._parts():
            digest.update(ids.astype("<u4").tobytes())
            if ids.max(initial=0) >= tokenizer.vocab_size:
                refuse(
                    f"{self.name} has the token {ids.max()}, beyond the {tokenizer.vocab_size} of "
                    f"{tokenizer.name}: another #tokenizer or #dtype made it"
                )
            if tokenizer.end_token is not None:
                bounds.append(start + np.flatnonzero(ids == tokenizer.end_token))
        ends = np.concatenate([*bounds, [self._ends[-1]]])
        starts, lengths = ends[:-1] + 1, np.diff(ends) - 1
        self._starts, self._lengths = starts[lengths > 0], lengths[lengths > 0]
        if not len(self):
            refuse(f"{self.name} has no token but end tokens")
        if self._lengths.max() > LONGEST:
            refuse(
                f"{self.name} has a document of {self._lengths.max():,} tokens, more than the "
                f"{LONGEST:,} that one may have: is its end token that of {tokenizer.name}"
            )
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        return self.encoded_by.decode(self.tokens(index).tolist())

    def tokens(self, index: int) -> np.ndarray:
        """The ids [T], int32, of a document, without end tokens."""
        check_index(index, len(self))
        start = int(self._starts[index])
        return self._read(start, start + int(self._lengths[index])).astype(np.int32)

    def __reduce__(self):
        from gptjax.data.sources import reopen

        return reopen, (self.name, self.fingerprint)

    def _read(self, first: int, last: int) -> np.ndarray:
        """The ids of the stream from `first` to `last`."""
        parts = []
        while first < last:
            number = int(np.searchsorted(self._ends, first, side="right"))
            shard, end = self._shards[number], int(self._ends[number])
            before = end - shard.tokens
            parts.append(shard.read(first - before, min(last, end) - before))
            first = min(last, end)
        return np.concatenate(parts)

    def _parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the stream in order, as (the number of ids before, ids)."""
        step = CHUNK // 4
        for start in range(0, int(self._ends[-1]), step):
            yield start, self._read(start, min(start + step, int(self._ends[-1])))


def open_shards(spec: Spec, paths: list[str]) -> Shards:
    """The documents of `tokens:PATTERN#tokenizer=…`.

    Raises:
      InputError: no tokenizer, or one that is trained on text; and what `Shards` raises.
    """
    options = spec.choose("tokens", tokenizer=None, dtype="uint16")
    tokenizer, dtype = options["tokenizer"], str(options["dtype"])
    if tokenizer is None or tokenizer == "characters" or _is_learnt(tokenizer):
        refuse(
            f"{spec.text} needs the tokenizer that made its tokens, as #tokenizer=gpt2:PATH or "
            "huggingface:PATH"
        )
    if dtype not in DTYPES:
        refuse(f"{spec.text} has dtype={dtype}: it must be one of {', '.join(DTYPES)}")
    return Shards(spec, paths, train_tokenizer(tokenizer, ""), dtype)


def _is_learnt(tokenizer: str) -> bool:
    kind, _, argument = tokenizer.partition(":")
    return kind in LEARNT and not argument.endswith(MODEL_FILE)


def _opened(path: str, dtype: np.dtype) -> Shard:
    """A shard, by its header or without one.

    Raises:
      InputError: a file that is cut, or of another type.
    """
    file = File(path, text=False)
    begin = file.read(0, min(file.size, HEADER))
    if begin.startswith(NPY):
        return _opened_npy(file, begin)
    magic, version, count = np.frombuffer(begin[:12].ljust(12, b"\0"), "<i4").tolist()
    if path.lower().endswith(".bin") and magic in MAGIC and len(begin) == HEADER:
        shard = Shard(file, HEADER, MAGIC[magic], count)
        held = (file.size - HEADER) / shard.dtype.itemsize
        if held != count:
            refuse(
                f"{path} is no whole shard: its header (version {version}) says {count:,} tokens, "
                f"and {held:,g} follow"
            )
        return shard
    if file.size % dtype.itemsize:
        refuse(f"{path} is no whole shard: {file.size:,} bytes are no whole number of {dtype}")
    return Shard(file, 0, dtype, file.size // dtype.itemsize)


def _opened_npy(file: File, begin: bytes) -> Shard:
    """A file in NumPy's format.

    Raises:
      InputError: a header that is damaged, or not of a vector of unsigned ids; a file that is cut.
    """
    stream = io.BytesIO(begin)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError as error:
        raise InputError(
            f"data.source: {file.path} has a damaged NumPy header: {first_line(error)}."
        ) from error
    if len(shape) != 1 or dtype.kind != "u":
        refuse(f"{file.path} holds {dtype} {list(shape)}: it must be one axis of unsigned ids")
    if file.size != stream.tell() + shape[0] * dtype.itemsize:
        refuse(
            f"{file.path} is no whole shard: its header says {shape[0]:,} tokens, and it has "
            f"{file.size:,} bytes"
        )
    return Shard(file, stream.tell(), dtype, shape[0])
