"""Every file of experiments/ runs two tiny steps, as its user would start it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import EXPERIMENTS, ROOT

from gptjax.commands import sample
from gptjax.commands.outcomes import attention_of_words, first_line
from gptjax.data.objectives.vocabulary import vocabulary
from gptjax.data.tokenizers import train_tokenizer
from gptjax.training.trackers.jsonl import read_jsonl

SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare" / "input.txt"
TINY = [
    "--model.depth=1",
    "--model.width=16",
    "--model.heads=2",
    "--model.context_length=16",
    "--train.batch-size=4",
    "--train.log-every=1",
    "--optimizer.warmup-steps=1",
]


def start(name: str, *flags: str, **how) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(EXPERIMENTS / name), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
        **how,
    )


def output_of(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


def quickstart(out: Path, *flags: str) -> subprocess.Popen:
    return start("quickstart.py", *TINY, f"--out={out}", *flags)


def test_quickstart_leaves_everything_it_promises(tmp_path):
    out = tmp_path / "run"
    flags = ["--train.steps=20", "--optimizer.learning-rate=0.01"]
    flags += ["--train.checkpoint-every=4", "--train.keep-every=8"]
    printed = output_of(quickstart(out, *flags))
    assert "MFU = tokens/s" in printed
    assert "python -m gptjax sample" in printed
    assert {path.name for path in out.iterdir()} == {
        "attention.png", "bytes.txt", "checkpoints", "config.json", "loss.png", "metrics.jsonl",
        "result.json", "samples.txt", "sessions.jsonl", "tokenizer_kind.json", "train",
        "validation",
    }  # fmt: skip
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"8", "16", "20"}
    lines = read_jsonl(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 21))
    names = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu"}
    assert all(names <= line.keys() for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1

    result = json.loads((out / "result.json").read_text())
    assert result["final_validation_loss"] == lines[-1]["validation_loss"]
    assert result["parameters"] == 256 * 16 + 16 * 16 + 12 * 16**2 + 13 * 16 + 2 * 16
    assert result["tokens_seen"] == 20 * 4 * 16
    assert result["final_bits_per_byte"] == pytest.approx(
        result["final_validation_loss"] / np.log(2)
    )
    assert {"jax", "flax", "optax", "python"} <= result["versions"].keys()
    assert result["wall_seconds"] > result["compile_seconds"] > 0
    assert any((out / "train").iterdir())

    assert "finished run" in output_of(quickstart(out, *flags))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shakespeare_char.py"])
def test_other_experiments_run_two_steps(name, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 40)
    flags = [*TINY, "--train.steps=2", f"--data.source={text}", f"--out={tmp_path / 'run'}"]
    output_of(start(name, *flags))
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
def test_masked_lm_shows_what_it_finds(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 40)
    out = tmp_path / "run"
    flags = [*TINY, "--train.steps=2", "--data.tokenizer=bpe:270", "--data.packing=first_fit"]
    source = f"--data.source={text}#documents=line"
    printed = output_of(start("masked_lm.py", *flags, source, f"--out={out}"))
    head, explained, *rows = (out / "predictions.txt").read_text().strip().split("\n\n")
    assert head in printed
    found, hidden, share = re.fullmatch(
        r"([\d,]+) of ([\d,]+) masked tokens predicted correctly \(([\d.]+)%\)\.", head
    ).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert float(share) == pytest.approx(100 * int(found) / int(hidden), abs=0.05)
    assert explained.startswith("Masked text is in brackets")
    assert 1 < len(rows) <= 20
    asked = re.compile(r"\[([^][]+?)(?:: .[^][]*)?\]")  # What is predicted may be a bracket.
    frame = ("begin", "end")
    for row in rows:
        text = asked.sub(lambda m: "" if m[1] in frame else m[1], row).replace("·", " ")
        assert set(text) <= set("To be, or not to be, that is the question.")
    result = json.loads((out / "result.json").read_text())
    assert "final_bits_per_byte" not in result


@pytest.mark.slow
def test_translation_translates_what_validates(tmp_path, capsys):
    text = "".join(f"{n} and {n + 1}\t{n} und {n + 1}\n" for n in range(10, 24))
    (tmp_path / "pairs.tsv").write_text(text)
    out = tmp_path / "run"
    columns = [f"{tmp_path}/pairs.tsv#column={column}" for column in (1, 2)]
    flags = [f"--data.source={columns[0]}", f"--data.target={columns[1]}", f"--out={out}"]
    learnt = ["--data.tokenizer=bpe:260", "--data.buckets=1"]
    output_of(start("translation.py", *TINY, *flags, *learnt, "--train.steps=2"))
    translations = (out / "translations.txt").read_text()
    assert translations.startswith("22 and 23\n  model      ")
    assert "\n  reference  22 und 23\n" in translations
    assert translations.count("\n  reference  ") == 2
    result = json.loads((out / "result.json").read_text())
    assert "final_bits_per_byte" not in result

    # The command that the experiment ends with: a prompt is read, and the answer has no marks.
    sample(str(out), prompt="22 and 23", beams=4, max_new_tokens=15)
    by_beams = capsys.readouterr().out
    assert by_beams == translations.split("  model      ")[1].partition("\n  reference")[0] + "\n"


def test_samples_begin_with_the_first_document_that_says_something():
    assert first_line(["", "", "short"]) == "short"
    assert first_line(["", "short\n  a line that is long enough to show\n"]) == (
        "a line that is long enough to show"
    )


def test_samples_begin_at_the_beginning_of_a_line_and_end_with_a_word():
    parted = "the rest of a line whose beginning is elsewhere\n"
    assert first_line([parted + "    Here a line begins that has room\n"]) == (
        "Here a line begins that has room"
    )
    assert first_line([parted]) == parted.strip()  # There is no other.
    assert first_line(["one two three four"], least=8, most=12) == "one two"
    assert first_line(["one two three four"], least=8, most=13) == "one two three"
    assert first_line(["必须服从人给予它的命令"], least=8, most=9) == "必须服从人给予它的"


@pytest.mark.parametrize(
    ("tokenizer", "text", "words"),
    [
        ("bytes", "A robot's 人.", ["A", "robot", "'", "s", "人", "."]),
        ("bytes", "a  b ", ["a", "b", "·"]),
        ("bpe:270", "the robot obeys the law", ["the", "robot", "obeys", "the", "law"]),
    ],
)
def test_attention_is_shown_between_whole_words(tokenizer, text, words):
    cut = train_tokenizer(tokenizer, text)
    tokens = cut.encode_prompt(text)
    weights = np.tril(np.ones((len(tokens), len(tokens)))) / np.arange(1, len(tokens) + 1)[:, None]
    figure = attention_of_words(weights[None, None], tokens, cut, vocabulary(cut, ()), text)
    panel = figure.axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == words
    assert [label.get_text() for label in panel.get_xticklabels()] == words
    assert figure.get_suptitle() == text


def test_every_experiment_is_run_by_a_test():
    tested = {
        "quickstart.py", "shakespeare_char.py", "masked_lm.py", "translation.py",
        "benchmarks/steps_and_tokens.py", "benchmarks/long_attention.py",
        "benchmarks/seeds_together.py", "benchmarks/checkpoint_cost.py", "benchmarks/intervals.py",
        "benchmarks/gpu.py", "benchmarks/gpu_changes.py", "benchmarks/forward_trace.py",
        "benchmarks/preemptions.py", "benchmarks/watch_cost.py",
        "compare.py",  # In tests/compare/.
        "benchmarks/attention_page.py",  # In test_attention_view.py, which has the browser.
    }  # fmt: skip
    # Compiling the table takes many minutes; tests/preflight run the command that it calls.
    others = {"benchmarks/preflight_table.py"}
    # Both are parts of steps_and_tokens.py.
    others |= {"benchmarks/timed_rounds.py", "benchmarks/torch_baselines.py"}
    scripts = {path.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.rglob("*.py")}
    assert scripts == tested | others


@pytest.mark.large
def test_preemptions_are_priced():
    flags = ["--kills=1", "--seconds", "15", "16"]
    printed = output_of(start("benchmarks/preemptions.py", *flags))
    assert "With the compilation cache, 1 kills:" in printed
    assert "Without the compilation cache, 1 kills:" in printed
    assert printed.count(" in 2 sessions: goodput ") == 2


@pytest.mark.large
def test_what_is_watched_has_its_price():
    flags = ["--depth=1", "--rounds=1", "--steps=1", "--batch-size=2"]
    printed = output_of(start("benchmarks/watch_cost.py", *flags))
    assert re.search(r"quickstart, 1 layers: .* \([\d.]+ steps\); per 250 [\d.]+%", printed)


@pytest.mark.slow
def test_a_forward_pass_is_traced():
    printed = output_of(start("benchmarks/forward_trace.py"))
    assert re.search(r"quickstart: \d+ files, \d+ functions, \d+ lines run, of \d+ of", printed)


@pytest.mark.slow
def test_long_attention_tells_time_and_memory():
    flags = ["--tokens", "64", "--block", "16", "--model", "quickstart", "--layer", "1"]
    printed = output_of(start("benchmarks/long_attention.py", *flags))
    assert re.search(r"64 tokens, block 16: [\d.]+ s .* peak [\d.]+ GiB", printed)


def test_checkpoint_cost_tells_the_share_of_the_checksums():
    printed = output_of(start("benchmarks/checkpoint_cost.py", "--mebibytes=1", "--rounds=2"))
    shares = re.search(r"1 MiB: .* checksums \d+ ms, [\d.]+%, [\d.]+% of the CPU", printed)
    assert shares, printed


@pytest.mark.slow
def test_looks_again_mislead_unless_the_error_is_spent_over_them():
    printed = output_of(start("benchmarks/intervals.py", "--studies=200"))
    studies, coverage = printed.strip().split("\n\n")
    rows = [list(map(float, row.split("|")[3:7])) for row in studies.splitlines()[2:]]
    whole_level, spent = np.mean(rows, axis=0).reshape(2, 2)
    assert (whole_level > 7).all()  # Where 5 are meant, of 9 rows of 200 studies.
    assert (spent < 5).all()
    held = [float(row.split("|")[5]) for row in coverage.splitlines()[2:] if "| 95.00 |" in row]
    assert len(held) == 12
    assert np.mean(held) == pytest.approx(95, abs=2)


@pytest.mark.large
def test_seeds_together_tells_what_is_saved():
    flags = ["--seeds=2", "--steps=12", "--width=16", "--rounds=1"]
    printed = output_of(start("benchmarks/seeds_together.py", *flags))
    assert "2 runs of 12 steps, 18,272 parameters" in printed
    (apart,) = re.findall(r"ratio [\d.]+; losses differ by at most (\S+), relatively", printed)
    assert float(apart) < 1e-5


@pytest.mark.slow
def test_benchmark_prints_and_writes_its_figures(tmp_path):
    file = tmp_path / "figures.json"
    printed = output_of(
        start(
            "benchmarks/steps_and_tokens.py",
            "--only",
            "nanogpt-cpu",
            "--rounds",
            "1",
            "--json",
            str(file),
        )
    )
    assert "nanogpt-cpu" in printed
    figures = json.loads(file.read_text())
    row = figures["configurations"][0]["gptjax"]
    assert row["tokens_per_second"] == pytest.approx(1000 * 12 * 64 / row["milliseconds"])
    assert row["share_of_peak"] == pytest.approx(row["gflops"] / figures["peak_gflops"])


@pytest.mark.large
def test_benchmark_of_decoding_prints_and_writes_its_figures(tmp_path):
    file = tmp_path / "figures.json"
    flags = ["--decode", "quickstart", "--rounds", "1", "--json", str(file)]
    printed = output_of(start("benchmarks/steps_and_tokens.py", *flags))
    assert "quickstart, 1 x 64 tokens: 3.3 MB of float32 weights read per token" in printed
    (figures,) = json.loads(file.read_text())["decoding"]
    ours, reading = figures["gptjax"], figures["reading"]
    # All parameters but the 128 positions are read; the embedding is the head.
    assert figures["weight_bytes"] == 4 * (12 * 4 * 128**2 + 256 * 128 + 4 * 13 * 128 + 2 * 128)
    share = ours["share_of_bounds"]["reading"]
    assert share == pytest.approx(reading["milliseconds"] / ours["milliseconds"])


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


@pytest.mark.slow
def test_gpu_changes_train_the_same_model():
    changes = "now", "fused-qkv"
    printed = output_of(
        start("benchmarks/gpu_changes.py", "--tiny", "--parts=training", "--only", *changes)
    )
    trained = [(row[0], float(row[-1])) for row in rows_of(printed) if row and row[0] in changes]
    assert [name for name, _ in trained] == [*changes, "now"]
    assert [loss for _, loss in trained] == pytest.approx([trained[0][1]] * 3, abs=0.01)


@pytest.mark.large
def test_gpu_changes_time_decoding_and_small_models():
    rows = rows_of(
        output_of(start("benchmarks/gpu_changes.py", "--tiny", "--parts", "decoding", "small"))
    )
    assert [row[1] for row in rows if row and row[0] == "float32"] == ["1", "2", "32"]
    assert [row[1] for row in rows if row and row[0] == "biases"] == ["1", "10"]
    assert_needs_a_gpu("benchmarks/gpu_changes.py")


def assert_needs_a_gpu(script: str) -> None:
    _, errors = start(script).communicate(timeout=300)
    assert errors.endswith("There is no GPU; --tiny runs small shapes without one.\n")


@pytest.mark.large
def test_the_gpu_benchmark_times_a_step(tmp_path):
    file = tmp_path / "figures.json"
    flags = "--tiny", "--only", "gpt2", "--rounds=1", "--no-decoding", "--json", str(file)
    rows = rows_of(output_of(start("benchmarks/gpu.py", *flags)))
    (figures,) = json.loads(file.read_text())["training"]
    (ours,) = (row for row in rows if row and row[0] == "gpt2")
    assert ours[1] == "gptjax"
    assert ours[2] == f"{figures['gptjax']['milliseconds']:.2f}"
    speed = 2 * 16 / (figures["gptjax"]["milliseconds"] / 1000)
    assert figures["gptjax"]["tokens_per_second"] == pytest.approx(speed)
    assert_needs_a_gpu("benchmarks/gpu.py")


@pytest.mark.slow
def test_of_two_runs_into_one_directory_one_is_refused(tmp_path):
    flags = ["--train.steps=40", "--train.checkpoint-every=7"]
    runs = [quickstart(tmp_path / "run", *flags, "--overwrite") for _ in range(2)]
    errors = {process.communicate(timeout=300)[1]: process.returncode for process in runs}
    assert sorted(errors.values()) == [0, 2]
    (refused,) = [sentence for sentence, code in errors.items() if code]
    assert re.fullmatch(r"\S+/run is in use by process \d+ on \S+ since .+\n", refused)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, 41)]
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
def test_a_checkpoint_without_room_is_one_sentence_and_the_run_goes_on(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} and {n * n} are a number and its square.\n" for n in range(300)))
    flags = ["--train.steps=20", "--train.checkpoint-every=4", "--model.width=64"]
    flags.append(f"--data.source={text}")
    words = [sys.executable, str(EXPERIMENTS / "quickstart.py"), *TINY, *flags]
    ended = subprocess.run(
        ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *words, f"--out={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2", "JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    assert ended.returncode == 74
    assert re.fullmatch(
        r"cannot write a checkpoint into \S+: File too large; there is none yet, and the same "
        r"command resumes from it\.\n",
        ended.stderr,
    )
    output_of(quickstart(tmp_path / "run", *flags))
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, 21)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.large)],
)
def test_a_signal_ends_a_run_with_a_sentence(tmp_path, number, code):
    process = quickstart(tmp_path / "run", "--train.steps=100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not read_jsonl(metrics):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"Stopped by {number.name}" in errors
    assert "Traceback" not in errors
    assert any((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="shared/ (real data) is not there")
def test_shakespeare_reaches_its_vocabulary_and_learns(tmp_path):
    flags = ["--train.steps=60", "--optimizer.warmup-steps=10", f"--data.source={SHAKESPEARE}"]
    output_of(start("shakespeare_char.py", *flags, f"--out={tmp_path / 'run'}"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["model"]["vocab_size"] == 65
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["validation_loss"] < 2.7
