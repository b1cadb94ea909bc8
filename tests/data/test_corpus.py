"""A run's data, opened: what trains, what validates, what is refused."""

import contextlib
import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from gptjax.config import (
    DataConfig,
    ExperimentConfig,
    InputError,
    TransformerConfig,
    with_vocabulary,
)
from gptjax.data import corpus as corpus_module
from gptjax.data.batch import Batch
from gptjax.data.corpus import Corpus, Predicted, learn_tokenizer, open_corpus, open_sources
from gptjax.data.objectives.vocabulary import vocabulary
from gptjax.data.pipeline import EvaluationBatches, bits_per_byte, training_batches
from gptjax.data.sources import files
from gptjax.data.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    Tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

PAIRS = {"token_types": 2, "encoder_heads": "pretraining"}


def written(directory: Path, *lines: str, name: str = "text.txt", how: str = "line") -> str:
    path = directory / name
    path.write_text("".join(f"{line}\n" for line in lines))
    return f"{path}#documents={how}"


def single(directory: Path, text: str) -> str:
    (directory / "text.txt").write_text(text)
    return str(directory / "text.txt")


def texts(documents) -> list[str]:
    return [documents[number] for number in range(len(documents))]


def opened(data: DataConfig, tokenizer: Tokenizer | None = None, context_length: int = 4, **model):
    tokenizer = tokenizer or ByteTokenizer()
    config = TransformerConfig(context_length=context_length, **model)
    return open_corpus(open_sources(data), tokenizer, data, config)


def refusal(data: DataConfig, **model) -> str:
    with pytest.raises(InputError) as error:
        opened(data, **model)
    assert "\n" not in str(error.value)
    return str(error.value)


def predictions(corpus: Corpus) -> int:
    batches = EvaluationBatches(corpus.validation, 3)
    return int(sum(batches[number].loss_weights.sum() for number in range(len(batches))))


@pytest.mark.parametrize("fraction", [0.25, 0.1, 0.99, 0.001])
def test_the_last_documents_validate_and_never_all_of_them(tmp_path, fraction):
    lines = [f"line {number}" for number in range(20)]
    data = DataConfig(source=(written(tmp_path, *lines),), validation_fraction=fraction)
    sources = open_sources(data)
    train, validation = texts(sources.train[0]), texts(sources.validation[0])
    assert train + validation == [line + end for line in lines for end in ("",)]
    assert len(validation) == {0.25: 5, 0.1: 2, 0.99: 19, 0.001: 1}[fraction]


def test_a_single_text_is_parted_between_two_characters(tmp_path):
    text = "中文" * 100 + "x"
    data = DataConfig(source=(single(tmp_path, text),), validation_fraction=0.3)
    sources = open_sources(data)
    train, validation = sources.train[0][0], sources.validation[0][0]
    assert train + validation == text
    assert len(train) == 140
    corpus = opened(data)
    assert ByteTokenizer().decode(corpus.stores[0].tokens[:]) == train


def test_sources_that_validate_leave_the_others_whole(tmp_path):
    first = written(tmp_path, "abcde", "fghij", name="a.txt")
    second = written(tmp_path, "klmno", "p", name="b.txt")
    sources = open_sources(DataConfig(source=(first,), validation=(second,)))
    assert texts(sources.train[0]) == ["abcde", "fghij"]
    assert texts(sources.validation[0]) == ["klmno", "p"]


def test_another_text_another_way_or_another_share_is_another_fingerprint(tmp_path):
    def fingerprint(*lines: str, how: str = "line", fraction: float = 0.5) -> str:
        source = written(tmp_path, *lines, how=how)
        data = DataConfig(source=(source,), validation_fraction=fraction)
        return open_sources(data).fingerprint

    lines = ["ab", "", "cd", "ef"]
    several = [
        fingerprint(*lines),
        fingerprint("ab", "", "cd", "eg"),
        fingerprint(*lines, how="block"),
        fingerprint(*lines, fraction=0.25),
    ]
    assert len(set(several)) == 4
    assert fingerprint(*lines) == several[0]


def learnt(data: DataConfig) -> Tokenizer:
    return learn_tokenizer(data, open_sources(data))


@pytest.mark.parametrize(
    ("more", "ends"),
    [
        ({}, True),
        ({"packing": "first_fit"}, True),
        ({"streaming": True}, True),
        ({"objective": "masked_lm"}, True),
        ({"objective": "masked_lm", "packing": "first_fit"}, False),
        ({"objective": "next_sentence"}, False),
    ],
)
@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_bytes_and_characters_end_documents_that_are_several(tmp_path, kind, more, ends):
    data = DataConfig(source=(written(tmp_path, *["ab"] * 9, "c"),), tokenizer=kind, **more)
    tokenizer, size = learnt(data), {"bytes": 256, "characters": 3}[kind]
    assert tokenizer.end_token == (size if ends else None)
    assert tokenizer.vocab_size == size + ends
    (tmp_path / "saved").mkdir()
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.end_token, again.vocab_size) == (tokenizer.end_token, tokenizer.vocab_size)
    assert again.fingerprint == tokenizer.fingerprint
    tokens = [*tokenizer.encode("ab"), *([size] if ends else []), *tokenizer.encode("c")]
    assert again.decode(tokens) == "abc"
    assert again.decode([size + 1]) == "\ufffd"
    edges = vocabulary(tokenizer, ()).edges
    assert len(edges.before) == len(edges.behind) == size + ends


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_a_single_text_has_no_end_token_and_keeps_its_vocabulary(tmp_path, kind):
    data = DataConfig(source=(single(tmp_path, "abc" * 9),), tokenizer=kind)
    tokenizer = learnt(data)
    assert tokenizer.end_token is None
    assert opened(data, tokenizer).vocabulary.size == {"bytes": 256, "characters": 3}[kind]
    assert tokenizer.save() == {"bytes": b"", "characters": b'"abc"'}[kind]  # As it always was.


def test_the_pieces_of_a_long_file_are_one_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "CHUNK", 8)
    data = DataConfig(source=(single(tmp_path, "abc\ndef\n" * 9),))
    tokenizer = learnt(data)
    assert tokenizer.end_token is None
    corpus = opened(data, tokenizer)
    assert ByteTokenizer().decode(corpus.stores[0].tokens[:]) == "abc\ndef\n" * 8
    assert capsys.readouterr().err == ""
    (tmp_path / "other.txt").write_text("ghi")
    assert learnt(DataConfig(source=(f"{tmp_path}/*.txt",))).end_token == 256


def test_lines_of_bytes_stand_apart_in_rows_and_their_ends_are_predicted(tmp_path, capsys):
    data = DataConfig(source=(written(tmp_path, "ab", "", "c", "de", "f"),))
    corpus = opened(data, learnt(data), context_length=6)
    row = corpus.train[0].row(0)
    assert row.tokens.tolist() == [*b"ab", 256, *b"c", 256, *b"d"]
    assert row.targets.tolist() == [*b"b", 256, *b"c", 256, *b"de"]
    assert corpus.vocabulary.size == 257
    assert corpus.vocabulary.special.tolist() == [False] * 256 + [True]
    assert capsys.readouterr().err == ""


def test_documents_that_run_together_are_said(tmp_path, capsys):
    source = (written(tmp_path, *["abc"] * 9, "defgh", name="lines.txt"),)
    opened(DataConfig(source=source))  # With bytes that were saved without an end token.
    said = capsys.readouterr().err
    assert said.startswith("data.tokenizer: bytes has no end token, so that documents run together")
    assert said.count("\n") == 1
    opened(DataConfig(source=source, packing="first_fit"))
    opened(DataConfig(source=(single(tmp_path, "abc" * 9),)))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("packing", ["split", "first_fit"])
def test_bits_per_byte_of_a_single_text_by_hand(tmp_path, packing):
    # Validation is "中文ab": four characters, eight bytes, of which the first character is given.
    text = "中文ab" * 10
    data = DataConfig(source=(single(tmp_path, text),), packing=packing)
    corpus = opened(data, CharacterTokenizer.train(text))
    assert corpus.predicted == Predicted(tokens=3, bytes=5)
    assert predictions(corpus) == 3
    assert corpus.predicted is not None
    # 3 predictions of ln 2 nats are 3 bits, over 5 bytes.
    assert bits_per_byte(corpus.predicted, math.log(2)) == pytest.approx(3 / 5)


@pytest.mark.parametrize("spec", ["bytes", "sentencepiece:265"])
def test_a_first_character_of_several_tokens_counts_by_the_byte(tmp_path, spec):
    # Validation is "éb": the first token is the first byte of é, the rest is to be predicted.
    data = DataConfig(source=(single(tmp_path, "ab" * 49 + "éb"),), validation_fraction=0.02)
    corpus = opened(data, train_tokenizer(spec, "ab" * 200))
    assert corpus.predicted is not None
    ends = int(spec != "bytes")  # SentencePiece's end token is predicted too.
    assert corpus.predicted == Predicted(tokens=2 + ends, bytes=2)
    assert predictions(corpus) == 2 + ends


def test_of_documents_side_by_side_each_has_a_first_token_that_is_given(tmp_path):
    validation = written(tmp_path, "中a", "", "éé", "b", name="b.txt")
    data = DataConfig(source=(written(tmp_path, "中aéb", "中"),), validation=(validation,))
    characters = CharacterTokenizer.train("中aéb")
    # One after another: 中 is given, and a, é, é and b are predicted.
    split = opened(data, characters)
    assert split.predicted == Predicted(tokens=4, bytes=6)
    # Side by side: 中, é and b are given.
    beside = opened(dataclasses.replace(data, packing="first_fit"), characters)
    assert beside.predicted == Predicted(tokens=2, bytes=3)
    assert predictions(split), predictions(beside) == (4, 2)


def test_no_bits_per_byte_where_no_text_is_predicted_from_end_to_end(tmp_path):
    data = DataConfig(source=(written(tmp_path, "abcdef", "ghi"),), objective="masked_lm")
    assert opened(data, family="encoder").predicted is None


def test_texts_of_different_lengths_are_no_pairs(tmp_path):
    source = written(tmp_path, "a", "b", name="a.txt")
    target = written(tmp_path, "a", "b", "c", name="b.txt")
    expected = f"data.target: {target} has 3 documents where {source} has 2."
    data = DataConfig(source=(source,), target=(target,), objective="sequence_to_sequence")
    assert refusal(data) == expected
    validating = {"validation": (source,), "validation_target": (target,)}
    data = dataclasses.replace(data, target=(source,), **validating)
    assert refusal(data) == expected


def pairs(directory: Path, sources: list[str], targets: list[str], **more) -> DataConfig:
    """Pairs that train, and ("ab", "cd") that validates."""
    return DataConfig(
        source=(written(directory, *sources, name="source.txt"),),
        target=(written(directory, *targets, name="target.txt"),),
        validation=(written(directory, "ab", name="valid.txt"),),
        validation_target=(written(directory, "cd", name="valid_target.txt"),),
        objective="sequence_to_sequence",
        **more,
    )


def test_pairs_that_are_empty_or_too_long_are_left_out_and_the_others_in_their_bucket(tmp_path):
    sources = ["ab", "", "c", "d" * 15, "e" * 16, "f" * 9, "g", "h", "i"]
    targets = ["x", "x", "", "y", "z", "t", "u" * 16, "v", "w"]
    data = pairs(tmp_path, sources, targets, buckets=2)
    corpus = opened(data, family="encoder_decoder", context_length=16)
    assert [len(bucket) for bucket in corpus.train] == [3, 2]
    words = corpus.vocabulary
    rows = [bucket.row(number) for bucket in corpus.train for number in range(len(bucket))]
    assert [row.tokens.shape for row in rows] == [(8,)] * 3 + [(16,)] * 2
    first = rows[0]
    assert first.source is not None
    assert first.source.tolist() == [97, 98, words.end, *[0] * 5]
    assert first.tokens.tolist() == [words.begin, ord("x"), *[0] * 6]
    assert first.targets[:2].tolist() == [ord("x"), words.end]
    assert first.loss_weights.tolist() == [1, 1, *[0] * 6]


def test_pairs_none_of_which_fits_are_refused(tmp_path):
    data = pairs(tmp_path, ["a" * 16, ""], ["b", "c"])
    said = refusal(data, family="encoder_decoder", context_length=16)
    assert said == "data.source: no pair fits a context of 16 tokens."
    data = pairs(tmp_path, ["ab", "c"], ["b", "c"])
    (tmp_path / "valid.txt").write_text("too long for it\n")
    said = refusal(data, family="encoder_decoder", context_length=8)
    assert said == (
        f"data.source: the validation part of {data.validation[0]} has no pair that fits a context "
        "of 8 tokens."
    )


def test_two_single_texts_are_no_pairs(tmp_path):
    path = single(tmp_path, "one text\n" * 9)
    said = refusal(DataConfig(source=(path,), target=(path,), objective="sequence_to_sequence"))
    assert said.startswith(f"data.source: {path} is a single document, and ")
    assert said.endswith("; see #documents=line.")


@pytest.mark.parametrize(
    ("more", "family", "needs"),
    [
        ({}, "decoder", "training part of {} has 9 tokens and fills no row; a context of 9 needs "
                        "at least 10"),
        ({"validation_fraction": 0.5, "context_length": 3}, "decoder", None),
        ({"validation_fraction": 0.1, "context_length": 3}, "decoder",
         "validation part of {} has 1 tokens and fills no row; a context of 3 needs at least 2"),
        ({"objective": "prefix", "context_length": 5}, "encoder_decoder",
         "validation part of {} has 1 tokens and fills no row; a context of 5 needs at least 5"),
        ({"objective": "masked_lm", "context_length": 5}, "encoder", None),
    ],
)  # fmt: skip
def test_a_source_that_fills_no_row_is_refused_with_what_it_needs(tmp_path, more, family, needs):
    path = single(tmp_path, "abcdefghij")
    context_length = more.pop("context_length", 9)
    data = DataConfig(source=(path,), **more)
    if needs is None:
        assert opened(data, family=family, context_length=context_length).validation
    else:
        said = refusal(data, family=family, context_length=context_length)
        assert said == f"data.source: the {needs.format(path)}."


def test_documents_of_one_token_side_by_side_predict_nothing(tmp_path):
    data = DataConfig(source=(written(tmp_path, *"abcdef"),), packing="first_fit")
    assert refusal(data).endswith("a context of 4 needs at least 2 in a document.")


def test_the_source_of_several_that_fills_no_row_is_named(tmp_path):
    first = written(tmp_path, *["abcdef"] * 9, name="a.txt")
    second = written(tmp_path, "a", "bcdef", name="b.txt")
    said = refusal(DataConfig(source=(first, second)))
    assert said.startswith(f"data.source: the training part of {second} has 1 tokens and ")


@pytest.mark.parametrize("context_length", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("objective", "family"),
    [("masked_lm", "encoder"), ("next_sentence", "encoder"), ("prefix", "encoder_decoder"),
     ("span_corruption", "encoder_decoder"), ("causal", "decoder")],
)  # fmt: skip
def test_a_short_context_is_taken_or_refused_with_a_sentence(
    tmp_path, objective, family, context_length
):
    data = DataConfig(source=(written(tmp_path, *["abcdef"] * 9),), objective=objective)
    more = PAIRS if objective == "next_sentence" else {}
    with contextlib.suppress(InputError):
        corpus = opened(data, family=family, context_length=context_length, **more)
        batch = next(training_batches(corpus.train, batch_size=2, seed=0))
        assert batch.tokens.shape[1] <= max(context_length, 2)
        assert batch.loss_weights.any()


def test_an_objective_that_the_model_cannot_be_asked_is_refused(tmp_path):
    source = (written(tmp_path, *["abcdef"] * 9),)
    assert refusal(DataConfig(source=source), family="encoder") == (
        "data.objective is 'causal', for decoder or recurrent: a model of the family encoder takes "
        "masked_lm or next_sentence."
    )
    data = DataConfig(source=source, objective="prefix")
    assert refusal(data).endswith("a model of the family decoder takes causal.")
    data = DataConfig(source=source, objective="next_sentence")
    assert refusal(data, family="encoder", context_length=16) == (
        "data.objective is 'next_sentence': the model needs model.token_types 2 and "
        "model.encoder_heads pretraining, not 0 and none."
    )


def test_the_next_sentence_needs_two_documents(tmp_path):
    data = DataConfig(source=(single(tmp_path, "a long text " * 40),), objective="next_sentence")
    said = refusal(data, family="encoder", context_length=16, **PAIRS)
    assert said.startswith("data.source: next_sentence needs two documents of two tokens and more")


def test_a_tokenizer_learns_from_a_bounded_sample_and_characters_from_all(tmp_path, monkeypatch):
    lines = [f"{'word ' * 8}{chr(0x4E00 + number)}" for number in range(300)]
    data = DataConfig(source=(written(tmp_path, *lines),), tokenizer="bpe:300")
    read: list[str] = []

    def learn(spec: str, text: str, *, ends: bool) -> Tokenizer:
        assert ends
        read.append(text)
        return ByteTokenizer()

    monkeypatch.setattr(corpus_module, "train_tokenizer", learn)
    monkeypatch.setattr(corpus_module, "LEARNING_CHARACTERS", 1000)
    monkeypatch.setattr(corpus_module, "SAMPLED_DOCUMENTS", 10)
    learn_tokenizer(data, open_sources(data))
    assert 900 < len(read[0]) < 1200
    assert lines[0] in read[0]
    assert lines[-1] in read[0]  # From the whole of it, not from its beginning.
    learn_tokenizer(dataclasses.replace(data, tokenizer="characters"), open_sources(data))
    assert set(read[1]) == set("".join(lines))
    assert len(read[1]) == len(set(read[1]))


def taken(corpus: Corpus, weights: tuple[float, ...]) -> list[Batch]:
    return list(itertools.islice(training_batches(corpus.train, weights, batch_size=4, seed=0), 6))


def test_a_mixture_is_weighed_anew_without_being_tokenised_anew(tmp_path):
    sources = tuple(written(tmp_path, *[name * 9] * 20, name=f"{name}.txt") for name in "ab")
    data = DataConfig(source=sources, weights=(1.0, 3.0), cache=str(tmp_path / "cache"))
    first = opened(data)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}

    class Refusing(ByteTokenizer):
        def encode(self, text: str) -> np.ndarray:
            raise AssertionError(text)

    again = dataclasses.replace(data, weights=(3.0, 1.0))
    second = opened(again, Refusing())
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    shares = [
        np.mean([batch.tokens[:, 0] == ord("a") for batch in taken(corpus, weights)])
        for corpus, weights in ((first, data.weights), (second, again.weights))
    ]
    assert shares == [0.25, 0.75]


def test_a_model_with_fewer_rows_than_the_objectives_vocabulary_is_refused(tmp_path):
    data = DataConfig(source=(written(tmp_path, *["abcdef"] * 9),), objective="masked_lm")
    corpus = opened(data, family="encoder", context_length=8)
    assert corpus.vocabulary.size == 256 + 3
    config = ExperimentConfig(model=TransformerConfig(family="encoder", vocab_size=258), data=data)
    with pytest.raises(InputError) as error:
        with_vocabulary(config, corpus.vocabulary.size)
    assert str(error.value) == (
        "TransformerConfig.vocab_size is 258: it must be at least the tokenizer's 259."
    )
