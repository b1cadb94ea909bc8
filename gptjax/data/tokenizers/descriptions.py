"""Opens a tokenizer.json in the `tokenizers` library and checks it.

Randomness, truncation and padding are switched off, so that equal texts have equal tokens: BPE
dropout (Provilkov et al. 2020), unigram sampling (Kudo 2018), a maximum length, padding.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gptjax.config import InputError, parse_json
from gptjax.data.tokenizers.byte_level import written_in_bytes

if TYPE_CHECKING:
    import tokenizers

MOST_TOKENS = 1 << 22
"""Exclusive bound of ids; the largest published vocabularies have 260,000 tokens."""
PROBES = 8
"""Texts that are tried, to find the template's tokens around them."""
_RANDOM = ("dropout", "alpha", "nbest_size")
"""Parameters of the library's models that make them random."""


class LibraryError(Exception):
    """Why the library failed, without a full stop."""


class Description(NamedTuple):
    """An opened tokenizer.json."""

    content: Mapping[str, Any]
    """The parsed file."""
    library: "tokenizers.Tokenizer"
    """The library's tokenizer."""
    before: list[int]
    """Ids that its template puts before a text."""
    after: list[int]
    """Ids that its template puts after a text."""


def open_description(text: str) -> Description:
    """The tokenizer that a tokenizer.json describes.

    Raises:
      ValueError: invalid content; ids out of range or shared by two tokens.
    """
    import tokenizers

    try:
        content = parse_json(text, "it")
        _check_merges(content)
        with _silence(), library_errors():
            library = tokenizers.Tokenizer.from_str(text)
            library.no_truncation()
            library.no_padding()
            before, after = _template(library)
    except (InputError, LibraryError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"is not a tokenizer of the tokenizers library: {reason}") from error
    for name in _RANDOM:
        if getattr(library.model, name, None) is not None:
            setattr(library.model, name, None)
    library.encode_special_tokens = True  # Special tokens in a text are text.
    opened = Description(content, library, before, after)
    _check_ids(opened)
    return opened


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Turn whatever the library raises into a `LibraryError`; its panics are no `Exception`."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise LibraryError(" ".join(str(error).split()).rstrip(".")) from error
        raise


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Discard output to file descriptor 2, where the library itself prints its panics."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _check_merges(content: Any) -> None:
    """Check that the right side of each BPE merge starts with the continuation prefix.

    The library cuts the prefix off unchecked, even within a character, and then aborts the process.

    Raises:
      InputError: one does not.
    """
    model = content.get("model") if isinstance(content, dict) else None
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    merges = model.get("merges") if isinstance(model, dict) else None
    if not (isinstance(prefix, str) and isinstance(merges, list)):
        return
    for pair in merges:
        right = (
            pair.split(" ")[-1]
            if isinstance(pair, str)
            else pair[-1]
            if isinstance(pair, list) and pair
            else ""
        )
        if not (isinstance(right, str) and right.startswith(prefix)):
            raise InputError(f"its merge {pair!r} does not continue a word by {prefix!r}.")


def _template(library: "tokenizers.Tokenizer") -> tuple[list[int], list[int]]:
    """The template's ids before and after a text, found by encoding one."""
    vocabulary = library.get_vocab()
    for text in ("a", *itertools.islice(vocabulary, PROBES)):
        try:
            framed = library.encode(text)
        except Exception:  # The text has a character without a token.
            continue
        inside = [index for index, added in enumerate(framed.special_tokens_mask) if not added]
        if inside:
            return framed.ids[: inside[0]], framed.ids[inside[-1] + 1 :]
    return [], []


def unknown_token(content: Mapping[str, Any], vocabulary: Mapping[str, int]) -> int | None:
    """The unknown token's id in the model of a tokenizer.json."""
    model = content["model"]
    return model.get("unk_id", vocabulary.get(model.get("unk_token") or ""))


def decodes_bytes(content: Mapping[str, Any]) -> bool:
    """Whether the decoder of a tokenizer.json maps byte-level BPE's characters to bytes."""
    decoder = content.get("decoder") or {}
    steps = [decoder, *(decoder.get("decoders") or ())]
    return any(step.get("type") == "ByteLevel" for step in steps)


def _check_ids(opened: Description) -> None:
    """Check that ids are unique, in range and consistent.

    Raises:
      ValueError: they are not.
    """
    vocabulary, added = opened.library.get_vocab(), opened.content.get("added_tokens") or []
    largest = max(vocabulary, key=lambda text: vocabulary[text], default="")
    most = vocabulary.get(largest, -1)
    if most >= MOST_TOKENS:
        raise ValueError(f"gives {largest!r} the id {most}: it must be below {MOST_TOKENS}")
    named = {token: text for text, token in vocabulary.items()}
    if len(named) < len(vocabulary):
        twice = next(text for text, token in vocabulary.items() if named[token] != text)
        token = vocabulary[twice]
        raise ValueError(f"gives {twice!r} and {named[token]!r} one id, {token}")
    for token in added:
        text, found = token["content"], vocabulary.get(token["content"])
        if found != token["id"]:
            raise ValueError(f"gives {text!r} the id {token['id']}, and in its vocabulary {found}")
    around = max([*opened.before, *opened.after], default=-1)
    if around > most:
        raise ValueError(f"puts the id {around} around a text, which its vocabulary lacks")
    if decodes_bytes(opened.content):
        _check_pieces(opened.content["model"]["vocab"], added)


def _check_pieces(pieces: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> None:
    """Check that no added token is also a piece, which would decode to other bytes.

    Raises:
      ValueError: one is.
    """
    for token in added:
        text = token["content"]
        if not token["special"] and text in pieces and written_in_bytes(text) != text:
            raise ValueError(
                f"has the added token {text!r}, which is also a piece of other bytes: its id is "
                "ambiguous"
            )
