"""The protocol of text sources, and the parsing of their specs."""

import re
from collections.abc import Mapping
from typing import NamedTuple, NoReturn, Protocol

import numpy as np

from gptjax.config import InputError, near_names
from gptjax.data.tokenizers.protocol import Tokenizer


class Documents(Protocol):
    """Random access to the documents of a text; reading is thread-safe.

    A pickle holds the spec and the fingerprint: unpickling opens the source again, and fails if the
    text differs.
    """

    name: str
    """The spec, for messages and reports."""
    fingerprint: str
    """Hex SHA-256 of the content and of how it is read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str:
        """The document at `index`, from 0.

        Raises:
          IndexError: an index that is not below the length, or is negative.
          InputError: a document that cannot be read.
        """
        ...


class EncodedDocuments(Documents, Protocol):
    """Documents that are stored as token ids; their text is what the ids decode to."""

    encoded_by: Tokenizer
    """The tokenizer of the ids."""

    def tokens(self, index: int) -> np.ndarray:
        """The ids [T], int32, of a document, without end tokens."""
        ...


class Spec(NamedTuple):
    """A parsed spec, `address#option=value&option=value`."""

    text: str
    """As the user wrote it."""
    address: str
    """A name, a path or a pattern, before the options."""
    options: Mapping[str, str]

    def choose(self, kind: str, **defaults: str | None) -> dict[str, str | None]:
        """The options of a source of this kind, with `defaults` for those not given.

        Raises:
          InputError: an option that is not in `defaults`.
        """
        for name in self.options:
            if name not in defaults:
                knows = f"takes {', '.join(defaults)}" if defaults else "takes no options"
                refuse(f"{self.text} has the option {name}, and {kind} {knows}")
        return defaults | dict(self.options)


OPTIONS = (
    *("documents", "column", "errors", "field", "split", "data_dir"),
    *("tokenizer", "dtype", "name", "rows"),
)
"""All options of all kinds of sources."""

_BEGIN = re.compile(rf"#(?=({'|'.join(OPTIONS)})=)")


def parse_spec(text: str) -> Spec:
    """Parse a spec; a `#` before anything but a known `option=` belongs to the address.

    Raises:
      InputError: an option that is unknown, empty or given twice; a missing or invalid address.
    """
    found = _BEGIN.search(text)
    address, rest = (text[: found.start()], text[found.end() :]) if found else (text, "")
    if "\0" in text:
        refuse(f"{text!r} has a zero byte, which no path has")
    if not address:
        refuse(f"{text!r} names no text; a path, embedded, or tfds:NAME does")
    options = {}
    for part in rest.split("&") if rest else ():
        name, _, value = part.partition("=")
        if name not in OPTIONS:
            raise _unknown_option(text, name)
        if name in options:
            refuse(f"{text} has the option {name} twice")
        if not value:
            refuse(f"{text} has the option {name} without a value")
        options[name] = value
    return Spec(text, address, options)


def check_no_option(spec: Spec) -> None:
    """Check that a missing address does not end in what looks like an option.

    Raises:
      InputError: one that ends in `#name=value`.
    """
    _, _, last = spec.address.rpartition("#")
    name, equals, _ = last.partition("=")
    if last != spec.address and equals and name.isidentifier():
        raise _unknown_option(spec.text, name)


def refuse(what: str) -> NoReturn:
    """Raise an error about the source; `what` is its sentence without the full stop.

    Raises:
      InputError: always.
    """
    raise InputError(f"data.source: {what}.")


def first_line(error: Exception) -> str:
    """The first line of a library's error, short enough for a sentence."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")[:300]
    return said if said.isprintable() else repr(said)


def check_index(index: int, length: int) -> None:
    """Check an index; the IndexError is what ends Python's iteration over a sequence.

    Raises:
      IndexError: an index that is not below the length, or is negative.
    """
    if not 0 <= index < length:
        raise IndexError(f"document {index} of {length}")


def _unknown_option(text: str, name: str) -> InputError:
    near = near_names(name, OPTIONS)
    return InputError(f"data.source: {text} has an unknown option {name!r}: {near}")
