"""The layout of a GGUF file: its keys with their values, and where each tensor lies.

Source: docs/gguf.md of ggml-org/ggml. The package gguf has a reader too, which believes a header:
a damaged list of 2**63 numbers is read for ever, and tensors may lie in each other. Here every
length is held against the bytes that there are, and what is long is a view of the file.
"""

import mmap
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, LIST = 8, 9
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""The type's number in the file → its letter in `struct` and in NumPy."""
MOST_ENTRIES = 1 << 22
"""Of keys, tensors and strings in a list; the largest vocabularies have 260,000 tokens."""
MOST_DIMENSIONS = 4
"""As in ggml."""


class Tensor(NamedTuple):
    """Where a tensor lies."""

    shape: tuple[int, ...]
    """Rows first, as NumPy has it; ggml counts from the last axis."""
    kind: int
    """Its `GGMLQuantizationType`."""
    start: int
    """Its first byte in the file."""
    size: int
    """Its bytes."""


class Layout(NamedTuple):
    """What a file holds."""

    content: mmap.mmap
    keys: dict[str, Any]
    """Numbers, texts, and lists: of numbers as arrays, of texts as their count alone."""
    tensors: dict[str, Tensor]


def read_layout(path: Path, blocks: Mapping[Any, tuple[int, int]]) -> Layout:
    """The layout of a file; `blocks` has, of each type, the numbers in a block and its bytes.

    Raises:
      OSError: a file that cannot be read.
      ValueError: something else than GGUF, or a damaged one.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header = _Header(content)
    if header.take(len(MAGIC)) != MAGIC:
        raise ValueError(f"it does not begin with {MAGIC.decode()}")
    version = header.number("I")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}, where {VERSIONS} are read")
    tensor_count, key_count = header.count("tensors"), header.count("keys")
    keys: dict[str, Any] = {}
    for _ in range(key_count):
        name = header.text()
        if name in keys:
            raise ValueError(f"it has the key {name!r} twice")
        keys[name] = header.value(header.number("I"))
    return Layout(content, keys, _tensors(header, tensor_count, keys, blocks))


def _tensors(
    header: "_Header",
    count: int,
    keys: Mapping[str, Any],
    blocks: Mapping[Any, tuple[int, int]],
) -> dict[str, Tensor]:
    """The tensors, each within the file and none in another."""
    described = [(header.text(), *header.tensor()) for _ in range(count)]
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
    first = -(-header.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in described:
        if name in tensors:
            raise ValueError(f"it has the tensor {name!r} twice")
        if kind not in blocks:
            raise ValueError(f"the tensor {name!r} is of the unknown type {kind}")
        numbers, size = blocks[kind]
        if shape[-1] % numbers:
            raise ValueError(f"the rows of {name!r} are not whole blocks of {numbers}")
        for length in shape:
            size *= length
        tensors[name] = Tensor(shape, kind, first + offset, size // numbers)
    end = first
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise ValueError(f"the tensor {name!r} lies in another")
        end = tensor.start + tensor.size
        if end > len(header.content):
            raise ValueError(f"the tensor {name!r} ends behind the file")
    return tensors


class _Header:
    """A place in the bytes, which moves on as they are read.

    Raises:
      ValueError: bytes that the file does not have, or that mean nothing.
    """

    def __init__(self, content: mmap.mmap):
        self.content = content
        self.at = 0

    def skip(self, size: int) -> int:
        """Where the next `size` bytes begin."""
        if size > len(self.content) - self.at:
            raise ValueError("its header is longer than the file")
        self.at += size
        return self.at - size

    def take(self, size: int) -> bytes:
        """The next bytes."""
        start = self.skip(size)
        return self.content[start : start + size]

    def number(self, letter: str) -> Any:
        """The next number."""
        form = f"<{letter}"
        return struct.unpack_from(form, self.content, self.skip(struct.calcsize(form)))[0]

    def count(self, what: str) -> int:
        """The next length, of things that take some time each."""
        count = self.number("Q")
        if count > MOST_ENTRIES:
            raise ValueError(f"it says that it has {count} {what}")
        return count

    def text(self) -> str:
        """The next text."""
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """The next value of this type."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != LIST:
            raise ValueError(f"a value is of the unknown type {kind}")
        of = self.number("I")
        if of == STRING:
            count = self.count("texts in a list")
            for _ in range(count):
                self.skip(self.number("Q"))
            return f"a list of {count} texts"
        if of not in SCALARS:
            raise ValueError(f"a list holds values of the type {of}")
        dtype, count = np.dtype(f"<{SCALARS[of]}"), self.number("Q")
        return np.frombuffer(self.content, dtype, count, self.skip(count * dtype.itemsize))

    def tensor(self) -> tuple[tuple[int, ...], int, int]:
        """Shape, type and offset of the next tensor, whose name was read."""
        dimensions = self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} axes")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise ValueError("a tensor has an axis of length 0")
        return shape, self.number("I"), self.number("Q")
