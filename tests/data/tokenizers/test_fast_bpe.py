"""The ids of tiktoken are those of the `tokenizers` library."""

import itertools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_texts import NASTY

from gptjax.config import InputError
from gptjax.data.sources import embedded_corpus
from gptjax.data.tokenizers import SubwordTokenizer, train_tokenizer
from gptjax.data.tokenizers.fast_bpe import GPT2_WORDS, fast_bpe

pytest.importorskip("tiktoken", reason="the package tiktoken is not installed")

SHARED = Path(__file__).parents[4] / "shared" / "data"
TEXT = embedded_corpus()[:200_000]
TRAINED = SubwordTokenizer.train(TEXT, 1500)
CONTENT = json.loads(TRAINED.save())
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(words: str) -> dict:
    """The tokenizer above with the words of this regular expression."""
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    whole = {**CONTENT["pre_tokenizer"], "use_regex": False}
    return {**CONTENT, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, whole]}}


def assert_same(tokenizer: SubwordTokenizer, texts: list[str]) -> None:
    """Both encode each text alike."""
    assert tokenizer._fast is not None
    for text, expected in zip(texts, tokenizer._by_library(texts), strict=True):
        found = tokenizer._fast.encode(text)
        assert found is not None
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.int32


def joined(tokenizer: SubwordTokenizer, count: int) -> list[str]:
    """Words of tokens that do not belong together: neighbours that training never met."""
    draw = random.Random(0)
    pieces = [tokenizer.decode([token]).strip() for token in range(tokenizer.vocab_size)]
    letters = [piece for piece in pieces if piece.isalpha()]
    words = ("".join(draw.choices(letters, k=draw.randint(1, 4))) for _ in range(count))
    return [" ".join(itertools.islice(words, 100)) for _ in range(count // 100)]


@pytest.mark.parametrize("words", [None, GPT2_WORDS, LLAMA3_WORDS])
def test_texts_of_every_kind(words):
    tokenizer = TRAINED
    if words is not None:
        tokenizer = SubwordTokenizer(json.dumps(split_by(words)).encode(), "huggingface")
    texts = [*NASTY.values(), TEXT, *joined(tokenizer, 20_000), "", " ", "a" * 100_000]
    assert_same(tokenizer, [text for text in texts if text.isprintable() or "\ud800" not in text])


@given(st.text())
def test_any_text(text):
    assert_same(TRAINED, [text])


@pytest.mark.skipif(not SHARED.exists(), reason="shared/ (published vocabularies) is not there")
def test_gpt2s_vocabulary():
    tokenizer = train_tokenizer(f"gpt2:{SHARED / 'gpt2_bpe'}", "")
    assert isinstance(tokenizer, SubwordTokenizer)
    wikitext = (SHARED / "wikitext2" / "test.txt").read_text()
    assert_same(tokenizer, [wikitext, TEXT, *joined(tokenizer, 100_000), *NASTY.values()])


def test_what_tiktoken_cannot_take_is_encoded_by_the_library():
    fast = TRAINED._fast
    assert fast is not None
    spaces = " " * 1_000_000
    assert fast.encode(spaces) is None
    ids = TRAINED.encode_documents(["a b", spaces, "c"])
    assert [TRAINED.decode(own.tolist()) for own in ids] == ["a b", spaces, "c"]
    with pytest.raises(InputError, match="cannot encode the text"):
        TRAINED.encode_documents(["a", "\ud800"])


def _out_of_order(content: dict) -> None:
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    first, second = ("".join(pair) for pair in merges[:2])
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


CHANGES: dict[str, Callable[[dict], object]] = {
    "a normalizer": lambda content: content.update(normalizer={"type": "NFC"}),
    "a space before the text": lambda content: content["pre_tokenizer"].update(
        add_prefix_space=True
    ),
    "other words": lambda content: content.update(pre_tokenizer={"type": "Whitespace"}),
    "words of two kinds": lambda content: content.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits"}] * 3}
    ),
    "no WordPiece": lambda content: content["model"].update(type="WordPiece"),
    "a suffix": lambda content: content["model"].update(end_of_word_suffix="</w>"),
    "ids out of order": _out_of_order,
    "a byte less": lambda content: content["model"]["vocab"].pop("!"),
    "an added token that is text": lambda content: content["added_tokens"][0].update(special=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_others_are_left_to_the_library(change):
    content = json.loads(json.dumps(CONTENT))
    assert fast_bpe(content) is not None
    CHANGES[change](content)
    assert fast_bpe(content) is None


def test_without_the_package_the_ids_are_the_same(monkeypatch):
    expected = TRAINED.encode("the example above")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    alone = SubwordTokenizer(TRAINED.save(), "bpe:1500")
    assert alone._fast is None
    np.testing.assert_array_equal(alone.encode("the example above"), expected)
