import json

import numpy as np
import pytest

from gptjax.config import InputError
from gptjax.data.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    save_tokenizer,
    stream_text,
    train_tokenizer,
)

TRAINED_ON = (
    "The quick brown fox jumps over the lazy dog.\n"
    "\tif indented:\n        return 'four  spaces'\r\n"
    "Zürich, naïve, 中文和汉字, 👍.\n"
) * 20

NASTY = {
    "empty": "",
    "NUL": "\0",
    "NUL within": "before\0after\0",
    "line ends": "\r\n\n\r\r\n",
    "tabs": "\ta\t\tb\t",
    "runs of spaces": "  two   three    four ",
    "only spaces": " " * 7,
    "leading space": " leading",
    "trailing space": "trailing ",
    "no-break space": "a\u00a0b\u3000c\u200b",
    "other line ends": "\x0b\x0c\x1c\x85\u2028\u2029",
    "emoji with joiners": "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈",
    "Chinese": "床前明月光，疑是地上霜。",
    "combining marks": "e\u0301 \u0301 a\u0308\u0323",
    "SentencePiece's space": "▁a▁▁b▁",
    "replacement character": "\ufffd a\ufffd\ufffd中",
    "a piece's name": "<0x41>",
    "mark of the end": "</s>",
    "other marks": "<s><unk><pad>",
    "sign of the unknown": " ⁇ ",
    "byte order mark": "\ufefftext",
    "highest character": "\U0010ffff",
    "never seen in training": "Ωμέγα ქართული 🦆 %^&*",
}


@pytest.fixture(scope="module")
def sentencepiece() -> SentencePieceTokenizer:
    return SentencePieceTokenizer.train(TRAINED_ON, 360)


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_bytes_are_lossless(text):
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == list(text.encode("utf-8"))
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("text", [*NASTY.values(), TRAINED_ON], ids=[*NASTY, "its own"])
def test_sentencepiece_is_lossless(sentencepiece, text):
    tokens = sentencepiece.encode(text)
    assert tokens.dtype == np.int32
    assert sentencepiece.decode(tokens) == text
    assert not {0, 1, 2} & set(tokens.tolist())  # No <unk>, <s> or </s>.


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_characters_are_lossless_on_their_own_text(text):
    tokenizer = CharacterTokenizer.train(text + "a")
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32
    assert len(tokens) == len(text)
    assert tokenizer.decode(tokens) == text


def test_sentencepiece_learns_pieces_longer_than_a_byte(sentencepiece):
    assert sentencepiece.vocab_size == 360
    assert len(sentencepiece.encode(TRAINED_ON)) < 0.6 * len(TRAINED_ON.encode("utf-8"))
    assert len(sentencepiece.encode("中文")) == 2
    assert len(sentencepiece.encode("        return")) <= 6


def test_sentencepiece_drops_no_long_line():
    line = "abcabdabe" * 1000  # SentencePiece's own limit is 4192 bytes.
    tokenizer = SentencePieceTokenizer.train(line, 270)
    assert len(tokenizer.encode(line)) < len(line) / 2


def test_characters_are_in_code_point_order():
    tokenizer = CharacterTokenizer.train("中 ba\n😀")
    assert tokenizer.characters == "\n ab中😀"
    assert tokenizer.encode("ab中😀").tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("unknown", ["\0", "B", "中", "\U0010ffff"])
def test_an_unknown_character_is_named_with_its_place(unknown):
    tokenizer = CharacterTokenizer.train("abc")
    with pytest.raises(InputError) as error:
        tokenizer.encode(f"ab{unknown}c")
    assert str(error.value) == (
        f"The tokenizer has no token for {unknown!r} (character 2 of the text): "
        "it knows the 3 characters of its training text."
    )


def test_ids_past_the_vocabulary_decode_to_the_replacement_character(sentencepiece):
    assert ByteTokenizer().decode([97, 256, 300, 98]) == "a\ufffd\ufffdb"
    assert CharacterTokenizer.train("ab").decode([0, 2, 1]) == "a\ufffdb"
    dog = sentencepiece.encode("dog").tolist()
    assert sentencepiece.decode([*dog, 360, *dog]) == "dog\ufffddog"


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character():
    assert ByteTokenizer().decode([97, 0x80, 98]) == "a\ufffdb"


@pytest.mark.parametrize(
    ("size", "accepted"),
    [
        (1, "at least 291"),
        (259, "at least 291"),
        (290, "at least 291"),
        (400, "at most 361"),
        (10**15, "at most 361"),
    ],
)
def test_a_sentencepiece_size_that_the_text_cannot_satisfy_is_one_sentence(size, accepted):
    text = "The quick brown fox jumps over the lazy dog, 中文 dog.\n" * 3
    with pytest.raises(InputError) as error:
        train_tokenizer(f"sentencepiece:{size}", text)
    assert str(error.value) == (
        f"data.tokenizer is 'sentencepiece:{size}': for this text the size must be {accepted}."
    )
    bound = int(accepted.split()[-1])
    assert train_tokenizer(f"sentencepiece:{bound}", text).vocab_size == bound


@pytest.mark.parametrize("text", ["\n", "\0\0", "▁"])
def test_a_text_without_anything_to_learn_is_one_sentence(text):
    with pytest.raises(InputError, match="the text has nothing that SentencePiece can learn"):
        train_tokenizer("sentencepiece:300", text)


@pytest.mark.parametrize(
    ("spec", "end"),
    [
        ("byte", "did you mean bytes?"),
        ("charcters", "did you mean characters?"),
        ("bpe", "known are bytes, characters, sentencepiece."),
        ("", "known are bytes, characters, sentencepiece."),
        ("bytes:3", "did you mean bytes?"),
        ("sentencepiece", "as in sentencepiece:4096."),
        ("sentencepiece:", "as in sentencepiece:4096."),
        ("sentencepiece:0", "as in sentencepiece:4096."),
        ("sentencepiece:-5", "as in sentencepiece:4096."),
        ("sentencepiece:4k", "as in sentencepiece:4096."),
        ("sentencepiece:4:4", "as in sentencepiece:4096."),
    ],
)
def test_a_spec_of_another_form_is_one_sentence(spec, end):
    with pytest.raises(InputError) as error:
        train_tokenizer(spec, TRAINED_ON)
    sentence = str(error.value)
    assert sentence.startswith(f"data.tokenizer is {spec!r}: ")
    assert sentence.endswith(end)
    assert "\n" not in sentence


@pytest.mark.parametrize("spec", ["bytes", "characters", "sentencepiece:360"])
def test_a_saved_tokenizer_gives_the_same_ids(spec, tmp_path):
    tokenizer = train_tokenizer(spec, TRAINED_ON)
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.name == tokenizer.name == spec
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.end_token == tokenizer.end_token
    np.testing.assert_array_equal(loaded.encode(TRAINED_ON), tokenizer.encode(TRAINED_ON))


def test_training_sentencepiece_twice_gives_the_same_model():
    first, second = (SentencePieceTokenizer.train(TRAINED_ON, 340).save() for _ in range(2))
    assert first == second


def test_a_damaged_tokenizer_is_refused(sentencepiece, tmp_path):
    save_tokenizer(sentencepiece, tmp_path)
    path = tmp_path / "tokenizer.model"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.model is not the file that was saved there"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("missing", ["tokenizer.json", "tokenizer.model"])
def test_a_missing_tokenizer_file_is_named(missing, tmp_path):
    save_tokenizer(ByteTokenizer(), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(InputError, match=rf"{missing}: no tokenizer is saved here\.$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tokenizer": 3}', '{"tokenizer": "bytes"}'])
def test_a_description_without_a_tokenizer_is_refused(content, tmp_path):
    save_tokenizer(ByteTokenizer(), tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json does not name a tokenizer\.$"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_an_unknown_kind_is_refused(tmp_path):
    save_tokenizer(ByteTokenizer(), tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**description, "tokenizer": "gpt2"}))
    with pytest.raises(InputError, match="names the tokenizer 'gpt2': known are bytes"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", [*NASTY.values(), TRAINED_ON], ids=[*NASTY, "its own"])
def test_streamed_text_has_whole_characters_and_adds_up_to_all(sentencepiece, text):
    for tokenizer in (ByteTokenizer(), sentencepiece):
        parts = list(stream_text(tokenizer, tokenizer.encode(text)))
        assert "".join(parts) == text
        genuine = text.count("\ufffd")
        assert sum(part.count("\ufffd") for part in parts) == genuine


def test_text_streams_as_soon_as_a_character_is_whole():
    arrived = []

    def tokens():
        for token in ByteTokenizer().encode("a中b"):
            arrived.append(token)
            yield token

    seen = [(text, len(arrived)) for text in stream_text(ByteTokenizer(), tokens())]
    assert seen == [("a", 1), ("中", 4), ("b", 5)]


def test_streamed_bytes_that_are_no_text_add_up_to_what_decode_gives():
    tokens = [0x80, 0x80, 0x80, *"中".encode(), 0xFF, 97, 0xE4, 0xB8]
    parts = list(stream_text(ByteTokenizer(), tokens))
    assert "".join(parts) == ByteTokenizer().decode(tokens)
