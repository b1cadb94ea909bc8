"""Special tokens: their usual names, and the files beside a model that declare them.

| file | what it says | read for |
|---|---|---|
| generation_config.json | the ids that decoding begins and ends with | decoding |
| config.json | the same, where generation_config.json has none | decoding, the tokenizer |
| special_tokens_map.json | texts of the tokenizer's tokens | the tokenizer |
| tokenizer_config.json | the same | the tokenizer |

The order is that of Hugging Face transformers 5: generation_config.json precedes config.json, and
special_tokens_map.json counts where tokenizer_config.json has no added_tokens_decoder.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config import InputError, read_json_object

NAMES = {
    "end": ("</s>", "[SEP]", "<|endoftext|>"),
    "begin": ("<s>", "[CLS]"),
    "pad": ("<pad>", "[PAD]"),
    "mask": ("<mask>", "[MASK]"),
    "unknown": ("<unk>", "[UNK]"),
}
"""Usual names of special tokens, for vocabularies without declarations."""

FIELDS = {
    "begin": ("bos_token", "cls_token"),
    "end": ("eos_token", "sep_token"),
    "pad": ("pad_token",),
    "mask": ("mask_token",),
    "unknown": ("unk_token",),
}
"""Their fields in tokenizer_config.json; for an encoder, the second."""

TOKENIZER_CONFIG, TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


class DecodingTokens(NamedTuple):
    """Token ids that decoding begins and ends with; None or empty if not declared."""

    begin: int | None = None
    """Before a text."""
    ends: tuple[int, ...] = ()
    """Each of them ends decoding; the first one is put after a text."""
    pad: int | None = None
    """Padding."""
    start: int | None = None
    """First input token of an encoder-decoder's decoder."""

    def fields(self) -> dict[str, Any]:
        """The fields of a config.json; null if not declared."""
        ends = self.ends[0] if len(self.ends) == 1 else list(self.ends) or None
        given = {"bos_token_id": self.begin, "eos_token_id": ends, "pad_token_id": self.pad}
        return given if self.start is None else {**given, "decoder_start_token_id": self.start}

    @classmethod
    def of_fields(
        cls, sources: Iterable[tuple[str, Mapping[str, Any]]], vocab_size: int
    ) -> "DecodingTokens":
        """Each token from the first of `sources` (name, fields) that declares it.

        Ids outside the vocabulary are ignored, as -1 in old Llamas.

        Raises:
          InputError: a field that is not null, an id, or a list of ids.
        """
        found: dict[str, tuple[int, ...]] = {}
        for where, given in sources:
            for name in ("bos", "eos", "pad", "decoder_start"):
                ids = _ids(given.get(f"{name}_token_id"), f"{where}: {name}_token_id")
                ids = tuple(token for token in dict.fromkeys(ids) if 0 <= token < vocab_size)
                if ids:
                    found.setdefault(name, ids)
        first = {name: ids[0] for name, ids in found.items()}
        ends = found.get("eos", ())
        return cls(first.get("bos"), ends, first.get("pad"), first.get("decoder_start"))


def read_decoding_tokens(directory: Path, vocab_size: int) -> DecodingTokens:
    """Token ids that decoding begins and ends with, from a Hugging Face directory.

    Raises:
      InputError: a damaged file.
    """
    names = (GENERATION_CONFIG, CONFIG)
    sources = [(str(directory / name), _object(directory / name)) for name in names]
    return DecodingTokens.of_fields(sources, vocab_size)


def read_declared_tokens(directory: Path, vocabulary: Mapping[str, int]) -> dict[str, int]:
    """Special tokens that the files in `directory` declare for a tokenizer with this `vocabulary`.

    Texts that the vocabulary lacks are ignored. config.json supplies what the tokenizer's files
    leave open, and an encoder-decoder's start token. The tokens around every text (add_bos_token)
    come from the template in tokenizer.json alone, as in transformers.

    Returns:
      Ids by the names of `Tokenizer.special`.

    Raises:
      InputError: a damaged file.
    """
    path = directory / TOKENIZER_CONFIG
    given = _object(path)
    if "added_tokens_decoder" not in given:
        given = given | _object(directory / TOKENS_MAP)
    by_id = read_decoding_tokens(directory, 1 + max(vocabulary.values(), default=-1))
    special = {"begin": by_id.begin, "pad": by_id.pad, "start": by_id.start}
    special["end"] = by_id.ends[0] if by_id.ends else None
    for name, fields in FIELDS.items():
        texts = [_text(given.get(field), f"{path}: {field}") for field in fields]
        ids = [vocabulary[text] for text in texts if text is not None and text in vocabulary]
        special[name] = ids[0] if ids else special.get(name)
    return {name: token for name, token in special.items() if token is not None}


def tokenizer_config(special: Mapping[str, str], family: str) -> dict[str, Any]:
    """A tokenizer_config.json that declares special tokens to AutoTokenizer.

    Args:
      special: their texts, by the names of `Tokenizer.special`.
      family: of the model; an encoder's begin and end use BERT's field names (cls, sep).
    """
    fields = {name: known[-1 if family == "encoder" else 0] for name, known in FIELDS.items()}
    named = {fields[name]: text for name, text in special.items() if name in fields}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **named}


def _ids(value: Any, what: str) -> tuple[int, ...]:
    """The ids in a field."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(token) is int for token in ids):
        raise InputError(f"{what} is {value!r}: it must be a token's id, a list of them, or null.")
    return ids


def _text(value: Any, what: str) -> str | None:
    """The text of a token, given as a string or as an object with flags."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str | None):
        raise InputError(f"{what} is {value!r}: it must be a token's text, or null.")
    return text


def _object(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; empty if there is no file."""
    return read_json_object(path) if path.exists() else {}
