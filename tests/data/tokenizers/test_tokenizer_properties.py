"""What every text, and every sequence of ids, must satisfy (hypothesis)."""

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizer_texts import NASTY, TRAINED_ON, write_gpt1, write_gpt2, write_wordpiece

from gptjax.data.tokenizers import (
    CharacterTokenizer,
    Tokenizer,
    stream_text,
    subwords,
    train_tokenizer,
)

MARKS = ["<s>", "</s>", "<pad>", "<mask>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>"]
FRAGMENTS = [*NASTY.values(), *MARKS, " ", "\n", "\t", "\r\n", "don't", "dog", "the"]

texts = st.one_of(
    st.text(max_size=40),
    st.text("ab' .,\n\t\r\0é中\u0301\u200d👍", max_size=40),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=5)), max_size=8).map("".join),
)

LOSSLESS = ("bytes", "sentencepiece:360", "unigram:305", "bpe:350", "gpt2")
LOWERING = ("gpt1", "wordpiece")
WRITERS = {"gpt2": write_gpt2, "gpt1": write_gpt1, "wordpiece": write_wordpiece}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Tokenizer]:
    """A tokenizer of each kind."""
    made = {"characters": train_tokenizer("characters", TRAINED_ON)}
    for spec in (*LOSSLESS, *LOWERING):
        path = ""
        if spec in WRITERS:
            directory = tmp_path_factory.mktemp(spec)
            WRITERS[spec](directory)
            path = f":{directory}"
        made[spec] = train_tokenizer(f"{spec}{path}", TRAINED_ON)
    return made


@pytest.mark.parametrize("spec", LOSSLESS)
@given(text=texts)
def test_any_text_comes_back_and_holds_no_special_token(made, spec, text):
    tokenizer = made[spec]
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert tokenizer.decode(tokens) == text
    assert not set(tokenizer.special.values()) & set(tokens.tolist())


@given(text=texts)
def test_characters_bring_back_their_own_text(text):
    tokenizer = CharacterTokenizer.train(text + "a")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("spec", LOSSLESS)
@given(text=texts)
def test_streamed_text_has_no_half_characters(made, spec, text):
    parts = list(stream_text(made[spec], made[spec].encode(text)))
    assert "".join(parts) == text
    assert sum(part.count("\ufffd") for part in parts) == text.count("\ufffd")


@pytest.mark.parametrize("spec", ["characters", *LOSSLESS, *LOWERING])
@given(tokens=st.lists(st.one_of(st.integers(0, 420), st.integers(0, 8)), max_size=25))
def test_any_ids_stream_as_they_decode(made, spec, tokens):
    tokenizer = made[spec]
    parts = list(stream_text(tokenizer, tokens))
    assert "".join(parts) == tokenizer.decode(tokens)
    assert all(parts)


@pytest.mark.parametrize("spec", LOWERING)
@given(text=texts)
@example(text="The DOG, the théme; don't (ask)!")
def test_what_lowering_tokenizers_decode_they_encode_to_the_same_tokens(made, spec, text):
    tokenizer = made[spec]
    tokens = tokenizer.encode(text)
    if tokenizer.special["unknown"] not in tokens:
        again = tokenizer.decode(tokens)
        assert tokenizer.encode(again).tolist() == tokens.tolist()
        assert tokenizer.encode(text.lower()).tolist() == tokens.tolist()


@pytest.mark.parametrize("spec", ["bpe:350", "gpt2", *LOWERING])
@given(text=texts, length=st.integers(1, 50))
@example(text="a  \n\n b!\x1c c\u3000\n d!\x1c \x85e", length=1)
def test_a_text_cut_into_pieces_and_words_has_the_tokens_of_the_whole(made, spec, text, length):
    library = tokenizers.Tokenizer.from_str(made[spec].save().decode())
    library.encode_special_tokens = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subwords, "PIECE_LENGTH", length)
        pieces = list(subwords.pieces_of(text))
        assert made[spec].encode(text).tolist() == library.encode(text).ids
    assert "".join(pieces) == text
    assert all(len(piece) >= length for piece in pieces[:-1])
