"""Subword tokenizers run by Hugging Face's `tokenizers` library, each given as a tokenizer.json.

Byte-level BPE (Radford et al. 2019) merges bytes and so is lossless; GPT-1's BPE (Radford et al.
2018) merges the characters of a word, and WordPiece (Devlin et al. 2018) takes the longest known
pieces of a word. files.py writes the tokenizer.json of published vocabularies; those of other
tokenizers are used unchanged.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from gptjax.config import InputError
from gptjax.data.tokenizers.byte_level import bytes_of, written_in_bytes
from gptjax.data.tokenizers.descriptions import (
    LibraryError,
    decodes_bytes,
    library_errors,
    open_description,
    unknown_token,
)
from gptjax.data.tokenizers.fast_bpe import FastBpe, fast_bpe
from gptjax.data.tokenizers.pieces import bytes_of_piece
from gptjax.data.tokenizers.protocol import REPLACEMENT, Tokenizer
from gptjax.data.tokenizers.special import NAMES
from gptjax.data.tokenizers.words import WordEdges, edges_of_text

TRAINED_SPECIAL = ("<s>", "</s>", "<pad>", "<mask>")
"""Special tokens of vocabularies trained here, which need no unknown token."""

FEWEST_BYTE_PIECES = len(TRAINED_SPECIAL) + 256

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}

PIECE_LENGTH = 1 << 20
"""About how many characters are encoded at a time: a text's words take more memory than it."""

# Before a space or newline that follows a character. In GPT-2's and BERT's pre-tokenization no
# token crosses such a boundary, and none depends on the text before it.
_CUT = re.compile(r"(?<=\S)(?=[ \n])")


_NOTHING = np.zeros(0, np.int32)


def pieces_of(text: str) -> Iterator[str]:
    """`text` in pieces of about `PIECE_LENGTH` characters or more, cut between tokens."""
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + PIECE_LENGTH)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def description(model: dict[str, Any], **steps: Any) -> str:
    """A tokenizer.json with this `model`, and the processing `steps` around it."""
    unset = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    empty = {"version": "1.0", "added_tokens": [], **dict.fromkeys(unset)}
    return json.dumps({**empty, **steps, "model": model})


class SubwordTokenizer(Tokenizer):
    """The tokenizer that a tokenizer.json describes.

    `encode` includes the special tokens that its template puts around a text, such as BERT's [CLS]
    and [SEP]. Truncation, padding and randomness that it specifies are off (descriptions.py).
    """

    def __init__(
        self, content: bytes, name: str, declared: Mapping[str, int] = MappingProxyType({})
    ):
        """Take the content of a tokenizer.json, and the special tokens declared in other files.

        Raises:
          ValueError: invalid content, or a declared token that it lacks.
        """
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError("is not a tokenizer of the tokenizers library: no UTF-8") from error
        opened = open_description(text)
        self.name = name
        self.declared = declared
        self._content = content
        self._library = opened.library
        self._decoder = opened.library.decoder
        self._cuttable = _is_cuttable(opened.content)
        self._byte_level = _mentions(opened.content, "ByteLevel")
        self._before = np.array(opened.before, np.int32)
        self._after = np.array(opened.after, np.int32)
        self.vocabulary = opened.library.get_vocab()
        self.vocab_size = max(self.vocabulary.values(), default=-1) + 1
        for meaning, token in declared.items():
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"has no token {token}, which is declared as its {meaning}")
        unknown = unknown_token(opened.content, self.vocabulary)
        self.special = self._special(unknown)
        meant = {token for meaning, token in self.special.items() if meaning != "unknown"}
        # GPT-2's files declare its end token as the unknown one too, though it is never used so.
        unknowns = {unknown, self.special.get("unknown")} - meant
        added = self._library.get_added_tokens_decoder()
        self._silent = {token for token in added if added[token].special} | meant
        self._silent -= unknowns
        self._pieces = [REPLACEMENT] * self.vocab_size
        in_bytes = decodes_bytes(opened.content)
        for piece, token in self.vocabulary.items():
            if token not in unknowns:
                # The library's decoder maps the characters of an added token to bytes.
                of_text = in_bytes and token in added
                self._pieces[token] = written_in_bytes(piece) if of_text else piece
        typed = [token for token in meant if token in added and not added[token].special]
        if typed:  # Text never yields special tokens.
            names = [added[token].content for token in typed]
            self._library.add_special_tokens(names)

    def _special(self, unknown: int | None) -> dict[str, int]:
        """Ids by meaning: as declared, else as the model says, else by their usual names."""
        special = {
            meaning: self.vocabulary[token]
            for meaning, names in NAMES.items()
            for token in names
            if token in self.vocabulary
        }
        if unknown is not None and unknown not in special.values():
            special["unknown"] = unknown
        return special | dict(self.declared)

    def ended(self) -> bytes:
        """The tokenizer.json, with the end token after every text if it puts none there."""
        end = self.special_texts().get("end")
        if self._after.size or end is None:
            return self._content
        texts = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
        mark = {"SpecialToken": {"id": end, "type_id": 0}}
        template = {
            "type": "TemplateProcessing",
            "single": [texts[0], mark],
            "pair": [*texts, mark],
            "special_tokens": {end: {"id": end, "ids": [self.end_token], "tokens": [end]}},
        }
        content = {**json.loads(self._content), "post_processor": template}
        return json.dumps(content, ensure_ascii=False).encode("utf-8")

    def special_texts(self) -> dict[str, str]:
        """Vocabulary entries of the special tokens, by the names of `special`."""
        texts = {token: text for text, token in self.vocabulary.items()}
        return {name: texts[token] for name, token in self.special.items() if token in texts}

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "SubwordTokenizer":
        """Train a byte-level BPE of `vocab_size` tokens on `text`, split into GPT-2's words.

        Raises:
          InputError: a size too large for the text, or too small for the bytes.
        """
        from tokenizers import Tokenizer, pre_tokenizers, trainers

        spec = f"data.tokenizer is 'bpe:{vocab_size}'"
        if vocab_size < FEWEST_BYTE_PIECES:
            raise InputError(f"{spec}: the size must be at least {FEWEST_BYTE_PIECES}.")
        # Each merge makes one token of two, so a text yields no more merges than it has bytes.
        most = FEWEST_BYTE_PIECES + len(text.encode("utf-8"))
        trainer = trainers.BpeTrainer(
            vocab_size=min(vocab_size, most),
            special_tokens=list(TRAINED_SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        empty = description(
            {"type": "BPE", "vocab": {}, "merges": []}, pre_tokenizer=BYTE_LEVEL, decoder=BYTE_LEVEL
        )
        library = Tokenizer.from_str(empty)
        library.train_from_iterator(pieces_of(text), trainer)
        learned = library.get_vocab_size()
        if learned < vocab_size:
            raise InputError(f"{spec}: for this text the size must be at most {learned}.")
        return cls(library.to_str().encode("utf-8"), f"bpe:{vocab_size}")

    def encode(self, text: str) -> np.ndarray:
        """Token ids [T], int32, with the template's tokens around them."""
        return np.concatenate([self.encode_prompt(text), self._after])

    def encode_prompt(self, text: str) -> np.ndarray:
        """Token ids [T], int32, with the template's tokens before them."""
        return np.concatenate([self._before, *self.encode_documents([text])])

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids [T], int32, of each text."""
        if self._fast is None:
            return self._by_library(texts)
        pieces = [[*pieces_of(text)] if self._cuttable else [text] for text in texts]
        flat = [*itertools.chain(*pieces)]
        found = self._fast.encode_all(flat)
        others = iter(
            self._by_library([piece for piece, ids in zip(flat, found, strict=True) if ids is None])
        )
        every = iter([next(others) if ids is None else ids for ids in found])
        of_texts = ([*itertools.islice(every, len(of))] or [_NOTHING] for of in pieces)
        return [np.concatenate(ids) if len(ids) > 1 else ids[0] for ids in of_texts]

    @functools.cached_property
    def _fast(self) -> FastBpe | None:
        return fast_bpe(json.loads(self._content))

    def _by_library(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids [T], int32, of each text, by the `tokenizers` library.

        Each distinct word is encoded once, in parallel over the cores.
        """
        if not texts:
            return []
        numbers: dict[str, int] = {}
        order, counts = [], []
        for text in texts:
            before = len(order)
            for piece in pieces_of(text) if self._cuttable else [text]:
                words = _CUT.split(piece) if self._cuttable else [piece]
                order += [numbers.setdefault(word, len(numbers)) for word in words]
            counts.append(len(order) - before)
        try:
            with library_errors():
                encodings = self._library.encode_batch_fast(list(numbers), add_special_tokens=False)
        except LibraryError as error:
            raise InputError(f"The tokenizer cannot encode the text: {error}.") from error
        found = [encoding.ids for encoding in encodings]
        tokens = np.fromiter(itertools.chain.from_iterable(found), np.int32)
        lengths = np.array([len(ids) for ids in found], np.int64)
        # Where the tokens of each word start, among the distinct words and in the result.
        occurrences = np.array(order, np.int64)
        source = (np.cumsum(lengths) - lengths)[occurrences]
        lengths = lengths[occurrences]
        ends = np.cumsum(lengths)
        target = ends - lengths
        result = tokens[np.repeat(source - target, lengths) + np.arange(lengths.sum())]
        borders = np.append(0, ends)[np.cumsum(counts)[:-1]]
        return np.split(result, borders)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids [T]."""
        pieces = [
            self._pieces[token] if token < self.vocab_size else REPLACEMENT
            for token in tokens
            if token not in self._silent
        ]
        return self._decoder.decode(pieces) if self._decoder else " ".join(pieces)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of the piece."""
        of_piece = bytes_of if self._byte_level else bytes_of_piece
        return of_piece(self._pieces[token])

    def word_edges(self) -> WordEdges:
        """Which pieces join into words."""
        content = json.loads(self._content)
        prefix = content["model"].get("continuing_subword_prefix")
        suffix = content["model"].get("end_of_word_suffix")
        every = np.ones(self.vocab_size, bool)
        if prefix:
            return WordEdges(np.array([piece.startswith(prefix) for piece in self._pieces]), every)
        if suffix:
            # Whether a word ends in an unknown character is lost; most unknown ones end a word.
            ends = (suffix, REPLACEMENT)
            inner = np.array([not piece.endswith(ends) for piece in self._pieces])
            return WordEdges(every, inner)
        return edges_of_text(map(self.token_bytes, range(self.vocab_size)))

    def save(self) -> bytes:
        """The tokenizer.json."""
        return self._content


def _mentions(content: Mapping[str, Any], step: str) -> bool:
    """Whether a tokenizer.json has `step` in its pre-tokenizer or decoder."""
    steps = [content.get("pre_tokenizer"), content.get("decoder")]
    return f'"type": "{step}"' in json.dumps(steps)


def _is_cuttable(content: Mapping[str, Any]) -> bool:
    """Whether the words of a text, encoded one by one, give the tokens of the whole.

    True of the two pre-tokenizers that `_CUT` was made for, if normalisation before them works
    character by character.
    """
    words = content.get("pre_tokenizer") or {}
    changed = (content.get("normalizer") or {}).get("type")
    if not all(token["special"] for token in content.get("added_tokens") or []):
        return False  # Such a token is matched in the text first, and may contain spaces.
    if words.get("type") == "ByteLevel":
        gpt2 = words.get("use_regex", True) and not words.get("add_prefix_space")
        return bool(gpt2) and changed is None
    return words.get("type") == "BertPreTokenizer" and changed in (None, "BertNormalizer")
