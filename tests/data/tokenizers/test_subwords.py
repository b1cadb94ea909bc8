"""Byte-level BPE, GPT-1's BPE and WordPiece: published vocabularies, tiny ones, and bad files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from conftest import ROOT
from tokenizer_texts import NASTY, TRAINED_ON, write_gpt1, write_gpt2, write_wordpiece

from gptjax.config import InputError
from gptjax.data.tokenizers import (
    SubwordTokenizer,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    stream_text,
    subwords,
    train_tokenizer,
)

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason="shared/ (published vocabularies) is not there"
)

WRITERS = {"gpt2": write_gpt2, "gpt1": write_gpt1, "wordpiece": write_wordpiece}
MARKS = "<s></s><pad><mask><unk> [CLS][SEP][PAD][MASK][UNK] <|endoftext|>"


def library_of(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer.save().decode())


@needs_shared
@pytest.mark.parametrize(
    ("spec", "vocab_size", "special", "text", "tokens"),
    [
        (
            f"gpt2:{SHARED / 'gpt2_bpe'}",
            50257,
            {"end": 50256},
            "Hello world",
            [15496, 995],
        ),
        (
            f"gpt1:{SHARED / 'gpt1'}",
            40478,
            {"unknown": 0},
            "Hello world!",
            [3570, 1276, 267],
        ),
        (
            f"wordpiece:{SHARED / 'bert_vocab'}",
            30522,
            {"pad": 0, "unknown": 100, "begin": 101, "end": 102, "mask": 103},
            "hello world",
            [101, 7592, 2088, 102],
        ),
    ],
)
def test_published_vocabularies_give_their_known_ids(spec, vocab_size, special, text, tokens):
    tokenizer = train_tokenizer(spec, "")
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.special == special
    assert tokenizer.encode(text).tolist() == tokens
    assert tokenizer.encode(text).dtype == np.int32
    between = set(tokenizer.encode(MARKS).tolist()) - {special.get("unknown")}
    frame = {tokens[0], tokens[-1]} & set(special.values())
    assert between & set(special.values()) == frame


@needs_shared
def test_gpt2_is_lossless_and_streams_whole_characters():
    tokenizer = train_tokenizer(f"gpt2:{SHARED / 'gpt2_bpe'}", "")
    for text in [*NASTY.values(), TRAINED_ON, MARKS]:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        parts = list(stream_text(tokenizer, tokens))
        assert "".join(parts) == text
        assert sum(part.count("\ufffd") for part in parts) == text.count("\ufffd")


def test_bytes_are_joined_as_the_text_taught():
    tokenizer = train_tokenizer("bpe:350", TRAINED_ON)
    assert tokenizer.vocab_size == 350
    assert tokenizer.special == {"begin": 0, "end": 1, "pad": 2, "mask": 3}
    assert len(tokenizer.encode(TRAINED_ON)) < 0.4 * len(TRAINED_ON.encode("utf-8"))
    assert len(tokenizer.encode(" quick brown")) == 2
    assert tokenizer.decode([0, *tokenizer.encode("dog"), 1, 2, 360, 10**6]) == "dog\ufffd\ufffd"


@pytest.mark.parametrize(
    ("size", "accepted"),
    [(1, "least 260"), (259, "least 260"), (400, "most 293"), (10**15, "most")],
)
def test_a_bpe_size_that_the_text_cannot_satisfy_is_one_sentence(size, accepted):
    text = "The quick brown fox jumps over the lazy dog.\n" * 5
    with pytest.raises(InputError) as error:
        train_tokenizer(f"bpe:{size}", text)
    assert str(error.value).startswith(f"data.tokenizer is 'bpe:{size}': ")
    assert f"the size must be at {accepted}" in str(error.value)
    assert train_tokenizer("bpe:260", text).vocab_size == 260
    assert train_tokenizer("bpe:293", text).vocab_size == 293


def test_gpt2_files_are_read(tmp_path):
    write_gpt2(tmp_path)
    tokenizer = train_tokenizer(f"gpt2:{tmp_path}", "")
    assert tokenizer.special == {"end": tokenizer.vocab_size - 1}
    trained = train_tokenizer("bpe:340", TRAINED_ON)
    # The trained one has its four special tokens first, the files one last.
    assert (tokenizer.encode(TRAINED_ON) + 4).tolist() == trained.encode(TRAINED_ON).tolist()
    assert tokenizer.decode(tokenizer.encode(MARKS)) == MARKS
    assert tokenizer.end_token not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.vocab_size - 1]) == "a"


def test_a_tokenizer_json_gives_what_the_files_give(tmp_path):
    write_gpt2(tmp_path)
    files = train_tokenizer(f"gpt2:{tmp_path}", "")
    (tmp_path / "tokenizer.json").write_bytes(files.save())
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        described = train_tokenizer(f"huggingface:{path}", "")
        assert described.fingerprint == files.fingerprint
        assert described.encode(TRAINED_ON).tolist() == files.encode(TRAINED_ON).tolist()


def test_a_tokenizer_json_neither_cuts_nor_pads_nor_takes_marks_for_tokens(tmp_path):
    content = json.loads(train_tokenizer("bpe:340", TRAINED_ON).save())
    content["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = train_tokenizer(f"huggingface:{tmp_path}", "")
    for text in ("a", TRAINED_ON, MARKS):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert not set(tokens.tolist()) & {0, 1, 2, 3}


def test_a_tokenizer_json_keeps_its_words_that_have_spaces(tmp_path):
    library = library_of(train_tokenizer("bpe:340", TRAINED_ON))
    library.add_tokens([tokenizers.AddedToken("lazy dog.\nThe", normalized=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = train_tokenizer(f"huggingface:{tmp_path}", "")
    text = "The lazy dog.\n" * 50  # Would be cut within that token.
    tokens = tokenizer.encode(text).tolist()
    assert tokens == library.encode(text).ids
    assert tokens.count(340) == 49
    assert tokenizer.vocab_size == 341


def test_gpt1_lowers_and_marks_the_end_of_words(tmp_path):
    write_gpt1(tmp_path)
    tokenizer = train_tokenizer(f"gpt1:{tmp_path}", "")
    pieces = json.loads((tmp_path / "encoder_bpe_40000.json").read_text())
    tokens = tokenizer.encode("The  théme")
    names = ["the</w>", "the", "m", "e</w>"]
    assert tokens.tolist() == [pieces[name] for name in names]
    assert tokenizer.decode(tokens) == "the theme"
    assert tokenizer.decode(tokenizer.encode("the 中 the")) == "the �the"
    assert tokenizer.special == {"unknown": 0}


def test_wordpiece_lowers_and_frames_the_text(tmp_path):
    write_wordpiece(tmp_path)
    tokenizer = train_tokenizer(f"wordpiece:{tmp_path}", "")
    lines = (tmp_path / "vocab.txt").read_text().splitlines()
    tokens = tokenizer.encode("Théme,  dog 中")
    names = ["[CLS]", "the", "##m", "##e", ",", "dog", "[UNK]", "[SEP]"]
    assert [lines[token] for token in tokens] == names
    assert tokenizer.decode(tokens) == "theme, dog \ufffd"
    assert tokenizer.encode("").tolist() == [lines.index("[CLS]"), lines.index("[SEP]")]
    # What is to be continued has no end, and a document of a corpus neither.
    assert tokenizer.encode_prompt("").tolist() == [lines.index("[CLS]")]
    assert [ids.tolist() for ids in tokenizer.encode_documents(["", "dog"])] == [
        [],
        [lines.index("dog")],
    ]
    by_file = train_tokenizer(f"wordpiece:{tmp_path / 'vocab.txt'}", "")
    assert by_file.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("kind", WRITERS)
def test_a_long_text_gives_the_tokens_that_the_library_gives_it_whole(kind, tmp_path, monkeypatch):
    WRITERS[kind](tmp_path)
    tokenizer = train_tokenizer(f"{kind}:{tmp_path}", "")
    assert isinstance(tokenizer, SubwordTokenizer)
    text = TRAINED_ON * 40 + "x" * 40_000 + "\n \n" + " ".join(NASTY.values()) * 60
    expected = library_of(tokenizer).encode(text).ids
    assert tokenizer.encode(text).tolist() == expected
    monkeypatch.setattr(subwords, "PIECE_LENGTH", 1000)
    assert tokenizer.encode(text).tolist() == expected


@pytest.mark.parametrize("kind", WRITERS)
def test_a_saved_tokenizer_needs_its_files_no_more(kind, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    run.mkdir()
    WRITERS[kind](source)
    tokenizer = train_tokenizer(f"{kind}:{source}", "")
    for path in source.iterdir():
        path.unlink()
    save_tokenizer(tokenizer, run)
    loaded = load_tokenizer(run)
    assert loaded.name == kind
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.special == tokenizer.special
    assert loaded.encode(TRAINED_ON).tolist() == tokenizer.encode(TRAINED_ON).tolist()


def test_streamed_words_have_their_spaces(tmp_path):
    write_wordpiece(tmp_path)
    tokenizer = train_tokenizer(f"wordpiece:{tmp_path}", "")
    parts = list(stream_text(tokenizer, tokenizer.encode("the theme, dog")))
    assert parts == ["the", " the", "m", "e", ",", " dog"]


def _drop_last_pairs(path: Path) -> None:
    path.write_text("\n".join(path.read_text().splitlines()[:-3]))


def _not_utf8(path: Path) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


def _cut(path: Path) -> None:
    path.write_text(path.read_text()[:40])


def _remove(path: Path) -> None:
    path.unlink()


def _list(path: Path) -> None:
    path.write_text("[1, 2]")


def _no_bytes(path: Path) -> None:
    vocabulary = json.loads(path.read_text())
    path.write_text(json.dumps({name: id for name, id in vocabulary.items() if name != "é"}))


def _foreign_pair(path: Path) -> None:
    path.write_text(path.read_text() + "q zz\n")


def _not_a_pair(path: Path) -> None:
    path.write_text(path.read_text() + "a b c\n")


def _no_unknown(path: Path) -> None:
    path.write_text(path.read_text().replace("[UNK]", "[UNKNOWN]"))


@pytest.mark.parametrize(
    ("kind", "file", "damage", "sentence"),
    [
        ("gpt2", "encoder.json", _remove, "cannot read {}: No such file or directory"),
        ("gpt2", "vocab.bpe", _remove, "cannot read {}: No such file or directory"),
        ("gpt2", "encoder.json", _cut, "{} is not JSON: "),
        ("gpt2", "encoder.json", _list, "{} does not give tokens their numbers"),
        ("gpt2", "encoder.json", _no_bytes, "{} lacks 1 of the 256 bytes"),
        ("gpt2", "vocab.bpe", _drop_last_pairs, "{} and encoder.json do not belong together: 3 "),
        ("gpt2", "vocab.bpe", _foreign_pair, "is not a tokenizer of the tokenizers library: "),
        ("gpt2", "vocab.bpe", _not_a_pair, "{} has 'a b c' for a pair"),
        ("gpt2", "vocab.bpe", _not_utf8, "{} is not UTF-8"),
        ("gpt1", "encoder_bpe_40000.json", _cut, "{} is not JSON: "),
        ("gpt1", "vocab_40000.bpe", _remove, "cannot read {}: No such file or directory"),
        ("gpt1", "vocab_40000.bpe", _drop_last_pairs, "do not belong together: 3 tokens"),
        ("wordpiece", "vocab.txt", _remove, "cannot read "),
        ("wordpiece", "vocab.txt", _no_unknown, "{} lacks the token [UNK]"),
        ("wordpiece", "vocab.txt", _not_utf8, "{} is not UTF-8"),
    ],
)
def test_missing_and_damaged_files_are_one_sentence(kind, file, damage, sentence, tmp_path):
    WRITERS[kind](tmp_path)
    damage(tmp_path / file)
    with pytest.raises(InputError) as error:
        train_tokenizer(f"{kind}:{tmp_path}", "")
    assert str(error.value).startswith("data.tokenizer: ")
    assert sentence.format(tmp_path / file) in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


REWRITTEN = {
    "Windows' line ends": lambda content: content.replace(b"\n", b"\r\n"),
    "a byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "no last line end": lambda content: content.rstrip(b"\n"),
    "empty lines at the end": lambda content: content + b"\r\n\n",
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("how", REWRITTEN)
def test_files_may_end_their_lines_in_any_way(kind, how, tmp_path):
    WRITERS[kind](tmp_path)
    expected = train_tokenizer(f"{kind}:{tmp_path}", "").fingerprint
    for path in tmp_path.iterdir():
        path.write_bytes(REWRITTEN[how](path.read_bytes()))
    assert train_tokenizer(f"{kind}:{tmp_path}", "").fingerprint == expected


def test_the_number_of_a_line_is_its_id(tmp_path):
    # So google-research/bert has it, tokenization.py: of an empty line, and of the last of equals.
    write_wordpiece(tmp_path)
    lines = (tmp_path / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*lines, "", "dog", "cats"]))
    tokenizer = train_tokenizer(f"wordpiece:{tmp_path}", "")
    assert tokenizer.vocab_size == len(lines) + 3
    assert tokenizer.encode_documents(["dog cats"])[0].tolist() == [len(lines) + 1, len(lines) + 2]


def _added(token: int, content: str) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, "special": True, **flags}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda content: content["model"]["vocab"].update(a=1 << 31),
            "'a' the id 2147483648: it",
        ),
        (lambda content: content["model"]["vocab"].update(a=-1), "is not a tokenizer of .*integer"),
        (lambda content: content["model"]["vocab"].update(a=7), "and '.*' one id, 7"),
        (lambda content: content["model"]["vocab"].update(a="7"), "is not a tokenizer of"),
        (lambda content: content["model"].update(merges=[["q", "zz"]]), "out of vocabulary"),
        (lambda content: content["model"].update(dropout=7), "between 0 and 1"),
        (
            lambda content: content["model"].update(continuing_subword_prefix="#" * 9),
            "continue a word",
        ),
        (lambda content: content["model"].update(continuing_subword_prefix="r"), "continue a"),
        (lambda content: content["added_tokens"].append(_added(7, "<x>")), "in its vocabulary 340"),
        (lambda content: content["added_tokens"].append(_added(9, "<s>")), "in its vocabulary 0"),
        (lambda content: content.update(post_processor=BEYOND), "puts the id 99999 around a text"),
        (lambda content: content.update(normalizer=PANIC), "cannot parse precompiled_charsmap"),
        (lambda content: content.update(model={"type": "WordLevel", "vocab": {}}), "is not a tok"),
        (lambda content: content.update(normalizer=DEEP), "more than 100 deep"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_is_one_sentence(change, sentence, tmp_path, capfd):
    content = json.loads(train_tokenizer("bpe:340", TRAINED_ON).save())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=rf"(?i)^data\.tokenizer: .*json .*{sentence}.*\.$"
    ) as error:
        train_tokenizer(f"huggingface:{tmp_path}", "")
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


BEYOND = {"type": "BertProcessing", "sep": ["</s>", 99999], "cls": ["<s>", 0]}
PANIC = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
DEEP: list = []
for _ in range(200):
    DEEP = [DEEP]


def test_what_a_tokenizer_cannot_encode_is_one_sentence(tmp_path):
    model = {"type": "WordLevel", "vocab": {"dog": 0}, "unk_token": "?"}
    content = {"version": "1.0", "added_tokens": [], "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = train_tokenizer(f"huggingface:{tmp_path}", "")
    assert tokenizer.encode("dog").tolist() == [0]
    with pytest.raises(InputError, match=r"^The tokenizer cannot encode the text: .*\.$"):
        tokenizer.encode("cat")


def test_a_pipe_is_no_tokenizer(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="is not a regular file"):
        train_tokenizer(f"huggingface:{tmp_path}", "")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"model": {}}', b"\xff"])
def test_a_damaged_tokenizer_json_is_one_sentence(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"^data\.tokenizer: .*tokenizer\.json is not .*\.$"):
        train_tokenizer(f"huggingface:{tmp_path}", "")
