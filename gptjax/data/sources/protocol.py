"""What a source of text is, and how the user's description of one is taken apart."""

import re
from collections.abc import Mapping
from typing import NamedTuple, NoReturn, Protocol

from gptjax.config import InputError, near_names


class Documents(Protocol):
    """Random access to the documents of a text; reading from several threads is safe.

    Pickled, it is its spec and its fingerprint: it is opened again where it is unpickled, and
    refused if it is another text there.
    """

    name: str
    """The spec, for messages and reports."""
    fingerprint: str
    """Hex SHA-256 of what is read: other content or another way of reading it is another one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str:
        """The document at `index`, from 0.

        Raises:
          IndexError: an index that is not below the length, or is negative.
          InputError: a document that cannot be read.
        """
        ...


class Spec(NamedTuple):
    """A spec in its two parts, `address#option=value&option=value`."""

    text: str
    """As the user wrote it."""
    address: str
    """What stands before the options: a name, a path or a pattern."""
    options: Mapping[str, str]

    def choose(self, kind: str, **defaults: str | None) -> dict[str, str | None]:
        """The options of a source of this kind, which knows those in `defaults`.

        Raises:
          InputError: an option that it does not know.
        """
        for name in self.options:
            if name not in defaults:
                knows = f"takes {', '.join(defaults)}" if defaults else "takes no options"
                refuse(f"{self.text} has the option {name}, and {kind} {knows}")
        return defaults | dict(self.options)


OPTIONS = ("documents", "column", "errors", "field", "split", "data_dir")
"""Every option of any kind of source."""

_BEGIN = re.compile(rf"#(?=({'|'.join(OPTIONS)})=)")


def parse_spec(text: str) -> Spec:
    """Take a spec apart; a `#` before anything but a known `option=` belongs to the address.

    Raises:
      InputError: an option that does not exist, has no value or stands twice; no address, or one
        that cannot be.
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
    """An address that is not there does not end in what looks like an option.

    Raises:
      InputError: one that ends in `#name=value`.
    """
    _, _, last = spec.address.rpartition("#")
    name, equals, _ = last.partition("=")
    if last != spec.address and equals and name.isidentifier():
        raise _unknown_option(spec.text, name)


def refuse(what: str) -> NoReturn:
    """Raise the mistake in the source that `what` says, without its full stop.

    Raises:
      InputError: always.
    """
    raise InputError(f"data.source: {what}.")


def first_line(error: Exception) -> str:
    """What an error of a library says, short enough for a sentence."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")[:300]
    return said if said.isprintable() else repr(said)


def check_index(index: int, length: int) -> None:
    """Raise what Python's iteration over a sequence waits for at its end.

    Raises:
      IndexError: an index that is not below the length, or is negative.
    """
    if not 0 <= index < length:
        raise IndexError(f"document {index} of {length}")


def _unknown_option(text: str, name: str) -> InputError:
    near = near_names(name, OPTIONS)
    return InputError(f"data.source: {text} has an unknown option {name!r}: {near}")
