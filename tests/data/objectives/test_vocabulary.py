import numpy as np
import pytest
from tokenizer_texts import TRAINED_ON, write_gpt1, write_gpt2, write_wordpiece

from gptjax.config import InputError
from gptjax.data.objectives.vocabulary import vocabulary
from gptjax.data.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer, train_tokenizer

WRITERS = {"gpt2": write_gpt2, "gpt1": write_gpt1, "wordpiece": write_wordpiece}


def made(spec: str, directory, text: str = TRAINED_ON) -> Tokenizer:
    if spec not in WRITERS:
        return train_tokenizer(spec, text)
    WRITERS[spec](directory)
    return train_tokenizer(f"{spec}:{directory}", text)


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    """The words of a text, each as its tokens decode; those of no text left out."""
    tokens = tokenizer.encode(text)
    starts = vocabulary(tokenizer, ()).word_starts(tokens)
    parts = np.split(tokens, np.flatnonzero(starts)[1:])
    return [tokenizer.decode(part).strip() for part in parts if tokenizer.decode(part).strip()]


def test_bytes_get_the_tokens_that_they_lack_in_order():
    made = vocabulary(ByteTokenizer(), {"mask", "begin", "end"}, sentinels=3)
    assert (made.begin, made.end, made.mask, made.sentinels) == (256, 257, 258, (259, 260, 261))
    assert made.size == 262
    assert np.flatnonzero(made.special).tolist() == [256, 257, 258, 259, 260, 261]
    assert made.ordinary.tolist() == list(range(256))
    assert ByteTokenizer().decode([97, made.mask or 0]) == "a\ufffd"


def test_what_is_not_needed_takes_no_row():
    made = vocabulary(ByteTokenizer(), ["end"])
    assert (made.begin, made.end, made.mask, made.sentinels) == (None, 256, None, ())
    assert made.size == 257
    assert vocabulary(ByteTokenizer(), ()).size == 256


@pytest.mark.parametrize("spec", ["gpt2", "gpt1", "wordpiece", "bpe:350", "sentencepiece:360"])
def test_a_tokenizers_own_tokens_are_taken(tmp_path, spec):
    tokenizer = made(spec, tmp_path)
    own = tokenizer.special
    got = vocabulary(tokenizer, ("begin", "end", "mask"), sentinels=2)
    lacking = [name for name in ("begin", "end", "mask") if name not in own]
    for name in ("begin", "end", "mask"):
        fresh = tokenizer.vocab_size + lacking.index(name) if name in lacking else own[name]
        assert getattr(got, name) == fresh
    assert got.size == tokenizer.vocab_size + len(lacking) + 2
    expected = {token for name, token in own.items() if name != "unknown"}
    expected |= set(range(tokenizer.vocab_size, got.size))
    assert set(np.flatnonzero(got.special).tolist()) == expected
    assert got.special.shape == got.edges.before.shape == got.edges.behind.shape == (got.size,)


def test_what_a_vocabulary_cannot_have_is_one_sentence():
    with pytest.raises(InputError, match=r"token 'masks': did you mean mask\?"):
        vocabulary(ByteTokenizer(), ["masks"])
    with pytest.raises(InputError, match="sentinels is -1; it must be at least 0"):
        vocabulary(ByteTokenizer(), (), sentinels=-1)
    with pytest.raises(InputError, match="made without mask"):
        vocabulary(ByteTokenizer(), ["end"]).needed("mask")


TEXT = "the dog, don't lazying 42 (brownish) foxes!"
WORDS = ["the", "dog", ",", "don", "'", "t", "lazying", "42", "(", "brownish", ")", "foxes", "!"]


@pytest.mark.parametrize(
    "spec", ["bytes", "gpt2", "gpt1", "wordpiece", "bpe:350", "sentencepiece:360", "unigram:305"]
)
def test_every_tokenizer_finds_the_same_words(tmp_path, spec):
    assert words(made(spec, tmp_path), TEXT) == WORDS


def test_characters_find_words_too():
    assert words(CharacterTokenizer.train(TEXT), TEXT) == WORDS


@pytest.mark.parametrize("spec", ["bytes", "characters", "gpt2", "bpe:350", "sentencepiece:360"])
def test_words_of_other_scripts(tmp_path, spec):
    # A piece that was learnt is not parted: these Chinese characters are new.
    text = "naïve Zürich Ωμέγα हिन्दी e\u0301a 한국 👍 床前, 字"
    learnt_from = text if spec == "characters" else TRAINED_ON
    found = words(made(spec, tmp_path, learnt_from), text)
    assert found == text.replace("床前,", "床 前 ,").split(" ")


def test_no_word_goes_through_a_special_token():
    made = vocabulary(ByteTokenizer(), ["begin", "end"])
    tokens = np.array([made.begin, 97, 98, made.end, 99, 100])
    assert made.word_starts(tokens).tolist() == [True, True, False, True, True, False]
    assert made.word_starts(tokens[:0]).tolist() == []
    assert made.word_starts(tokens[2:3]).tolist() == [True]  # The first one always.


def test_a_character_is_never_parted():
    tokens = ByteTokenizer().encode("中👍€")
    starts = vocabulary(ByteTokenizer(), ()).word_starts(tokens)
    assert np.flatnonzero(starts).tolist() == [0, 3, 7]
