"""A converted model begins and ends its texts as its files say, and says so where it is written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file, save_file

from gptjax import beam_search, from_huggingface, generate
from gptjax.config import InputError, read_sealed, sealed
from gptjax.data.tokenizers import save_tokenizer, train_tokenizer
from gptjax.decoding.sampling import Sampling
from gptjax.huggingface import files
from gptjax.runs.directory import CONFIG, save_model
from gptjax.runs.loading import load_run

GOLDEN = ROOT / "tests" / "golden"
ROWS = 17
WORDS = [f"w{token}" for token in range(ROWS)]
GREEDY = Sampling(temperature=0)


def _imported(name: str, directory: Path, **fields: object) -> Path:
    """A golden model that does not repeat itself, with words for tokens.

    `fields` are those of its generation_config.json.
    """
    shutil.copytree(GOLDEN / name, directory)
    tensors, rng = load_file(directory / files.WEIGHTS), np.random.default_rng(4)
    noisy = {key: tensor + rng.normal(size=tensor.shape) for key, tensor in tensors.items()}
    noisy = {key: tensor.astype(np.float32) for key, tensor in noisy.items()}
    save_file(noisy, directory / files.WEIGHTS)
    model = {"type": "WordLevel", "vocab": dict(zip(WORDS, range(ROWS), strict=True))}
    content = {"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}
    content["model"] = {**model, "unk_token": "w16"}
    (directory / files.TOKENIZER).write_text(json.dumps(content))
    (directory / files.GENERATION).write_text(json.dumps(fields))
    config = json.loads((directory / files.CONFIG).read_text())
    given = {"eos_token_id": None, "decoder_start_token_id": None, "pad_token_id": None}
    (directory / files.CONFIG).write_text(json.dumps(config | given))
    return directory


def _continued(
    directory: Path, prompt: list[int], source: list[list[int]] | None = None
) -> list[int]:
    """Five tokens that a model adds, greedily, where none is an end."""
    model = from_huggingface(directory)
    rows = generate(model, [prompt], max_new_tokens=5, sampling=GREEDY, source=source)
    return [int(row[0]) for row in rows]


def _text(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


def _written(directory: Path, name: str = files.CONFIG) -> dict[str, object]:
    """The ids that a file of theirs holds."""
    content = json.loads((directory / name).read_text())
    return {key: value for key, value in content.items() if key.endswith("token_id") and value}


def test_a_converted_model_stops_at_each_of_its_ends(command, tmp_path):
    theirs = _imported("llama", tmp_path / "theirs")
    said = _continued(theirs, [5, 7])
    assert said[2] not in said[:2]
    assert said[4] not in said[:3]
    (theirs / files.GENERATION).write_text(json.dumps({"eos_token_id": [said[4], said[2]]}))
    assert command("convert", theirs, tmp_path / "run")[0] == 0
    flags = ["--prompt", "w5 w7", "--max-new-tokens", 5]
    for how in (["--temperature", 0], ["--beams", 1]):
        ended = command("sample", tmp_path / "run", *flags, *how)
        text = f"{_text([5, 7, *said[:2]])}\n"
        assert ended == (0, text, "3 new tokens: the model ended the text.\n")

    assert command("convert", tmp_path / "run", tmp_path / "back")[0] == 0
    for name in (files.CONFIG, files.GENERATION):
        assert _written(tmp_path / "back", name) == {
            "bos_token_id": 1, "eos_token_id": [said[4], said[2]]
        }  # fmt: skip
    config = tmp_path / "run" / CONFIG
    edited = json.loads(json.dumps(read_sealed(config)).replace('"ends"', '"end"'))
    config.write_text(json.dumps(sealed(edited)))
    with pytest.raises(InputError, match=r"config\.json: tokens is .*, not of a gptjax run"):
        load_run(tmp_path / "run")


def test_a_converted_marian_translates(command, tmp_path):
    start, source, end = 3, [5, 7, 2], 12
    theirs = _imported("marian", tmp_path / "theirs")
    said = _continued(theirs, [start], source=[[*source, end]])
    assert end not in said
    run = tmp_path / "run"
    assert command("convert", theirs, run)[0] == 0
    code, _, sentence = command("sample", run, "--prompt", "w5 w7 w2")
    assert code == 2
    assert "config.json without eos_token_id, so that it cannot translate" in sentence

    shutil.rmtree(run)
    ids = {"eos_token_id": end, "decoder_start_token_id": start, "pad_token_id": start}
    (theirs / files.GENERATION).write_text(json.dumps(ids))
    assert command("convert", theirs, run)[0] == 0
    flags = ["--prompt", "w5 w7 w2", "--max-new-tokens", 5, "--temperature", 0]
    assert command("sample", run, *flags)[:2] == (0, _text(said) + "\n")
    question = load_run(run).decoding_inputs("w5 w7 w2")
    assert (question.prompt.tolist(), question.ends) == ([start], (end,))
    assert question.source is not None
    assert question.source.tolist() == [*source, end]

    assert command("convert", run, tmp_path / "back")[0] == 0
    for name in (files.CONFIG, files.GENERATION):
        assert _written(tmp_path / "back", name) == ids
    transformers = pytest.importorskip("transformers", reason="transformers is missing")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer("w5 w7 w2")["input_ids"] == [*source, end]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (end, start, ROWS)


@pytest.mark.parametrize(
    ("family", "special", "ids"),
    [
        ("decoder", {"bos": 0, "eos": 1, "pad": 2, "mask": 3}, ["bos", "eos", "pad"]),
        ("encoder", {"cls": 0, "sep": 1, "pad": 2, "mask": 3}, ["pad"]),
    ],
)
def test_what_is_trained_here_says_its_tokens(family, special, ids, command, tmp_path):
    tokenizer = train_tokenizer("bpe:270", "the quick brown fox " * 9)
    bert = family == "encoder"
    model = from_huggingface(GOLDEN / ("bert" if bert else "gpt2"))
    save_model(tmp_path / "run", model)
    save_tokenizer(tokenizer, tmp_path / "run")
    assert command("convert", tmp_path / "run", tmp_path / "theirs")[0] == 0
    expected = {f"{name}_token_id": special[name] for name in ids if special[name]}
    assert _written(tmp_path / "theirs") == expected
    assert (tmp_path / "theirs" / files.GENERATION).exists() is not bert
    transformers = pytest.importorskip("transformers", reason="transformers is missing")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert len(theirs) == 270
    assert {name: getattr(theirs, f"{name}_token_id") for name in special} == special
    text = "the fox </s>"
    assert theirs("the fox")["input_ids"] == tokenizer.encode("the fox").tolist()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_row_repeats_the_end_that_it_reached(tmp_path):
    theirs = _imported("llama", tmp_path / "theirs")
    said, other = _continued(theirs, [5, 7]), _continued(theirs, [3, 1])
    ends = [said[1], other[2]]
    assert said[0] not in ends
    assert not {*other[:2]} & {*ends}
    model = from_huggingface(theirs)
    rows = generate(model, [[5, 7], [3, 1]], max_new_tokens=5, sampling=GREEDY, end_token=ends)
    assert np.stack(list(rows), axis=1).tolist() == [
        [said[0], said[1], said[1]],
        other[:3],
    ]
    for count in (2, 4):
        ((best, *others),) = beam_search(
            model, [[5, 7]], max_new_tokens=5, beams=count, end_token=ends
        )
        assert len(others) == count - 1
        for found in (best, *others):
            assert not {*found.tokens[:-1]} & {*ends}
