"""Byte-level BPE by `tiktoken`, where that is installed: the same ids, three times as fast.

tiktoken joins the neighbours whose union has the lowest id, the `tokenizers` library the pair that
was merged first in training. With ids in the order of the merges both find the same tokens
(openai/tiktoken is how OpenAI encodes for GPT-2); tests compare them on texts of many kinds.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from gptjax.data.tokenizers.byte_level import bytes_of

if TYPE_CHECKING:
    import tiktoken

GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""GPT-2's words (openai/gpt-2, src/encoder.py), which are those of the step `ByteLevel`."""
PARALLEL, SLICES = 1 << 18, 8
"""Characters from which threads are started, and in how many parts a core gets its texts."""
PLAIN = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
"""Fields of the model of a tokenizer.json that must be unset."""


class FastBpe:
    """The encoder of a tokenizer.json."""

    def __init__(self, encoding: "tiktoken.Encoding"):
        self._encoding = encoding

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """`encode` of each text, on all cores where there is much of it."""
        cores = os.cpu_count() or 1
        if sum(map(len, texts)) < PARALLEL or cores == 1:
            return [self.encode(text) for text in texts]
        size = -(-len(texts) // (SLICES * cores))
        slices = [texts[first : first + size] for first in range(0, len(texts), size)]
        with ThreadPoolExecutor(cores) as threads:  # tiktoken runs without Python's lock.
            return list(
                itertools.chain(*threads.map(lambda some: [*map(self.encode, some)], slices))
            )

    def encode(self, text: str) -> np.ndarray | None:
        """Token ids [T], int32; None of a text that tiktoken cannot take, such as a million spaces,
        for which its regular expressions lack the room."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)
        except ValueError:  # UnicodeEncodeError is one.
            return None


def fast_bpe(content: Mapping[str, Any]) -> FastBpe | None:
    """The encoder of a tokenizer.json; None if tiktoken is missing or would give other ids."""
    try:
        import tiktoken
    except ImportError:
        return None
    words, ranks = _words(content), _ranks(content)
    if words is None or ranks is None:
        return None
    try:
        return FastBpe(
            tiktoken.Encoding("", pat_str=words, mergeable_ranks=ranks, special_tokens={})
        )
    except ValueError:  # A regular expression of another dialect.
        return None


def _words(content: Mapping[str, Any]) -> str | None:
    """The regular expression of the words within which bytes are merged."""
    if content.get("normalizer") is not None:
        return None
    step = content.get("pre_tokenizer") or {}
    first, last = {}, step
    if step.get("type") == "Sequence":
        steps = step.get("pretokenizers") or []
        if len(steps) != 2:
            return None
        first, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        return None if first else GPT2_WORDS
    isolated = first.get("behavior") == "Isolated" and not first.get("invert")
    if first.get("type") != "Split" or not isolated:
        return None
    return (first.get("pattern") or {}).get("Regex")


def _ranks(content: Mapping[str, Any]) -> dict[bytes, int] | None:
    """The id of each byte and of each merge; None if the ids are not in the order of the merges."""
    model, added = content["model"], content.get("added_tokens") or []
    plain = model.get("type") == "BPE" and not any(model.get(name) for name in PLAIN)
    if not plain or not all(token["special"] for token in added):
        return None
    vocabulary: Mapping[str, int] = model["vocab"]
    ranks = {bytes_of(piece): vocabulary[piece] for piece in vocabulary if len(piece) == 1}
    ranks.pop(b"", None)  # Of a character that stands for no byte.
    last = -1
    for piece in _merged(model["merges"]):
        if vocabulary.get(piece, -1) <= last:
            return None
        last = ranks[bytes_of(piece)] = vocabulary[piece]
    return ranks if all(bytes([byte]) in ranks for byte in range(256)) else None


def _merged(merges: list[Any]) -> Iterator[str]:
    for pair in merges:
        yield pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(pair)
