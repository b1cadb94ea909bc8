"""A parser of GGUF files: keys with their values, and the offset of each tensor.

Source: docs/gguf.md of ggml-org/ggml. The package gguf has a reader too, but it trusts the header:
a damaged list of 2**63 numbers is read forever, and tensors may overlap. Here every length is
checked against the file's size, and long arrays are views of the file.
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
"""Type id in the file → format letter of `struct` and NumPy."""
MOST_ENTRIES = 1 << 22
"""Most keys, tensors and strings in a list; the largest vocabularies have 260,000 tokens."""
MOST_DIMENSIONS = 4
"""ggml's limit."""


class Tensor(NamedTuple):
    """A tensor's position in the file."""

    shape: tuple[int, ...]
    """In NumPy's order of axes; ggml has the reverse."""
    kind: int
    """Its `GGMLQuantizationType`."""
    start: int
    """Offset of its first byte."""
    size: int
    """Size in bytes."""


class Layout(NamedTuple):
    """The content of a file."""

    content: mmap.mmap
    keys: dict[str, Any]
    """Numbers, strings, and lists: of numbers as arrays, of strings only their count."""
    tensors: dict[str, Tensor]


def read_layout(path: Path, blocks: Mapping[Any, tuple[int, int]]) -> Layout:
    """Returns a file's layout; `blocks` has, per type, the numbers per block and its bytes.

    Raises:
      OSError: a file that cannot be read.
      ValueError: not a GGUF file, or a damaged one.
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
    """Returns the tensors, checked to be within the file and disjoint."""
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
    """A cursor in the bytes that advances as they are read.

    Raises:
      ValueError: bytes beyond the end of the file, or invalid ones.
    """

    def __init__(self, content: mmap.mmap):
        self.content = content
        self.at = 0

    def skip(self, size: int) -> int:
        """Returns the offset of the next `size` bytes, and skips them."""
        if size > len(self.content) - self.at:
            raise ValueError("its header is longer than the file")
        self.at += size
        return self.at - size

    def take(self, size: int) -> bytes:
        """Returns the next bytes."""
        start = self.skip(size)
        return self.content[start : start + size]

    def number(self, letter: str) -> Any:
        """Returns the next number."""
        form = f"<{letter}"
        return struct.unpack_from(form, self.content, self.skip(struct.calcsize(form)))[0]

    def count(self, what: str) -> int:
        """Returns the next length, if it is plausible."""
        count = self.number("Q")
        if count > MOST_ENTRIES:
            raise ValueError(f"it says that it has {count} {what}")
        return count

    def text(self) -> str:
        """Returns the next string."""
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """Returns the next value of this type."""
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
        """Returns shape, type and offset of the next tensor, after its name."""
        dimensions = self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} axes")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise ValueError("a tensor has an axis of length 0")
        return shape, self.number("I"), self.number("Q")
