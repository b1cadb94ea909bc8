import contextlib
import importlib.metadata
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from gptjax import beam_search, cli
from gptjax.commands.flags import SYNONYMS
from gptjax.config import (
    ExperimentConfig,
    OptimizerConfig,
    TrainConfig,
    read_sealed,
    sealed,
    to_dict,
)
from gptjax.costs.model import model_cost
from gptjax.data.tokenizers import train_tokenizer
from gptjax.models.presets import preset
from gptjax.runs.loading import DecodingInputs, Run, load_run

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "experiments" / "quickstart.py"


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a function as a program with these arguments, in this process."""

    def run(program: Callable[[], object], *arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            program()
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    return run


@pytest.fixture
def gptjax(end: Command) -> Command:
    """`python -m gptjax` with these arguments."""
    return lambda *arguments: end(cli.main, *arguments)


@pytest.fixture
def quickstart(end: Command) -> Command:
    """`python experiments/quickstart.py` with these arguments."""

    def program() -> None:
        runpy.run_path(str(QUICKSTART), run_name="__main__")

    return lambda *arguments: end(program, *arguments)


def _content(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _assert_one_sentence(ended: Ended, part: str) -> None:
    assert ended.code == 2
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert ended.err.count("\n") == 1
    assert re.search(r"[.?]\n$", ended.err)
    assert part in ended.err


BAD_TEXTS = {
    "missing": (None, "data.source: cannot read {path}: No such file or directory."),
    "empty": (b"", "data.source: {path} is empty."),
    "not UTF-8": (
        b"abc\xff",
        "data.source: {path} is not UTF-8: byte 0xff at offset 3 (#errors=replace",
    ),
    "too short": (
        b"short",
        "of {path} has 4 tokens and fills no row; a context of 128 needs at least 129.",
    ),
}


@pytest.mark.parametrize(("data", "sentence"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_a_bad_text_is_one_sentence_and_makes_no_directory(data, sentence, quickstart, tmp_path):
    path, out = tmp_path / "text.txt", tmp_path / "out"
    if data is not None:
        path.write_bytes(data)
    ended = quickstart("--data.source", path, "--out", out)
    _assert_one_sentence(ended, sentence.format(path=path))
    assert not out.exists()


BAD_FLAGS = {
    "unknown flag": (
        ["--model.dept", "3"],
        "Unknown flag --model.dept: did you mean --model.depth",
    ),
    "flag like no other": (["--zzz"], "Unknown flag --zzz: see --help."),
    "two unknown flags": (["--zzz", "--yyy=3"], "Unknown flag --zzz, --yyy=3: see --help."),
    "stray word": (["stray"], "Unknown argument stray: see --help."),
    "no number": (["--model.depth", "abc"], "Error parsing --model.depth: "),
    "no value": (["--model.depth"], "Missing value for argument '--model.depth'."),
    "no choice": (
        ["--model.position_embedding", "learnd"],
        "invalid choice 'learnd' for argument '--model.position-embedding'. "
        "Expected one of ('learned', 'sinusoidal', 'rotary', 'alibi', 'relative', 'none').",
    ),
    "tokenizer": (
        ["--data.tokenizer", "byte"],
        "data.tokenizer is 'byte': did you mean bytes?\n",
    ),
    "pieces": (
        ["--data.tokenizer", "sentencepiece:99"],
        "data.tokenizer is 'sentencepiece:99': for this text the size must be at least 2",
    ),
    "context longer than the data": (
        ["--model.context_length", "100000"],
        "tokens and fills no row; a context of 100000 needs at least 100001.\n",
    ),
    "another objective's family": (
        ["--model.family", "encoder"],
        "data.objective is 'causal', for decoder or recurrent: a model of the family encoder takes "
        "masked_lm or next_sentence.\n",
    ),
    "another experiment's objective": (
        ["--data.objective", "masked_lm", "--model.family", "encoder"],
        "data.objective is 'masked_lm': this experiment is for causal.\n",
    ),
    "vocabulary smaller than the characters need": (
        ["--model.vocab-size", "20"],
        "TransformerConfig.vocab_size is 20: it must be at least the tokenizer's ",
    ),
    "width beyond all numbers": (
        ["--model.width", f"{10**30}"],
        f"TransformerConfig.width is {10**30}: it must be below 2**32.\n",
    ),
    "width beyond the memory": (["--model.width", f"{10**8}"], "The training state takes at least"),
    "depth": (["--model.depth", f"{10**9}"], "depth is 1000000000: it must be at most 65536."),
    "depth beyond the memory": (
        ["--model.depth", "65536", "--model.width", "4096"],
        "The training state takes at least",
    ),
    "batch beyond the memory": (
        ["--train.batch-size", f"{10**9}"],
        f"A batch of {10**9} rows of 32 tokens takes at least ",
    ),
    "rate that no device tells from 0": (
        ["--optimizer.learning-rate", "1e-46"],
        "OptimizerConfig.learning_rate is 1e-46: it must be 0, or from 1.2e-38 to 3.4e+38 in size.",
    ),
    "weight that no device tells from 0": (
        ["--data.weights", "1e-46"],
        "DataConfig.weights is (1e-46,): it must be 0, or from 1.2e-38 to 3.4e+38 in size.",
    ),
    "tokenizer of very many tokens": (
        ["--data.tokenizer", f"bpe:{'9' * 5000}"],
        "9': it needs a size, as in bpe:4096.\n",
    ),
    "validation part too short": (
        ["--data.validation-fraction", "0.00001"],
        "has 1 tokens and fills no row; a context of 32 needs at least 2.\n",
    ),
}


def _flags(run: Path) -> list[str]:
    """The flags that the finished run was made with."""
    config = json.loads((run / "config.json").read_text())["config"]
    config["model"]["vocab_size"] = 0
    defaults = to_dict(ExperimentConfig())
    return [
        word
        for part, fields in config.items()
        for name, value in fields.items()
        if value != defaults[part][name]
        for word in (f"--{part}.{name.replace('_', '-')}", *_words(value))
    ]


def _words(value: object) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize(("flags", "sentence"), BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_a_bad_flag_is_one_sentence_and_overwrites_nothing(flags, sentence, quickstart, tiny_run):
    before = _content(tiny_run)
    ended = quickstart(*_flags(tiny_run), "--out", tiny_run, "--overwrite", *flags)
    _assert_one_sentence(ended, sentence)
    assert _content(tiny_run) == before


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--model.depth=0", "TransformerConfig.depth is 0: it must be at least 1.\n"),
        ("--model.heads=3", "TransformerConfig.heads is 3: it must be a divisor of width 16.\n"),
        (
            "--optimizer.learning-rate=nan",
            "OptimizerConfig.learning_rate is nan: it must be finite.\n",
        ),
        (
            "--optimizer.warmup-steps=4",
            "OptimizerConfig.warmup_steps is 4: it must be below train.steps 4.\n",
        ),
    ],
)
def test_what_the_config_refuses_is_said_in_its_own_words(flag, sentence, quickstart, tiny_run):
    before = _content(tiny_run)
    ended = quickstart(*_flags(tiny_run), "--out", tiny_run, "--overwrite", flag)
    assert ended == (2, "", sentence)
    assert _content(tiny_run) == before


def test_a_finished_run_says_so_and_stays_as_it_is(quickstart, tiny_run):
    before = _content(tiny_run)
    ended = quickstart(*_flags(tiny_run), "--out", tiny_run)
    assert ended == (
        0,
        f"{tiny_run} holds a finished run of this config; --overwrite starts over.\n",
        "",
    )
    assert _content(tiny_run) == before


def test_a_changed_config_is_refused_with_the_differing_field(quickstart, tiny_run):
    before = _content(tiny_run)
    ended = quickstart(*_flags(tiny_run), "--out", tiny_run, "--train.batch-size=8")
    _assert_one_sentence(ended, "(config.train.batch_size: 4 -> 8)")
    assert _content(tiny_run) == before


@pytest.mark.slow
def test_a_run_goes_on_without_the_files_its_tokenizer_was_read_from(
    quickstart, tiny_run, tmp_path
):
    text = (tiny_run.parent / "text.txt").read_text()
    learnt = train_tokenizer("bpe:270", text)
    (tmp_path / "tokenizer.json").write_bytes(learnt.save())
    flags = [*_flags(tiny_run), "--data.tokenizer", f"huggingface:{tmp_path}"]
    run = [*flags, "--out", tmp_path / "run"]
    first = quickstart(*run)
    assert first.code == 0, first.err
    samples = (tmp_path / "run" / "samples.txt").read_bytes()
    (tmp_path / "tokenizer.json").unlink()
    assert "holds a finished run of this config" in quickstart(*run).out
    for name in ("result.json", "samples.txt"):  # As if it had been stopped just before.
        (tmp_path / "run" / name).unlink()
    again = quickstart(*run)
    assert again.code == 0, again.err
    assert (tmp_path / "run" / "samples.txt").read_bytes() == samples
    # Anew it reads the tokenizer anew.
    _assert_one_sentence(quickstart(*run, "--overwrite"), f"cannot read {tmp_path}")
    assert (tmp_path / "run" / "samples.txt").read_bytes() == samples


def test_a_directory_that_cannot_be_written_is_one_sentence(quickstart, tiny_run, tmp_path):
    (tmp_path / "file").write_text("text")
    ended = quickstart(*_flags(tiny_run), "--out", tmp_path / "file")
    _assert_one_sentence(ended, f"cannot write {tmp_path / 'file'}: ")
    ended = quickstart(*_flags(tiny_run), "--out", tmp_path / "file" / "run")
    _assert_one_sentence(ended, f"cannot write {tmp_path / 'file' / 'run'}: ")
    assert _content(tmp_path) == {tmp_path / "file": b"text"}


BAD_SAMPLES = {
    "unknown character": (["--prompt", "über"], "has no token for 'ü' (character 0 of the text)"),
    "empty prompt": (["--prompt", ""], "The prompt is empty: it needs at least one token."),
    "long prompt": (
        ["--prompt", "a" * 33],
        "The prompt has 33 tokens; the model's context is 32.",
    ),
    "prompt that is no text": (["--prompt", "a\udcff"], "prompt is 'a\\udcff': it must be UTF-8."),
    "temperature": (["--temperature", "-1"], "temperature is -1.0: it must be at least 0."),
    "top-k": (["--top-k", "-1"], "top-k is -1: it must be at least 0."),
    "top-p": (["--top-p", "0"], "top-p is 0.0: it must be above 0 and at most 1."),
    "min-p": (["--min-p", "2"], "min-p is 2.0: it must be at least 0 and at most 1."),
    "penalty": (
        ["--repetition-penalty", "0"],
        "repetition-penalty is 0.0: it must be at least 1e-06",
    ),
    "beams": (["--beams", "-1"], "beams is -1: it must be at least 1."),
    "beams and top-k": (
        ["--beams", "2", "--top-k", "3"],
        "--top-k is for sampling: it cannot be combined with --beams.",
    ),
    "beams and samples": (
        ["--beams", "2", "--num-samples", "3"],
        "--num-samples is for sampling: it cannot be combined with --beams.",
    ),
    "samples": (["--num-samples", "0"], "num-samples is 0: it must be at least 1."),
    "tokens": (["--max-new-tokens", "0"], "max-new-tokens is 0: it must be at least 1 and below"),
    "very many tokens": (
        ["--max-new-tokens", f"{10**12}", "--sliding-window"],
        f"max-new-tokens is {10**12}: it must be at least 1 and below 2**31.",
    ),
    "very many samples": (
        ["--num-samples", f"{10**30}"],
        f"Decoding {10**30} sequences of 200 tokens takes at least ",
    ),
    "very many tokens of each sample": (
        ["--num-samples", "9999", "--max-new-tokens", "2000000000", "--sliding-window"],
        "Decoding 9999 sequences of 2000000000 tokens takes at least ",
    ),
    "very many beams": (["--beams", f"{10**9}"], f"Decoding {10**9} sequences of 200 tokens takes"),
    "seed": (["--seed", "-1"], "seed is -1: it must be at least 0 and below 2**32."),
    "long seed": (["--seed", f"{1 << 32}"], f"seed is {1 << 32}: it must be at least 0"),
    "step": (["--step", "3"], "has no checkpoint of step 3: it has 4."),
    "unknown flag": (["--temprature", "1"], "Unknown flag --temprature: did you mean --temp"),
    "no number": (["--seed", "a"], "Error parsing --seed: "),
}


@pytest.mark.parametrize(("flags", "sentence"), BAD_SAMPLES.values(), ids=BAD_SAMPLES.keys())
def test_a_sample_that_cannot_be_is_one_sentence(flags, sentence, gptjax, tiny_run):
    before = _content(tiny_run)
    _assert_one_sentence(gptjax("sample", tiny_run, *flags), sentence)
    assert _content(tiny_run) == before


def test_no_run_to_sample_from_is_one_sentence(gptjax, tmp_path):
    ended = gptjax("sample", tmp_path / "none")
    _assert_one_sentence(ended, f"{tmp_path / 'none'} is no run: {tmp_path} has no directories.")
    _assert_one_sentence(gptjax("sample", tmp_path), f"{tmp_path} holds no run: it has no config.")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "runs/mien"],
        ["params", "runs/mien"],
        ["convert", "runs/mien", "new"],
        ["attention", "runs/mien", "--text", "a", "--html", "a.html"],
    ],
)
def test_a_mistyped_run_is_answered_by_the_near_ones_and_asked_of_no_network(
    words, gptjax, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # An import of it fails.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "other").mkdir()
    _assert_one_sentence(gptjax(*words), "did you mean runs/mine?")
    words[1] = "runs/zephyr"
    _assert_one_sentence(gptjax(*words), ": runs has mine, other.")
    if words[0] != "params":  # Where it may be a preset.
        words[1] = "zephyr"
        _assert_one_sentence(gptjax(*words), ": . has runs.")


def test_a_checkpoint_that_does_not_fit_is_one_sentence(gptjax, tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    config = read_sealed(run / "config.json")
    config["config"]["model"]["tie_embeddings"] = False
    (run / "config.json").write_text(json.dumps(sealed(config)))
    before = _content(run)
    _assert_one_sentence(gptjax("sample", run), "params.head.table is missing.")
    assert _content(run) == before


def test_debug_shows_the_traceback_before_the_sentence(gptjax, quickstart, tmp_path):
    for ended in (
        gptjax("params", "gpt3", "--debug"),
        quickstart("--debug", "--model.depth", 0),
        quickstart("--data.source", tmp_path / "none", "--debug"),
    ):
        assert ended.code == 2
        assert ended.err.startswith("Traceback (most recent call last):")
        assert "InputError: " in ended.err
        assert ended.err.endswith((".\n", "?\n"))


def test_a_sample_continues_the_prompt_within_the_context(gptjax, tiny_run):
    ended = gptjax("sample", tiny_run, "--prompt", "7 and ", "--max-new-tokens", 9, "--seed", 1)
    assert (ended.code, ended.err) == (0, "9 new tokens: as many as --max-new-tokens allows.\n")
    assert ended.out.startswith("7 and ")
    text = ended.out.removesuffix("\n")
    assert len(text) == len("7 and ") + 9
    assert set(text) <= set(load_run(tiny_run).tokenizer.decode(range(99)))
    same = gptjax("sample", tiny_run, "--prompt", "7 and ", "--max-new-tokens", 9, "--seed", 1)
    other = gptjax("sample", tiny_run, "--prompt", "7 and ", "--max-new-tokens", 9, "--seed", 2)
    assert same == ended
    assert other.out != ended.out


def test_greedy_samples_are_all_the_same(gptjax, tiny_run):
    flags = ["--temperature", 0, "--max-new-tokens", 5, "--num-samples", 2]
    ended = gptjax("sample", tiny_run, *flags)
    first, second = re.fullmatch(
        r"--- sample 1\n(\n.{5})\n--- sample 2\n(\n.{5})\n", ended.out, re.DOTALL
    ).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert first == second


def test_a_sample_ends_with_the_context_unless_the_window_slides(gptjax, tiny_run):
    ended = gptjax("sample", tiny_run, "--prompt", "a" * 30, "--max-new-tokens", 40)
    # The prompt, positions 31 and 32, the token after them, a line end.
    assert len(ended.out) == 30 + 2 + 1 + 1
    full = "3 new tokens: the context of 32 is full, beyond which --sliding-window continues.\n"
    assert ended.err == full
    slides = gptjax(
        "sample", tiny_run, "--prompt", "a" * 30, "--max-new-tokens", 40, "--sliding-window"
    )
    assert len(slides.out) == 30 + 40 + 1
    assert slides.err == "40 new tokens: as many as --max-new-tokens allows.\n"


def test_a_sample_ends_where_the_model_ends_the_text(gptjax, tiny_run, monkeypatch):
    flags = ["--prompt", "7 and ", "--max-new-tokens", 9, "--seed", 1]
    text = gptjax("sample", tiny_run, *flags).out
    fifth = int(load_run(tiny_run).tokenizer.encode(text)[len("7 and ") + 4])
    question = Run.decoding_inputs

    def ending(self: Run, text: str) -> DecodingInputs:
        return question(self, text)._replace(ends=(fifth,))

    monkeypatch.setattr(Run, "decoding_inputs", ending)
    ended = gptjax("sample", tiny_run, *flags)
    said = ended.out.removesuffix("\n")
    assert text.startswith(said)
    assert ended.err == f"{len(said) - len('7 and ') + 1} new tokens: the model ended the text.\n"
    assert len(said) <= len("7 and ") + 4


def test_beams_print_the_best_continuation(gptjax, tiny_run):
    flags = ["--prompt", "7 and ", "--max-new-tokens", 4]
    greedy = gptjax("sample", tiny_run, *flags, "--temperature", 0)
    assert gptjax("sample", tiny_run, *flags, "--beams", 1) == greedy
    loaded = load_run(tiny_run)
    ((best, *_),) = beam_search(
        loaded.model, loaded.tokenizer.encode("7 and ")[None], max_new_tokens=4, beams=3
    )
    ended = gptjax("sample", tiny_run, *flags, "--beams", 3)
    assert ended.out == f"7 and {loaded.tokenizer.decode(best.tokens)}\n"


def test_min_p_and_the_penalty_reach_the_choice(gptjax, tiny_run):
    flags = ["sample", tiny_run, "--prompt", "aaaa", "--max-new-tokens", 8, "--seed", 3]
    greedy = gptjax(*flags, "--temperature", 0)
    assert gptjax(*flags, "--min-p", 1) == greedy
    assert gptjax(*flags) != greedy
    penalised = gptjax(*flags, "--temperature", 0, "--repetition-penalty", 100)
    assert len(set(penalised.out.strip("\n"))) > len(set(greedy.out.strip("\n")))


def test_params_prints_a_table_that_adds_up(gptjax):
    ended = gptjax("params", "quickstart")
    assert (ended.code, ended.err) == (0, "")
    counted = model_cost(preset("quickstart"))
    total = re.search(r"^  total +([\d,]+)$", ended.out, re.MULTILINE)
    assert total is not None
    assert total[1] == f"{counted.parameters:,}"
    parts = ended.out[: total.start()].splitlines()[2:-1]
    numbers = [int(line.split()[2].replace(",", "")) for line in parts]
    assert sum(numbers) == counted.parameters
    assert [line.split()[0] for line in parts] == [part.name for part in counted.parts]
    assert f"{counted.training_flops:,}" in ended.out
    assert f"{sum(counted.state_bytes.values()):,}" in ended.out


def test_params_prints_json_for_machines(gptjax):
    content = json.loads(gptjax("params", "gpt2", "--json").out)
    counted = model_cost(preset("gpt2"))
    assert content["parameters"] == 124_439_808
    assert sum(part["parameters"] for part in content["parts"]) == 124_439_808
    assert content["forward_flops_per_token"] == counted.forward_flops
    assert content["training_flops_per_token"] == counted.training_flops
    assert content["attention_flops_per_token"] == counted.attention_flops
    assert content["state_bytes"] == counted.state_bytes


def test_params_of_a_run_are_those_that_its_result_states(gptjax, tiny_run):
    content = json.loads(gptjax("params", tiny_run, "--json").out)
    assert content["parameters"] == json.loads((tiny_run / "result.json").read_text())["parameters"]


def test_params_of_an_unknown_model_lists_the_near_ones(gptjax):
    _assert_one_sentence(gptjax("params", "gpt2-xll"), "Unknown preset 'gpt2-xll': did you mean ")
    assert "gpt2-xl" in gptjax("params", "gpt2-xll").err
    _assert_one_sentence(gptjax("params", "zephyr"), "known are alibi, bert-base, ")
    _assert_one_sentence(gptjax("params"), "A preset's name, or the directory of a run.")


def test_the_version_is_the_packages(gptjax):
    assert gptjax("--version").out == f"gptjax {importlib.metadata.version('gptjax')}\n"


def test_an_unknown_command_lists_the_known_ones(gptjax):
    _assert_one_sentence(gptjax("sampel"), "Unknown command 'sampel': did you mean sample?")
    _assert_one_sentence(gptjax("--prompt"), "known are attention, build-dataset, certify, ")
    _assert_one_sentence(gptjax(), "A command is missing: known are train, compare, sample, ")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["train", "--lr", "3e-4"], "--lr: did you mean --optimizer.learning-rate?\n"),
        (["train", "--learning_rate=1"], "_rate=1: did you mean --optimizer.learning-rate?\n"),
        (["train", "--batch-size", "8"], "--batch-size: did you mean --train.batch-size?\n"),
        (["train", "--steps", "9"], "--steps: did you mean --train.steps?\n"),
        (["train", "--seed", "1"], "--seed: did you mean --train.seed?\n"),
        (["train", "--train.lr", "1"], "--train.lr: did you mean --optimizer.learning-rate?\n"),
        (["train", "--n-layer", "6"], "--n-layer: did you mean --model.depth?\n"),
        (["train", "--model", "gpt2"], "--model: did you mean --preset?\n"),
        (
            ["train", "--steps", "9", "--lr", "1"],
            "--steps, --lr: did you mean --train.steps and --optimizer.learning-rate?\n",
        ),
        (["compare", "--variants", "gpt2", "--lr", "1"], "--lr: did you mean --rates?\n"),
        (["compare", "--variants", "gpt2", "--seed", "3"], "--seed: did you mean --seeds?\n"),
        (["sample", "run", "--max-tokens", "3"], "--max-tokens: did you mean --max-new-tokens?\n"),
    ],
)
def test_a_flag_by_another_name_is_answered_with_ours(words, hint, gptjax):
    _assert_one_sentence(gptjax(*words), hint)


def test_every_synonym_is_of_a_flag_that_some_command_has(gptjax):
    helps = "".join(gptjax(name, "--help").out for name in ("train", "compare", "sample"))
    for names in SYNONYMS.values():
        for name in names:
            assert re.search(rf"[-.]{name}\b", helps)


def test_a_mistake_is_the_same_sentence_in_a_coloured_terminal(gptjax, monkeypatch):
    plain = gptjax("params", "gpt2", "--jsn")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[" in gptjax("params", "--help").out
    assert gptjax("params", "gpt2", "--jsn") == plain
    _assert_one_sentence(plain, "Unknown flag --jsn: did you mean --json?")


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], ["sample", "Continue a prompt", "params", "Print a model"]),
        (
            ["sample", "--help"],
            ["--max-new-tokens", "(default: 200)", "--temperature", "0.8)", "--sliding-window"],
        ),
        (["params", "--help"], ["--json", "(default: False)", "A preset's name"]),
    ],
)
def test_help_explains_commands_and_their_defaults(arguments, shown, gptjax):
    ended = gptjax(*arguments)
    assert (ended.code, ended.err) == (0, "")
    for part in shown:
        assert part in ended.out


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("train", "[OPTIONS]"),
        ("compare", "[OPTIONS]"),
        ("sample", "[OPTIONS] RUN"),
        ("params", "MODEL [--json | --no-json]"),
        ("certify", "[VARIANT ...] "),
        ("convert", "MODEL DIRECTORY [--step STEP]"),
        ("attention", "[OPTIONS] MODEL"),
        ("data", "[OPTIONS] SOURCE ..."),
        ("build-dataset", "[OPTIONS] SOURCE"),
        ("preflight", "[OPTIONS] PRESET"),
        ("launch", "SCRIPT [ITS FLAGS ...] "),
    ],
)
def test_help_says_what_stands_where_and_no_type_of_pythons(name, usage, gptjax):
    help = gptjax(name, "--help").out
    assert help.startswith(f"usage: gptjax {name} [-h] {usage}")
    assert not re.search(r"\bSTR\b", help)


def test_help_of_an_experiment_explains_every_field_with_its_default(quickstart):
    ended = quickstart("--help")
    assert (ended.code, ended.err) == (0, "")
    words = " ".join(ended.out.replace("│", " ").split())
    for part, fields in to_dict(ExperimentConfig()).items():
        for name in fields:
            assert f"--{part}.{name.replace('_', '-')}" in words
    assert words.count("(default: ") == sum(map(len, to_dict(ExperimentConfig()).values())) + 2
    assert "Optimizer steps. (default: 1000)" in words
    assert "Peak learning rate; with muon, that of AdamW. (default: 0.003)" in words
    assert "--out PATH Directory of all outputs" in words
    assert "(default: runs/quickstart)" in words
    assert "--debug shows the traceback" in words


PRESETS = {
    "slow": ExperimentConfig(train=TrainConfig(steps=300)),
    "fast": ExperimentConfig(train=TrainConfig(steps=200), optimizer=OptimizerConfig(name="muon")),
}


@pytest.fixture
def experiment(end: Command):
    """An experiment of two presets that prints what it is to run."""

    def run(config: ExperimentConfig, out: Path, overwrite: bool) -> None:
        print(json.dumps([config.train.steps, config.optimizer.name, str(out), overwrite]))

    def program() -> None:
        cli.run_experiment(run, PRESETS, "runs/two", "Two presets.")

    return lambda *arguments: end(program, *arguments)


@pytest.mark.parametrize(
    ("arguments", "ran"),
    [
        ([], [300, "adamw", "runs/two/slow", False]),
        (["--preset", "fast"], [200, "muon", "runs/two/fast", False]),
        (["--preset=fast", "--overwrite"], [200, "muon", "runs/two/fast", True]),
        (["--train.steps", "150", "--preset", "fast"], [150, "muon", "runs/two/fast", False]),
        (["--out", "here", "--optimizer.name=muon"], [300, "muon", "here", False]),
    ],
)
def test_a_preset_sets_the_defaults_and_flags_change_them(arguments, ran, experiment):
    ended = experiment(*arguments)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == ran


@pytest.mark.parametrize("arguments", [["--preset", "fsat"], ["--preset=fsat"]])
def test_a_wrong_preset_lists_the_near_ones(arguments, experiment):
    _assert_one_sentence(experiment(*arguments), "Unknown --preset 'fsat': did you mean fast?")


def test_a_preset_without_a_name_lists_the_known_ones(experiment):
    _assert_one_sentence(experiment("--preset"), "Unknown --preset '': known are fast, slow.")


def test_help_names_the_presets_and_shows_the_chosen_ones_defaults(experiment):
    ended = experiment("--preset", "fast", "--help")
    assert "--preset NAME sets the defaults: slow, or fast." in ended.out
    assert "(default: 200)" in ended.out


def test_an_error_of_ours_is_no_mistake_of_the_users(end):
    def run(*_) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        end(lambda: cli.run_experiment(run, PRESETS, "runs/two", "Broken."))


@pytest.mark.slow
def test_the_programs_themselves_end_so(tiny_run):
    finished = subprocess.run(
        [sys.executable, "-m", "gptjax", "params", "gpt2", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert json.loads(finished.stdout)["parameters"] == 124_439_808
    wrong = subprocess.run(
        [sys.executable, QUICKSTART, "--model.dept", "3", "--out", tiny_run],
        capture_output=True,
        text=True,
        check=False,
    )
    sentence = "Unknown flag --model.dept: did you mean --model.depth"
    _assert_one_sentence(Ended(wrong.returncode, wrong.stdout, wrong.stderr), sentence)


def test_a_reader_that_has_seen_enough_ends_the_program_quietly():
    read, write = os.pipe()
    os.close(read)
    buffered = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "gptjax", "params", "gpt2"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=buffered, check=False)
    os.close(write)
    assert ended.stderr == b""
    assert ended.returncode == 128 + signal.SIGPIPE


@pytest.fixture
def chinese(tmp_path: Path) -> Path:
    path = tmp_path / "律.txt"
    path.write_text("机器人不得伤害人类。\n" * 20, encoding="utf-8")
    return path


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
@pytest.mark.parametrize("command", ["data", "mistake", "help"])
def test_what_a_terminal_cannot_show_is_replaced(command, encoding, chinese, monkeypatch):
    words = {
        "data": ["data", chinese, "--tokenizer", "characters", "--context-length", 8],
        "mistake": ["data", chinese, "--tokenizer", "字"],
        "help": ["data", "--help"],
    }[command]
    out, errors = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["gptjax", *map(str, words)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    own = io.TextIOWrapper(errors, encoding=encoding, errors="backslashreplace")  # As Python's is.
    monkeypatch.setattr(sys, "stderr", own)
    with contextlib.suppress(SystemExit):
        cli.main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    said, told = out.getvalue().decode(encoding), errors.getvalue().decode(encoding)
    if command == "data":
        assert "?.txt" in said
        assert "peak memory" in said
    elif command == "help":
        assert "--tokenizer" in said
    else:
        assert told.startswith("data.tokenizer is '\\u5b57': ")
        assert "Traceback" not in told


@pytest.mark.parametrize("kind", ["too long", "a circle of links", "behind a file"])
@pytest.mark.parametrize(
    "words",
    [
        ["params", "PATH"],
        ["sample", "PATH"],
        ["attention", "PATH", "text"],
        ["convert", "PATH", "new"],
        ["convert", str(ROOT / "tests" / "golden" / "gpt2"), "PATH"],
        ["data", "PATH"],
        ["data", "embedded", "--tokenizer", "huggingface:PATH"],
        ["launch", "PATH.py"],
    ],
)
def test_a_path_at_which_no_file_can_be_is_one_sentence(words, kind, gptjax, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    path = {"too long": "x" * 300, "a circle of links": "circle", "behind a file": "file/path"}[
        kind
    ]
    ended = gptjax(*(word.replace("PATH", str(tmp_path / path)) for word in words))
    assert ended.code == 2
    assert ended.err.count("\n") == 1


def test_a_terminal_of_the_posix_locale_shows_what_it_can(chinese):
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "JAX_PLATFORMS": "cpu"}
    words = ["data", str(chinese), "--tokenizer", "characters", "--context-length", "8"]
    ended = subprocess.run(
        [sys.executable, "-m", "gptjax", *words],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, **locale},
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"peak memory" in ended.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data", "embedded", "--batch-size", f"{10**11}"], f"A batch of {10**11} rows of 1024 "),
        (["data", "embedded", "--context-length", f"{10**30}"], f"A batch of 64 rows of {10**30}"),
        (["launch", "--local", f"{10**9}", "experiments/quickstart.py"], f"--local {10**9} with "),
        (["launch", "--devices", f"{10**9}", "experiments/quickstart.py"], f"--devices {10**9} "),
        (["preflight", "gpt2", "--topology", f"h100:{10**9}"], f"{10**9} devices, above 1048576."),
        (["preflight", "gpt2", "--topology", f"h100:{'8' * 5000}"], "accepted are h100:1 to"),
        (["preflight", "gpt2", "--topology", "h100:8", "--tries", "-1"], "--tries is -1: it must"),
    ],
)
def test_sizes_beyond_the_machine_are_one_sentence(words, sentence, gptjax, monkeypatch):
    monkeypatch.chdir(ROOT)
    _assert_one_sentence(gptjax(*words), sentence)


def test_memory_that_runs_out_is_one_sentence(gptjax, monkeypatch):
    def run_out(_: object) -> None:
        raise MemoryError("Unable to allocate 9 GiB.\nfor an array")

    monkeypatch.setattr(cli, "commands", run_out)
    _assert_one_sentence(gptjax("doctor"), "There is not enough memory (Unable to allocate 9 GiB):")
