"""Tokenizers: text to token ids and back, behind one small protocol (protocol.py).

| `data.tokenizer` | a token is | vocabulary | lossless |
|---|---|---|---|
| bytes | a byte of UTF-8 | 256, and an end token | yes |
| characters | a character of the training text | those, and an end token | yes, no others |
| sentencepiece:SIZE | a piece learned by BPE, or a byte where no piece fits | SIZE | yes |
| unigram:SIZE | a piece of SentencePiece's unigram model, or a byte | SIZE | yes |
| bpe:SIZE | bytes joined by BPE within GPT-2's words | SIZE | yes |
| sentencepiece:FILE.model | a piece of that SentencePiece model | the model's | as the model |
| gpt2:PATH | GPT-2's, of encoder.json and vocab.bpe | 50,257 | yes |
| gpt1:PATH | GPT-1's, of encoder_bpe_40000.json and vocab_40000.bpe | 40,478 | no |
| wordpiece:PATH | uncased BERT's, of vocab.txt | 30,522 | no |
| huggingface:PATH | what the tokenizer.json there describes | the file's | as the file |

GPT-1's and BERT's drop capital letters, accents and the spaces between words; what they decode,
they encode to the same tokens, except unknown ones. Those with a SIZE are trained on the training
text. Bytes and characters have an end token only if the text is several documents.
`save_tokenizer` writes the whole tokenizer: `load_tokenizer` reads none of these paths.
"""

import functools
import json
from pathlib import Path

from gptjax.config import InputError, near_names, parse_json, whole_number
from gptjax.data.tokenizers.files import (
    read_gpt1,
    read_gpt2,
    read_huggingface,
    read_sentencepiece,
    read_wordpiece,
)
from gptjax.data.tokenizers.pieces import MODEL_TYPES, SentencePieceTokenizer
from gptjax.data.tokenizers.plain import ByteTokenizer, CharacterTokenizer
from gptjax.data.tokenizers.protocol import Tokenizer, fingerprint_of, stream_text
from gptjax.data.tokenizers.subwords import SubwordTokenizer

__all__ = [
    "DESCRIPTION",
    "TOKENIZER_FILES",
    "ByteTokenizer",
    "CharacterTokenizer",
    "SentencePieceTokenizer",
    "SubwordTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "read_huggingface",
    "save_tokenizer",
    "stream_text",
    "train_tokenizer",
]

FILES = {
    "gpt2": read_gpt2,
    "gpt1": read_gpt1,
    "wordpiece": read_wordpiece,
    "huggingface": read_huggingface,
}
"""Kinds that are read from the path after their colon."""

LEARNT = {
    "bpe": SubwordTokenizer.train,
    **{kind: functools.partial(SentencePieceTokenizer.train, kind=kind) for kind in MODEL_TYPES},
}
"""Kinds that are trained on the text, with the size after their colon."""

PLAIN = {"bytes": ByteTokenizer, "characters": CharacterTokenizer}
"""Kinds without an argument."""

DESCRIPTION = "tokenizer_kind.json"
"""The file with a tokenizer's name, checksum and declared special tokens."""

CONTENTS = {
    "bytes": "bytes.txt",
    "characters": "characters.json",
    **dict.fromkeys(MODEL_TYPES, "tokenizer.model"),
    **dict.fromkeys(("bpe", *FILES), "tokenizer.json"),
}
"""The file with the tokenizer's content, by kind, under its usual name: tokenizer.model is
SentencePiece's, tokenizer.json Hugging Face's."""

TOKENIZER_FILES = (DESCRIPTION, *dict.fromkeys(CONTENTS.values()))
"""All files that `save_tokenizer` may write."""

KINDS = (*PLAIN, *LEARNT, *FILES)

MODEL_FILE = ".model"
"""Suffix of a SentencePiece model's path, which distinguishes it from a size."""


def train_tokenizer(spec: str, text: str, *, ends: bool = False) -> Tokenizer:
    """The tokenizer that `spec` (see the module's table) describes, trained on `text` or read.

    With `ends`, bytes and characters get an end token; the others are unaffected.

    Raises:
      InputError: an invalid spec, one that the text cannot satisfy, or files that are
        missing or damaged.
    """
    kind, colon, argument = spec.partition(":")
    if kind in FILES:
        if not argument:
            raise InputError(f"data.tokenizer is {spec!r}: it needs a path, as in {kind}:PATH.")
        return FILES[kind](Path(argument))
    if kind == "sentencepiece" and argument.endswith(MODEL_FILE):
        return read_sentencepiece(Path(argument))
    if kind in LEARNT:
        size = whole_number(argument)
        if not size:
            file = f" or {kind}:FILE{MODEL_FILE}" if kind == "sentencepiece" else ""
            raise InputError(
                f"data.tokenizer is {spec!r}: it needs a size, as in {kind}:4096{file}."
            )
        return LEARNT[kind](text, size)
    if kind not in KINDS:
        raise InputError(f"data.tokenizer is {spec!r}: {near_names(kind, KINDS)}")
    if colon:
        raise InputError(f"data.tokenizer is {spec!r}: {kind} takes no argument.")
    return PLAIN[kind].train(text, ends=ends)


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the tokenizer's description (`DESCRIPTION`) and content (`CONTENTS`)."""
    description = {
        "tokenizer": tokenizer.name,
        "sha256": tokenizer.fingerprint,
        **({"special": dict(tokenizer.declared)} if tokenizer.declared else {}),
    }
    kind, _, _ = tokenizer.name.partition(":")
    (directory / CONTENTS[kind]).write_bytes(tokenizer.save())
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer saved in `directory`.

    Raises:
      InputError: files that are missing, or that do not belong together.
    """
    described = directory / DESCRIPTION
    try:
        description = parse_json(described.read_bytes(), str(described))
        name, fingerprint = description["tokenizer"], description["sha256"]
        declared = dict(description.get("special", {}))
        kind, _, _ = name.partition(":")
    except OSError as error:
        raise InputError(f"{described}: no tokenizer is saved here.") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{described} does not name a tokenizer.") from error
    if kind not in KINDS:
        raise InputError(f"{described} names the tokenizer {kind!r}: {near_names(kind, KINDS)}")
    path = directory / CONTENTS[kind]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: no tokenizer is saved here.") from error
    if fingerprint_of(content, declared) != fingerprint:
        raise InputError(f"{path} is damaged: it is not the file that was saved there.")
    try:
        return _restored(name, kind, content, declared)
    except ValueError as error:
        raise InputError(f"{path} {error}.") from error


def _restored(name: str, kind: str, content: bytes, declared: dict[str, int]) -> Tokenizer:
    """The tokenizer with this name, saved content and declared special tokens.

    Raises:
      ValueError: content that is not its own.
    """
    if kind in PLAIN:
        return PLAIN[kind].from_saved(content)
    if kind in MODEL_TYPES:
        return SentencePieceTokenizer(content, kind)
    return SubwordTokenizer(content, name, declared)
