import hashlib
import io
import json

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizer_texts import NASTY, TRAINED_ON

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

KNOWN = (
    "known are bpe, bytes, characters, gpt1, gpt2, huggingface, sentencepiece, unigram, wordpiece."
)


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
        (1, "at least 293"),
        (261, "at least 293"),
        (292, "at least 293"),
        (400, "at most 363"),
        (10**15, "at most 363"),
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
        ("gpt3", "did you mean gpt2 or gpt1?"),
        ("", KNOWN),
        ("tiktoken:o200k", KNOWN),
        ("bytes:3", "bytes takes no argument."),
        ("characters:", "characters takes no argument."),
        ("sentencepiece", "as in sentencepiece:4096 or sentencepiece:FILE.model."),
        ("sentencepiece:4k", "as in sentencepiece:4096 or sentencepiece:FILE.model."),
        ("unigram", "as in unigram:4096."),
        ("unigram:pieces.model", "as in unigram:4096."),
        ("bpe:", "as in bpe:4096."),
        ("bpe:0", "as in bpe:4096."),
        ("bpe:-5", "as in bpe:4096."),
        ("bpe:4:4", "as in bpe:4096."),
        ("gpt2", "it needs a path, as in gpt2:PATH."),
        ("wordpiece:", "it needs a path, as in wordpiece:PATH."),
    ],
)
def test_a_spec_of_another_form_is_one_sentence(spec, end):
    with pytest.raises(InputError) as error:
        train_tokenizer(spec, TRAINED_ON)
    sentence = str(error.value)
    assert sentence.startswith(f"data.tokenizer is {spec!r}: ")
    assert sentence.endswith(end)
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("spec", "file"),
    [
        ("bytes", "bytes.txt"),
        ("characters", "characters.json"),
        ("sentencepiece:360", "tokenizer.model"),
        ("unigram:305", "tokenizer.model"),
        ("bpe:350", "tokenizer.json"),
    ],
)
def test_a_saved_tokenizer_gives_the_same_ids(spec, file, tmp_path):
    tokenizer = train_tokenizer(spec, TRAINED_ON)
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {file, "tokenizer_kind.json"}
    assert loaded.name == tokenizer.name == spec
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.special == tokenizer.special
    assert loaded.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(loaded.encode(TRAINED_ON), tokenizer.encode(TRAINED_ON))


@pytest.mark.parametrize("spec", ["sentencepiece:340", "unigram:305", "bpe:340"])
def test_training_twice_gives_the_same_fingerprint(spec):
    first, second = (train_tokenizer(spec, TRAINED_ON).fingerprint for _ in range(2))
    assert first == second
    assert first != train_tokenizer(spec, TRAINED_ON + "Another text." * 30).fingerprint


@pytest.mark.parametrize("kind", ["sentencepiece", "unigram"])
def test_sentencepiece_has_the_special_tokens_that_objectives_need(kind):
    tokenizer = SentencePieceTokenizer.train(TRAINED_ON, 305, kind)
    assert tokenizer.special == {"unknown": 0, "begin": 1, "end": 2, "pad": 3, "mask": 4}
    dog = tokenizer.encode("dog").tolist()
    assert tokenizer.decode([1, *dog, 2, 3, 0, *dog, 4]) == "dog\ufffddog"


def test_tokenizers_without_learning_have_no_special_tokens():
    for tokenizer in (ByteTokenizer(), CharacterTokenizer("ab")):
        assert tokenizer.special == {}
        assert tokenizer.end_token is None


def test_what_a_run_keeps_is_what_others_call_by_that_name(sentencepiece, tmp_path):
    save_tokenizer(sentencepiece, tmp_path)
    bpe = train_tokenizer("bpe:350", TRAINED_ON)
    save_tokenizer(bpe, tmp_path)
    for spec, tokenizer in (
        (f"huggingface:{tmp_path}", bpe),
        (f"sentencepiece:{tmp_path / 'tokenizer.model'}", sentencepiece),
    ):
        read = train_tokenizer(spec, "")
        assert read.encode(TRAINED_ON).tolist() == tokenizer.encode(TRAINED_ON).tolist()


def test_a_damaged_tokenizer_is_refused(sentencepiece, tmp_path):
    save_tokenizer(sentencepiece, tmp_path)
    path = tmp_path / "tokenizer.model"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"tokenizer\.model is damaged: it is not the file that was saved there"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("missing", ["tokenizer_kind.json", "bytes.txt"])
def test_a_missing_tokenizer_file_is_named(missing, tmp_path):
    save_tokenizer(ByteTokenizer(), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(InputError, match=rf"{missing}: no tokenizer is saved here\.$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tokenizer": 3}', '{"tokenizer": "bytes"}'])
def test_a_description_without_a_tokenizer_is_refused(content, tmp_path):
    save_tokenizer(ByteTokenizer(), tmp_path)
    (tmp_path / "tokenizer_kind.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer_kind\.json does not name a tokenizer\.$"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_an_unknown_kind_is_refused(tmp_path):
    save_tokenizer(ByteTokenizer(), tmp_path)
    description = json.loads((tmp_path / "tokenizer_kind.json").read_text())
    (tmp_path / "tokenizer_kind.json").write_text(json.dumps({**description, "tokenizer": "gpt5"}))
    with pytest.raises(InputError, match="names the tokenizer 'gpt5': did you mean gpt2 or gpt1"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "sentence"),
    [
        ("characters", "characters.json", "does not hold the characters of a tokenizer"),
        ("unigram:305", "tokenizer.model", "is not a SentencePiece model"),
        ("gpt2", "tokenizer.json", "is not a tokenizer of the tokenizers library: .+"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"\xff\x00", b'{"model": 3}'])
def test_a_file_of_another_kind_is_refused(tmp_path, name, file, sentence, content):
    (tmp_path / file).write_bytes(content)
    description = {"tokenizer": name, "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "tokenizer_kind.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=rf"{file} {sentence}\.$"):
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


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> str:
    """A SentencePiece model file as others train it: it normalises, and puts a space first."""
    path = tmp_path_factory.mktemp("foreign") / "pieces.model"
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINED_ON.splitlines()),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return str(path)


def test_a_sentencepiece_file_encodes_as_its_own_library_does(foreign):
    tokenizer = train_tokenizer(f"sentencepiece:{foreign}", "")
    text = "The lazy  dog ｊumps▁over"
    reference = SentencePieceProcessor(model_file=foreign)
    assert tokenizer.encode(text).tolist() == reference.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == "The lazy dog jumps over"
    assert tokenizer.special == {"unknown": 0, "begin": 1, "end": 2}
    assert "".join(stream_text(tokenizer, tokenizer.encode(text))) == "The lazy dog jumps over"
    assert tokenizer.decode([*tokenizer.encode("dog"), 0, 999]) == "dog\ufffd\ufffd"


def test_our_own_sentencepiece_file_stays_lossless(sentencepiece, tmp_path):
    path = tmp_path / "pieces.model"
    path.write_bytes(sentencepiece.save())
    read = train_tokenizer(f"sentencepiece:{path}", "")
    assert read.fingerprint == sentencepiece.fingerprint
    for text in NASTY.values():
        assert read.decode(read.encode(text)) == text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "cannot read .*: No such file"), (b"", "is not a"), (b"\xffmodel", "is not a")],
)
def test_a_missing_or_damaged_sentencepiece_file_is_one_sentence(tmp_path, content, sentence):
    path = tmp_path / "pieces.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^data.tokenizer: .*{sentence}.*\.$"):
        train_tokenizer(f"sentencepiece:{path}", "")


@pytest.mark.parametrize("spec", ["bytes", "characters", "bpe:270", "sentencepiece:290"])
def test_the_bytes_of_tokens_are_those_of_the_text(spec):
    text = "Here, 中文 é and \U0001f600 end. " * 4
    tokenizer = train_tokenizer(spec, text)
    found = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text).tolist()))
    assert found == text.encode("utf-8")


def test_a_sentencepiece_file_whose_pieces_are_no_text_is_one_sentence(sentencepiece, tmp_path):
    path = tmp_path / "pieces.model"
    path.write_bytes(sentencepiece.save().replace("中".encode(), b"\xff\xff\xff"))
    with pytest.raises(InputError, match=r"pieces\.model is not a SentencePiece model\.$"):
        train_tokenizer(f"sentencepiece:{path}", "")
