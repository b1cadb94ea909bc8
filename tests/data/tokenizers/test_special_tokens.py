"""What begins, ends and pads a text, as the files beside a tokenizer.json say it."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizer_texts import TRAINED_ON

from gptjax.config import InputError
from gptjax.data.corpus import Text
from gptjax.data.objectives.vocabulary import vocabulary
from gptjax.data.storage.cache import open_store
from gptjax.data.tokenizers import (
    SubwordTokenizer,
    load_tokenizer,
    read_huggingface,
    save_tokenizer,
    stream_text,
    train_tokenizer,
)
from gptjax.data.tokenizers.special import DecodingTokens, read_decoding_tokens

NAMES = ["<|go|>", "<|stop|>", "<|fill|>", "<|what|>"]
GO, STOP, FILL, WHAT = range(340, 344)


@pytest.fixture(scope="module")
def trained() -> SubwordTokenizer:
    return SubwordTokenizer.train(TRAINED_ON, 340)


@pytest.fixture
def directory(tmp_path: Path, trained) -> Path:
    """A byte-level tokenizer.json of 340 tokens and four more, of which nothing says what for."""
    library = tokenizers.Tokenizer.from_str(trained.save().decode())
    library.add_special_tokens(NAMES[:3])
    library.add_tokens(NAMES[3:])
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def _write(directory: Path, **files: object) -> None:
    """JSON files by their names without .json."""
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, DecodingTokens()),
        ({"config": {"eos_token_id": 3}}, DecodingTokens(ends=(3,))),
        ({"config": {"eos_token_id": None, "bos_token_id": 0}}, DecodingTokens(begin=0)),
        ({"config": {"eos_token_id": [3, 5, 3]}}, DecodingTokens(ends=(3, 5))),
        (
            {"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": [7, 5]}},
            DecodingTokens(ends=(7, 5)),
        ),
        (
            {"config": {"eos_token_id": 3, "pad_token_id": 2}, "generation_config": {}},
            DecodingTokens(ends=(3,), pad=2),
        ),
        # No row of the model: old Llamas have -1 for no padding, tiny ones the ids of large ones.
        (
            {"config": {"eos_token_id": 50256, "pad_token_id": -1, "bos_token_id": 10}},
            DecodingTokens(),
        ),
        (
            {"config": {"decoder_start_token_id": 9, "pad_token_id": 9, "eos_token_id": 0}},
            DecodingTokens(ends=(0,), pad=9, start=9),
        ),
    ],
)
def test_generation_config_goes_before_config(files, expected, tmp_path):
    _write(tmp_path, **files)
    tokens = read_decoding_tokens(tmp_path, 10)
    assert tokens == expected
    # What is written is read back.
    _write(tmp_path, generation_config=tokens.fields())
    assert read_decoding_tokens(tmp_path, 10) == expected


@pytest.mark.parametrize("value", ["</s>", 1.0, True, [1, None], {"id": 1}])
def test_what_is_no_id_is_one_sentence(value, tmp_path):
    _write(tmp_path, config={"eos_token_id": value})
    with pytest.raises(InputError, match=r"config\.json: eos_token_id is .* a list of them, or "):
        read_decoding_tokens(tmp_path, 10)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"eos_token": "<|stop|>"}}, {"end": STOP}),
        ({"tokenizer_config": {"eos_token": {"content": "<|stop|>"}}}, {"end": STOP}),
        ({"special_tokens_map": {"eos_token": {"content": "<|stop|>"}}}, {"end": STOP}),
        ({"config": {"eos_token_id": [STOP, WHAT]}}, {"end": STOP}),
        ({"config": {"eos_token_id": [WHAT, STOP]}}, {"end": WHAT}),
        ({"generation_config": {"eos_token_id": STOP}}, {"end": STOP}),
        ({"config": {"decoder_start_token_id": FILL}}, {"start": FILL}),
        (  # As transformers: the map is older, and counts where the config is as old.
            {
                "tokenizer_config": {"eos_token": "<|fill|>"},
                "special_tokens_map": {"eos_token": "<|stop|>"},
                "config": {"eos_token_id": GO},
            },
            {"end": STOP},
        ),
        (
            {
                "tokenizer_config": {"eos_token": "<|stop|>", "added_tokens_decoder": {}},
                "special_tokens_map": {"eos_token": "<|fill|>"},
            },
            {"end": STOP},
        ),
        (
            {
                "tokenizer_config": {
                    "bos_token": "<|go|>",
                    "eos_token": "<|stop|>",
                    "pad_token": "<|fill|>",
                    "unk_token": "<|what|>",
                }
            },
            {"begin": GO, "end": STOP, "pad": FILL, "unknown": WHAT},
        ),
        ({"tokenizer_config": {"cls_token": "<|go|>", "sep_token": "<|stop|>"}}, None),
        # What the vocabulary lacks is none of its tokens.
        ({"tokenizer_config": {"eos_token": "<|none|>", "pad_token": None}}, {}),
    ],
)
def test_files_beside_a_tokenizer_name_its_tokens(files, expected, directory, trained):
    _write(directory, **files)
    expected = {"begin": GO, "end": STOP} if expected is None else expected
    tokenizer = read_huggingface(directory)
    assert tokenizer.special == trained.special | expected
    assert tokenizer.declared == expected
    # The names in a text are text, whatever the flags of the tokens.
    text = "a <|go|><|stop|><|fill|> b"
    assert not set(tokenizer.encode(text).tolist()) & set(expected.values())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    shown = [token for name, token in expected.items() if name != "unknown"]
    assert tokenizer.decode([*tokenizer.encode("dog"), *shown]) == "dog"


@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map", "config"])
@pytest.mark.parametrize("content", ["[]", '{"eos_token', "[" * 100_000, '{"eos_token": 7}'])
def test_a_damaged_file_beside_a_tokenizer_is_one_sentence(file, content, directory):
    path = directory / f"{file}.json"
    path.write_text(content.replace("eos_token", "eos_token_id") if file == "config" else content)
    if content == '{"eos_token": 7}' and file == "config":
        assert read_huggingface(directory).special["end"] == 7
        return
    with pytest.raises(InputError, match=r"\.json( is not|: eos_token is 7| holds list)") as error:
        read_huggingface(directory)
    assert "\n" not in str(error.value)


def test_an_end_that_is_the_unknown_token_too_has_no_text(directory):
    # So GPT-2's tokenizer_config.json has it.
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|stop|>")
    _write(directory, tokenizer_config=named)
    tokenizer = read_huggingface(directory)
    assert tokenizer.special["end"] == tokenizer.special["unknown"] == STOP
    assert tokenizer.decode([*tokenizer.encode("dog"), STOP]) == "dog"


def test_the_models_own_unknown_token_may_have_any_name():
    content = {"type": "WordLevel", "vocab": {"dog": 0, "?": 1}, "unk_token": "?"}
    tokenizer = SubwordTokenizer(_described(content), "huggingface")
    assert tokenizer.special == {"unknown": 1}
    assert tokenizer.decode(tokenizer.encode("dog cat")) == "dog \ufffd"


def _described(model: dict, **steps: object) -> bytes:
    words = {"pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}
    return json.dumps({"version": "1.0", **words, "model": model, **steps}).encode()


def test_a_saved_tokenizer_keeps_what_was_declared(directory, tmp_path_factory, trained):
    plain = read_huggingface(directory)
    _write(directory, tokenizer_config={"eos_token": "<|stop|>"})
    tokenizer = read_huggingface(directory)
    assert tokenizer.fingerprint != plain.fingerprint
    run = tmp_path_factory.mktemp("run")
    save_tokenizer(tokenizer, run)
    loaded = load_tokenizer(run)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.special == tokenizer.special
    description = json.loads((run / "tokenizer_kind.json").read_text())
    (run / "tokenizer_kind.json").write_text(json.dumps({**description, "special": {"end": 3}}))
    with pytest.raises(InputError, match="is not the file that was saved there"):
        load_tokenizer(run)
    # What says nothing new changes nothing, and runs of before go on.
    _write(directory, tokenizer_config={"eos_token": "</s>", "pad_token": "<pad>"})
    assert read_huggingface(directory).fingerprint == plain.fingerprint


def test_documents_end_with_the_declared_end(directory, tmp_path_factory):
    _write(directory, tokenizer_config={"eos_token": "<|stop|>"})
    tokenizer = train_tokenizer(f"huggingface:{directory}", "")
    store = open_store(Text("dog", ""), tokenizer, tmp_path_factory.mktemp("cache"))
    assert store.tokens[:].tolist() == [*tokenizer.encode("dog").tolist(), STOP]
    assert vocabulary(tokenizer, ("begin", "end")).end == STOP


def test_an_encoder_decoder_begins_as_its_files_say(directory):
    _write(directory, config={"decoder_start_token_id": FILL, "eos_token_id": STOP})
    words = vocabulary(read_huggingface(directory), ("begin", "end"))
    assert (words.begin, words.end, words.size) == (FILL, STOP, 344)
    assert np.flatnonzero(words.special).tolist() == [0, 2, 3, STOP, FILL]


def test_a_word_of_the_byte_alphabet_is_itself(trained, tmp_path):
    library = tokenizers.Tokenizer.from_str(trained.save().decode())
    words = ["schÖn", "čau", "đem", "日本", "ÖÖ"]
    flags = {"single_word": True, "lstrip": True, "rstrip": True, "normalized": False}
    library.add_tokens([*words, tokenizers.AddedToken("naïve", **flags)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_huggingface(tmp_path)
    for text in [*words, "naïve", "schÖn čau! đem日本, ÖÖ", "ein schÖner Tag"]:
        tokens = tokenizer.encode(text)
        assert max(tokens) >= 340
        assert tokenizer.decode(tokens) == text
        assert "".join(stream_text(tokenizer, tokens)) == text
    # Half a character before it stays half a character.
    assert tokenizer.decode([trained.encode("床")[0], *tokenizer.encode("čau")]) == "\ufffdčau"


def test_an_added_token_that_is_another_piece_too_is_refused(trained, tmp_path):
    content = json.loads(trained.save())
    piece = content["model"]["vocab"]["Ö"]
    added = {**content["added_tokens"][0], "id": piece, "content": "Ö", "special": False}
    _write(tmp_path, tokenizer={**content, "added_tokens": [*content["added_tokens"], added]})
    with pytest.raises(InputError, match="'Ö', which is also a piece of other bytes"):
        read_huggingface(tmp_path)


def test_nothing_is_drawn_at_random(trained, tmp_path):
    content = json.loads(trained.save())
    content["model"]["dropout"] = 0.5
    _write(tmp_path, tokenizer=content)
    tokenizer = read_huggingface(tmp_path)
    expected = trained.encode(TRAINED_ON).tolist()
    for _ in range(3):
        assert tokenizer.encode(TRAINED_ON).tolist() == expected
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).encode(TRAINED_ON).tolist() == expected
