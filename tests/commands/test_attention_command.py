"""`python -m gptjax attention`: a model and a text to a page."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from test_attention_view import header, numbers, unpacked

from gptjax import probe, to_huggingface
from gptjax.config import TransformerConfig
from gptjax.data.objectives.vocabulary import vocabulary
from gptjax.data.report import labels
from gptjax.data.tokenizers import ByteTokenizer, SubwordTokenizer, save_tokenizer, train_tokenizer
from gptjax.models.build import build
from gptjax.runs.directory import save_model
from gptjax.runs.loading import load_run

SMALL = TransformerConfig(vocab_size=260, depth=2, width=16, heads=4, context_length=24)
CONFIGS = {
    "decoder": SMALL,
    "grouped": dataclasses.replace(SMALL, kv_heads=2, position_embedding="rotary"),
    "encoder": dataclasses.replace(SMALL, family="encoder"),
    "unframed": dataclasses.replace(SMALL, family="encoder", vocab_size=256),
    "pairs": dataclasses.replace(SMALL, family="encoder_decoder", encoder_depth=3),
    "local": dataclasses.replace(SMALL, attention="local,full", window=2),
    "lstm": dataclasses.replace(SMALL, family="recurrent", heads=1, position_embedding="none"),
    "compressed": dataclasses.replace(SMALL, attention="full,compressed", compression=2),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of untrained models by name, as runs with a tokenizer of bytes."""
    directory = tmp_path_factory.mktemp("runs")
    for name, config in CONFIGS.items():
        save_model(directory / name, build(config, rngs=nnx.Rngs(0)))
        save_tokenizer(ByteTokenizer(), directory / name)
    return directory


def weights(page: str, part: int, layer: int) -> np.ndarray:
    """[N, T, S] of a page, the hidden half of a causal part too."""
    told = header(page)["parts"][part]
    rows, columns = len(told["rows"]), len(told["columns"])
    codes = numbers(unpacked(page, f"weights-{part}-{layer}")) / told["levels"]
    if not told["causal"]:
        return codes.reshape(-1, rows, columns)
    whole = np.zeros((len(told["heads"]), rows, columns))
    whole[:, *np.tril_indices(rows)] = codes.reshape(len(whole), -1)
    return whole


@pytest.mark.parametrize("name", ["decoder", "grouped"])
def test_the_page_of_a_decoder_shows_its_weights(name, runs, command, tmp_path):
    path = tmp_path / "a.html"
    ended = command("attention", runs / name, "--text", "a cat", "--html", path)
    assert ended == (0, f"{path} is the attention of {runs / name}, step 0.\n", "")
    page = path.read_text(encoding="utf-8")
    assert "<title>a cat</title>" in page
    assert f'<bdi id="model">{runs / name}, step 0</bdi>' in page
    (told,) = header(page)["parts"]
    assert told["name"] == "attention"
    assert told["rows"] == told["columns"] == ["a", "·", "c", "a", "t"]
    assert told["keyHeads"] == CONFIGS[name].actual_kv_heads
    run = load_run(runs / name)
    tokens = run.tokenizer.encode("a cat")[None]
    for layer, truth in enumerate(np.asarray(probe.attention(run.model, tokens))[:, 0]):
        np.testing.assert_allclose(weights(page, 0, layer), truth, atol=1e-5)
    shares = nnx.softmax(probe.observe(run.model, tokens).logits[0])
    best = np.argsort(-shares, axis=-1)[:, :5]
    words = vocabulary(run.tokenizer, ())
    for place, expected in enumerate(told["next"]):
        found = [share for _, share in expected]
        np.testing.assert_allclose(found, shares[place, best[place]], atol=1e-4)
        if best[place, 0] < words.size:
            assert expected[0][0] == labels(best[place, :1], run.tokenizer, words)[0]


def test_parts_of_a_character_are_its_bytes(runs, command, tmp_path):
    path = tmp_path / "a.html"
    command("attention", runs / "decoder", "--text", "a机", "--html", path)
    (told,) = header(path.read_text(encoding="utf-8"))["parts"]
    assert told["rows"] == ["a", r"\xe6", r"\x9c", r"\xba"]


def test_a_local_layer_says_what_it_hides(runs, command, tmp_path):
    path = tmp_path / "a.html"
    command("attention", runs / "local", "--text", "abcde", "--html", path)
    page = path.read_text(encoding="utf-8")
    assert header(page)["parts"][0]["windows"] == [2, 0]
    far = np.tri(5, k=-2, dtype=bool)
    assert not weights(page, 0, 0)[:, far].any()
    assert weights(page, 0, 1)[:, far].all()


def test_chosen_layers_and_heads_are_shown_alone(runs, command, tmp_path):
    pages = []
    for number, flags in enumerate(([], ["--layers", "1", "--heads", "3", "0"])):
        path = tmp_path / f"{number}.html"
        command("attention", runs / "grouped", "--text", "abc", "--html", path, *flags)
        pages.append(path.read_text(encoding="utf-8"))
    (told,) = header(pages[1])["parts"]
    assert (told["layers"], told["heads"], told["keyHeads"]) == ([1], [3, 0], 2)
    np.testing.assert_array_equal(weights(pages[1], 0, 0), weights(pages[0], 0, 1)[[3, 0]])
    # Heads 0 and 3 have the first and the second key of the layer.
    whole, chosen = unpacked(pages[0], "key-0-1"), unpacked(pages[1], "key-0-0")
    keys = [numbers(block[4 * 3 * 2 :]).reshape(3, 2, 4) for block in (whole, chosen)]
    np.testing.assert_array_equal(keys[0][:, ::-1], keys[1])


def test_an_encoder_reads_the_text_as_it_was_trained_to(runs, command, tmp_path):
    path = tmp_path / "a.html"
    command("attention", runs / "encoder", "--text", "ab", "--html", path)
    (told,) = header(path.read_text(encoding="utf-8"))["parts"]
    assert told["rows"] == ["[begin]", "a", "b", "[end]"]
    assert not told["causal"]


def test_an_encoder_decoder_has_three_kinds_of_attention(runs, command, tmp_path):
    path, text = tmp_path / "a.html", ["--text", "abc", "--target", "de"]
    command("attention", runs / "pairs", *text, "--html", path)
    page = path.read_text(encoding="utf-8")
    read, written = ["a", "b", "c", "[end]"], ["[begin]", "d", "e"]
    assert [(told["name"], told["rows"], told["columns"]) for told in header(page)["parts"]] == [
        ("decoder", written, written),
        ("cross", written, read),
        ("encoder", read, read),
    ]
    assert [len(told["layers"]) for told in header(page)["parts"]] == [2, 2, 3]
    assert [len(told["next"]) for told in header(page)["parts"]] == [3, 3, 0]
    assert "<title>abc → de</title>" in page
    run = load_run(runs / "pairs")
    source, tokens = np.array([[97, 98, 99, 257]]), np.array([[256, 100, 101]])
    for number, part in enumerate(("decoder", "cross", "encoder")):
        truth = probe.attention(run.model, tokens, part=part, source=source)
        np.testing.assert_allclose(weights(page, number, 1), truth[1, 0], atol=1e-5)
    cross = ["--part", "cross", "--overwrite"]
    command("attention", runs / "pairs", *text, *cross, "--html", path)
    (told,) = header(path.read_text(encoding="utf-8"))["parts"]
    assert told["name"] == "cross"


def test_a_hugging_face_directory_is_read_with_its_tokenizer(command, tmp_path):
    tokenizer = train_tokenizer("bpe:260", "the cat and the cat")
    assert isinstance(tokenizer, SubwordTokenizer)
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size)
    to_huggingface(build(config, rngs=nnx.Rngs(0)), tmp_path / "theirs")
    words = ["attention", tmp_path / "theirs", "--text", "cat", "--html", tmp_path / "a.html"]
    sentence = f"{tmp_path / 'theirs'} has no tokenizer.json, which is needed to encode text.\n"
    assert command(*words) == (2, "", sentence)
    (tmp_path / "theirs" / "tokenizer.json").write_bytes(tokenizer.save())
    code, _, errors = command(*words)
    assert code == 0, errors
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "".join(header(page)["parts"][0]["rows"]) == "cat"
    assert command(*words, "--step", "3", "--overwrite")[2].startswith("step is 3: ")


BAD = {
    "empty text": ("decoder", ["--text", ""], "text is empty: it needs at least one token."),
    "no UTF-8": ("decoder", ["--text", "a\udcff"], r"text is 'a\udcff': it must be UTF-8."),
    "long text": ("decoder", ["--text", "a" * 25], "has 25 tokens; context allows 24."),
    "long source": (
        "pairs",
        ["--text", "a" * 24, "--target", "b"],
        "has 25 tokens; context allows 24.",
    ),
    "layer": ("decoder", ["--layers", "0", "2"], "layers has 2: the model's are 0 to 1."),
    "head": ("decoder", ["--heads", "-1"], "heads has -1: the model's are 0 to 3."),
    "cross in a decoder": (
        "decoder",
        ["--part", "cross"],
        "part is 'cross': {run} is of the family decoder, whose attention is decoder alone.",
    ),
    "cross in an encoder": ("encoder", ["--part", "cross"], "whose attention is encoder alone."),
    "no part": ("pairs", ["--part", "crss"], "invalid choice 'crss' for argument '--part'."),
    "no target": ("pairs", [], "is of the family encoder_decoder, which needs a --target too."),
    "a target": ("decoder", ["--target", "b"], "of the family decoder, which takes no --target."),
    "no frame": ("unframed", [], "{run} was built without a token that begins or ends a text."),
    "LSTM": ("lstm", [], "{run} is of the family recurrent, which has no attention."),
    "compressed": (
        "compressed",
        [],
        "layers must be without compressed attention, whose keys are groups of tokens: --layers 0.",
    ),
    "step": ("decoder", ["--step", "7"], "has no checkpoint of step 7"),
    "no run": ("none", [], "is no directory, and no OWNER/NAME of the hub's: "),
    "a directory": ("decoder", ["--html", "."], ". is a directory: give the path of a file."),
    "nowhere": ("decoder", ["--html", "none/a.html"], "there is no directory none."),
}


@pytest.mark.parametrize(("name", "flags", "sentence"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_shown_is_one_sentence(name, flags, sentence, runs, command, tmp_path):
    page = tmp_path / "a.html"
    words = ["attention", runs / name, "--text", "ab", "--html", page, *flags]
    code, out, errors = command(*words)
    assert (code, out) == (2, "")
    assert errors.count("\n") == 1
    assert sentence.format(run=runs / name) in errors
    assert not page.exists()


def test_a_run_without_a_tokenizer_is_one_sentence(runs, command, tmp_path):
    run = Path(shutil.copytree(runs / "decoder", tmp_path / "run"))
    (run / "tokenizer_kind.json").unlink()
    words = ["attention", run, "--text", "ab", "--html", tmp_path / "a.html"]
    sentence = f"{run / 'tokenizer_kind.json'}: no tokenizer is saved here.\n"
    assert command(*words) == (2, "", sentence)


def test_a_page_is_overwritten_only_when_told(runs, command, tmp_path):
    page = tmp_path / "a.html"
    page.write_text("mine")
    words = ["attention", runs / "decoder", "--text", "ab", "--html", page]
    sentence = f"{page} already exists: choose another, or --overwrite it.\n"
    assert command(*words) == (2, "", sentence)
    assert page.read_text() == "mine"
    assert command(*words, "--overwrite")[0] == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_ctrl_c_leaves_no_half_page(runs, command, tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    words = ["attention", runs / "decoder", "--text", "ab", "--html", tmp_path / "a.html"]
    assert command(*words) == (130, "", "Stopped.\n")
    assert not list(tmp_path.iterdir())
