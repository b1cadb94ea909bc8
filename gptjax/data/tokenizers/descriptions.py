"""A tokenizer.json, opened in the `tokenizers` library and checked.

What in it draws at random, or cuts and pads a text, is switched off, so that equal texts have equal
tokens: BPE dropout (Provilkov et al. 2020), unigram sampling (Kudo 2018), a length, padding.
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
"""Above every id; the largest published vocabularies have 260,000 tokens."""
PROBES = 8
"""Texts that are tried to see what stands around each."""
_RANDOM = ("dropout", "alpha", "nbest_size")
"""What models of the library draw by."""


class LibraryError(Exception):
    """Why the library failed, without a full stop."""


class Description(NamedTuple):
    """A tokenizer.json that was opened."""

    content: Mapping[str, Any]
    """The file."""
    library: "tokenizers.Tokenizer"
    """What encodes and decodes by it."""
    before: list[int]
    """Ids that its template puts before a text."""
    behind: list[int]
    """Ids that it puts behind one."""


def open_description(text: str) -> Description:
    """The tokenizer that a tokenizer.json describes.

    Raises:
      ValueError: another content; ids that are no rows of a table, or that two tokens share.
    """
    import tokenizers

    try:
        content = parse_json(text, "it")
        _check_merges(content)
        with _silence(), library_errors():
            library = tokenizers.Tokenizer.from_str(text)
            library.no_truncation()
            library.no_padding()
            before, behind = _template(library)
    except (InputError, LibraryError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"is not a tokenizer of the tokenizers library: {reason}") from error
    for name in _RANDOM:
        if getattr(library.model, name, None) is not None:
            setattr(library.model, name, None)
    library.encode_special_tokens = True  # The name of a special token in a text is text.
    opened = Description(content, library, before, behind)
    _check_ids(opened)
    return opened


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Turn all that the library raises into a `LibraryError`: its panics are no `Exception`."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise LibraryError(" ".join(str(error).split()).rstrip(".")) from error
        raise


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop what goes to file descriptor 2, where the library prints its panics itself."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _check_merges(content: Any) -> None:
    """What BPE joins on the right begins as what continues a word does.

    The library cuts that beginning off unseen, also within a character, and then ends the process.

    Raises:
      InputError: it is not so.
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
    """The ids before and behind a text: any that the vocabulary can write."""
    vocabulary = library.get_vocab()
    for text in ("a", *itertools.islice(vocabulary, PROBES)):
        try:
            framed = library.encode(text)
        except Exception:  # There is no unknown token for what it lacks.
            continue
        places = [place for place, added in enumerate(framed.special_tokens_mask) if not added]
        if places:
            return framed.ids[: places[0]], framed.ids[places[-1] + 1 :]
    return [], []


def unknown_token(content: Mapping[str, Any], vocabulary: Mapping[str, int]) -> int | None:
    """The id that the model of a tokenizer.json gives for what it lacks."""
    model = content["model"]
    return model.get("unk_id", vocabulary.get(model.get("unk_token") or ""))


def decodes_bytes(content: Mapping[str, Any]) -> bool:
    """Whether what a tokenizer.json decodes is written in the characters of byte-level BPE."""
    decoder = content.get("decoder") or {}
    steps = [decoder, *(decoder.get("decoders") or ())]
    return any(step.get("type") == "ByteLevel" for step in steps)


def _check_ids(opened: Description) -> None:
    """Each token has an id of its own, a row of a table that fits into memory.

    Raises:
      ValueError: it is not so.
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
    around = max([*opened.before, *opened.behind], default=-1)
    if around > most:
        raise ValueError(f"puts the id {around} around a text, which its vocabulary lacks")
    if decodes_bytes(opened.content):
        _check_pieces(opened.content["model"]["vocab"], added)


def _check_pieces(pieces: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> None:
    """No added token is also a piece, which stands for other bytes than the token's.

    Raises:
      ValueError: one is.
    """
    for token in added:
        text = token["content"]
        if not token["special"] and text in pieces and written_in_bytes(text) != text:
            raise ValueError(
                f"has the added token {text!r}, which is the piece of other bytes too: what its "
                "id stands for cannot be told"
            )
