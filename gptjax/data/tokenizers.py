"""Text to token ids and back, behind one small protocol; every tokenizer is lossless.

| `data.tokenizer` | a token is | vocabulary |
|---|---|---|
| bytes | a byte of UTF-8 | 256 |
| characters | a character of the training text | as many as the text has |
| sentencepiece:SIZE | a piece learnt by BPE, or a byte where no piece fits | SIZE |
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from gptjax.config import InputError, near_names


class Tokenizer(Protocol):
    """What the rest of gptjax asks of a tokenizer."""

    @property
    def name(self) -> str:
        """The spec that it was made from."""
        ...

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary (V)."""
        ...

    @property
    def end_token(self) -> int | None:
        """The token that ends a document; None where the vocabulary has none."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Token ids [T], int32.

        Raises:
          InputError: a character that the vocabulary lacks.
        """
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids [T]; bytes that are not UTF-8 become U+FFFD.

        So do ids past the vocabulary: a model may have more rows than the tokenizer has tokens.
        """
        ...

    def save(self) -> bytes:
        """All that `load` needs, as the content of one file."""
        ...


NO_BYTE = 0xFF
"""Never occurs in UTF-8, so it decodes to U+FFFD."""


class ByteTokenizer:
    """The 256 bytes: any text, no training, no unknowns."""

    name = "bytes"
    vocab_size = 256
    end_token = None

    def encode(self, text: str) -> np.ndarray:
        """UTF-8 bytes [T], int32."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of bytes [T]."""
        return bytes(min(int(token), NO_BYTE) for token in tokens).decode("utf-8", "replace")

    def save(self) -> bytes:
        """Nothing is learnt, so nothing is kept."""
        return b""


class CharacterTokenizer:
    """One token a character, in code point order, as nanoGPT's character data set has it."""

    name = "characters"
    end_token = None

    def __init__(self, characters: str):
        self.characters = characters
        self.vocab_size = len(characters)
        self._points = np.array([ord(character) for character in characters], np.uint32)

    @classmethod
    def train(cls, text: str) -> "CharacterTokenizer":
        """The characters that occur in `text`."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> np.ndarray:
        """Places in the sorted characters [T], int32."""
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        places = np.searchsorted(self._points, points).clip(max=self.vocab_size - 1)
        unknown = np.flatnonzero(self._points[places] != points)
        if unknown.size:
            character, at = chr(points[unknown[0]]), unknown[0]
            raise InputError(
                f"The tokenizer has no token for {character!r} (character {at} of the text): "
                f"it knows the {self.vocab_size} characters of its training text."
            )
        return places.astype(np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The characters of places [T]."""
        known = self.vocab_size
        return "".join(self.characters[token] if token < known else "\ufffd" for token in tokens)

    def save(self) -> bytes:
        """The characters, as JSON."""
        return json.dumps(self.characters, ensure_ascii=False).encode("utf-8")


# SentencePiece ends its input at NUL and writes a space as ▁ (U+2581): these two are given to it as
# the bytes that they are.
_RESERVED = re.compile("([\0▁])")


FEWEST_PIECES = 3 + 256
"""The marks <unk>, <s> and </s>, and the bytes: what every vocabulary has."""


class SentencePieceTokenizer:
    """BPE pieces over raw text (Kudo & Richardson 2018), lossless by falling back to bytes."""

    def __init__(self, model: bytes):
        from sentencepiece import SentencePieceProcessor

        self._model = model
        self._processor = SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self.name = f"sentencepiece:{self.vocab_size}"
        self.end_token = self._processor.eos_id()

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "SentencePieceTokenizer":
        """Learn `vocab_size` pieces from `text`.

        Raises:
          InputError: a size that the text is too short for, or too small for its characters.
        """
        from sentencepiece import SentencePieceTrainer

        lines = _RESERVED.sub("", text).splitlines(keepends=True)
        model = io.BytesIO()
        try:
            SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type="bpe",
                # Sizes out of these bounds fail too, but slowly or without a reason.
                vocab_size=min(max(vocab_size, FEWEST_PIECES), FEWEST_PIECES + 2 * len(text)),
                character_coverage=1.0,
                # These five keep every text exactly as it is.
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=1 << 30,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            bound = re.search(r"(vs|<=) (\d+)", str(error))
            if bound is None:
                raise InputError(
                    "data.tokenizer: the text has nothing that SentencePiece can learn."
                ) from error
            accepted = f"at {'least' if bound[1] == 'vs' else 'most'} {bound[2]}"
            raise InputError(
                f"data.tokenizer is 'sentencepiece:{vocab_size}': for this text the size must be "
                f"{accepted}."
            ) from error
        return cls(model.getvalue())

    def encode(self, text: str) -> np.ndarray:
        """Piece ids [T], int32."""
        tokens: list[int] = []
        for part in _RESERVED.split(text):
            if _RESERVED.fullmatch(part):
                bytes_of_part = (f"<0x{byte:02X}>" for byte in part.encode("utf-8"))
                tokens += [self._processor.piece_to_id(piece) for piece in bytes_of_part]
            else:
                tokens += self._processor.encode(part)
        return np.array(tokens, np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of piece ids [T]."""
        unknown = self._processor.piece_to_id(f"<0x{NO_BYTE:02X}>")
        known = self.vocab_size
        return self._processor.decode(
            [int(token) if token < known else unknown for token in tokens]
        )

    def save(self) -> bytes:
        """The SentencePiece model file."""
        return self._model


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Text as its tokens arrive; a character is held back until all its bytes are there.

    What ends in U+FFFD may be the beginning of a character, so it waits for the tokens after it.
    """
    held: list[int] = []
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(held)
        if not text.endswith("\ufffd"):
            yield text
            held = []
    if held:
        yield tokenizer.decode(held)


KINDS = ("bytes", "characters", "sentencepiece")


def train_tokenizer(spec: str, text: str) -> Tokenizer:
    """The tokenizer that `spec` (see the module's table) describes, learnt from `text`.

    Raises:
      InputError: a spec of another form, or one that the text cannot satisfy.
    """
    kind, _, size = spec.partition(":")
    if kind == "sentencepiece":
        if not size.isdecimal() or int(size) == 0:
            raise InputError(
                f"data.tokenizer is {spec!r}: a size belongs behind it, as in sentencepiece:4096."
            )
        return SentencePieceTokenizer.train(text, int(size))
    if size or kind not in KINDS:
        raise InputError(f"data.tokenizer is {spec!r}: {near_names(kind, KINDS)}")
    return ByteTokenizer() if kind == "bytes" else CharacterTokenizer.train(text)


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `tokenizer.json` (its spec and fingerprint) and `tokenizer.model` (what it learnt)."""
    learnt = tokenizer.save()
    fingerprint = hashlib.sha256(learnt).hexdigest()
    description = {"tokenizer": tokenizer.name, "sha256": fingerprint}
    (directory / "tokenizer.model").write_bytes(learnt)
    (directory / "tokenizer.json").write_text(json.dumps(description, indent=2) + "\n")


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer saved in `directory`.

    Raises:
      InputError: files that are missing, or that do not belong together.
    """
    try:
        description = json.loads((directory / "tokenizer.json").read_text())
        kind, _, _ = description["tokenizer"].partition(":")
        fingerprint = description["sha256"]
        learnt = (directory / "tokenizer.model").read_bytes()
    except OSError as error:
        raise InputError(f"{error.filename}: no tokenizer is saved here.") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{directory / 'tokenizer.json'} does not name a tokenizer.") from error
    if hashlib.sha256(learnt).hexdigest() != fingerprint:
        raise InputError(f"{directory / 'tokenizer.model'} is not the file that was saved there.")
    if kind not in KINDS:
        path = directory / "tokenizer.json"
        raise InputError(f"{path} names the tokenizer {kind!r}: {near_names(kind, KINDS)}")
    if kind == "sentencepiece":
        return SentencePieceTokenizer(learnt)
    return ByteTokenizer() if kind == "bytes" else CharacterTokenizer(json.loads(learnt))
