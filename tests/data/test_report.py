"""What `python -m gptjax data` shows, and how it ends."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from rich.cells import cell_len

from gptjax.data import report
from gptjax.data.batch import Batch
from gptjax.data.objectives.vocabulary import vocabulary
from gptjax.data.report import drawn, labels
from gptjax.data.tokenizers import ByteTokenizer, train_tokenizer

# 0, 1, 2 … bytes: of 40 lines 5 are empty.
LINES = [("word " * 8)[: number % 8] for number in range(40)]


@pytest.fixture
def show(monkeypatch, command, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """`python -m gptjax data` of `LINES` with these flags."""
    monkeypatch.setattr(report, "SECONDS", 0.0001)
    (tmp_path / "text.txt").write_text("".join(f"{line}\n" for line in LINES))
    source = f"{tmp_path}/text.txt#documents=line"
    return lambda *flags: command("data", *(str(flag).replace("TEXT", source) for flag in flags))


def shown(show, *flags: object) -> str:
    code, out, err = show("TEXT", "--batch-size", 4, *flags)
    assert (code, err) == (0, "")
    return out


def test_documents_side_by_side(show):
    out = shown(show, "--context-length", 8, "--packing", "first_fit")
    # Nine tenths of the lines: 36, of which 5 are empty.
    numbers = re.search(r"text\.txt#documents=line +36 +5 +(\d+) +(\d+) +[\d.]+\n", out)
    assert numbers is not None
    size = sum(map(len, LINES[:36]))
    assert [int(number) for number in numbers.groups()] == [size, size + 31]
    assert "each document ends with the token 256, drawn as [end]" in out
    histogram = re.findall(r"^ +(\d+) to (\d+) +(\d+)  (█+)$", out, re.MULTILINE)
    assert [row[:3] for row in histogram] == [("2", "3", "10"), ("4", "7", "17"), ("8", "15", "4")]
    assert [len(row[3]) for row in histogram] == [24, 40, 9]
    rows = re.search(r"^(\d+) rows of 8 tokens; an epoch is ([\d.]+) batches$", out, re.MULTILINE)
    assert rows is not None
    assert float(rows[2]) == pytest.approx(int(rows[1]) / 4, abs=0.05)
    assert len(re.findall(r"^batch [012], row [01]$", out, re.MULTILINE)) == 6
    drawings = re.findall(r"^  tokens    (.*)\n  predicted (.*)\n  documents (.*)$", out, re.M)
    assert len(drawings) == 6
    for text, predicted, documents in drawings:
        assert len(text) == len(predicted) == len(documents) <= 8 + 4 * text.count("[end]")
        assert set(predicted) == {"^"}
        assert "".join(sorted(documents)) == documents
    assert re.search(
        r"^[\d.]+% of the positions hold tokens, [\d.]+% are predicted; [\d,]+ positions/s",
        out,
        re.M,
    )
    assert re.search(r"^peak memory [\d,]+ MiB$", out, re.MULTILINE)


def test_hidden_tokens_are_marked_and_told(show):
    out = shown(show, "--context-length", 16, "--objective", "masked_lm")
    drawings = re.findall(
        r"^  tokens    (.*)\n  predicted (.*)\n  documents 1+\n  targets   (.*)$", out, re.M
    )
    assert len(drawings) == 6
    for text, predicted, targets in drawings:
        assert text.startswith("[begin]")
        assert text.endswith("[end]")
        assert len(targets.replace("[mask]", "?")) == 2 * 2
        assert "^" in predicted
    assert "[mask]" in out


def test_the_next_sentence_is_told(show):
    out = shown(show, "--context-length", 12, "--objective", "next_sentence")
    assert set(re.findall(r"^  next      (.*)$", out, re.MULTILINE)) <= {
        "another text", "it follows",
    }  # fmt: skip
    for text, segments in re.findall(r"^  tokens    (.*)\n.*\n  segments  (.*)$", out, re.M):
        assert re.fullmatch(r"0+1+", segments)
        assert len(segments) == cell_len(text)


def test_pairs_that_are_left_out_are_counted(show):
    flags = ["--target", "TEXT", "--objective", "sequence_to_sequence", "--context-length", 6]
    out = shown(show, *flags)
    # Of 36 lines 5 are empty; those of 6 and 7 bytes and an end do not fit 6 places.
    too_long = sum(len(line) + 1 > 6 for line in LINES[:36])
    assert f"{5 + too_long} of 36 pairs left out: empty, or longer than the context" in out
    assert "tokens of the target; an epoch is" in out
    for source, target in re.findall(r"^  source    (.*)\n  tokens    (.*)$", out, re.MULTILINE):
        assert source.removesuffix("[end]") == target.removeprefix("[begin]")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["/none.txt"], "data.source: cannot read /none.txt: No such file or directory."),
        (["TEXT", "--tokenizer", "byte"], "data.tokenizer is 'byte': did you mean bytes?"),
        (["TEXT", "--tokenizer", "gpt2:/none"], "data.tokenizer: cannot read"),
        (
            ["TEXT", "--weights", "1", "2"],
            "DataConfig.weights is (1.0, 2.0): it must be a number",
        ),
        (["TEXT", "--objektive", "prefix"], "Unknown flag --objektive: did you mean --objective"),
        (
            ["TEXT", "--context-length", "4096"],
            "tokens and fills no row; a context of 4096 needs at",
        ),
        (["TEXT", "--batch-size", "0"], "batch-size is 0: it must be at least 1."),
        (["TEXT", "--target", "TEXT"], "it must be 0 of them with the objective causal."),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(show, flags, sentence):
    code, out, err = show(*flags)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_a_reader_that_has_seen_enough_ends_it_quietly(tmp_path):
    (tmp_path / "text.txt").write_text("some text\n" * 400)
    command = [
        sys.executable,
        "-m",
        "gptjax",
        "data",
        tmp_path / "text.txt",
        "--context-length",
        "8",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b"trained on ")
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 128 + signal.SIGPIPE


@pytest.mark.parametrize("spec", ["bytes", "bpe:270", "sentencepiece:300"])
def test_every_token_has_a_label_that_a_mark_can_stand_under(spec):
    text = "Tab\there, 中文 é\nand \U0001f600 end. " * 4
    tokenizer = train_tokenizer(spec, text)
    tokens = tokenizer.encode(text)
    found = labels(tokens, tokenizer, vocabulary(tokenizer, ()))
    assert len(found) == len(tokens)
    assert all(cell_len(label) >= 1 for label in found)
    assert "\n" not in "".join(found)
    assert "here," in "".join(found)
    assert "\ufffd" not in "".join(found)
    if spec == "bytes":
        at = len("Tab\there, ")
        assert found[at : at + 6] == [r"\xe4", r"\xb8", r"\xad", r"\xe6", r"\x96", r"\x87"]


def test_a_long_row_is_wrapped_with_its_marks_below_and_its_rest_counted():
    tokens = np.arange(200) % 26 + 97
    row = Batch(tokens[None], tokens[None], np.ones((1, 200)))
    lines = list(drawn(row, 0, ByteTokenizer(), vocabulary(ByteTokenizer(), ())))
    assert lines[0].removeprefix("  tokens    ") == bytes(tokens[:96].tolist()).decode()
    assert lines[1] == "  predicted " + "^" * 96
    assert lines[-1].strip() == "and 104 more"
    wide = np.full(60, 256)
    words = vocabulary(ByteTokenizer(), ("mask",))
    row = Batch(wide[None], wide[None], np.ones((1, 60)))
    lines = list(drawn(row, 0, ByteTokenizer(), words))
    texts = [line.removeprefix("  tokens    ") for line in lines if line.startswith("  tokens")]
    assert texts == ["[mask]" * 16] * 3 + ["[mask]" * 12]
    assert max(map(len, lines)) <= 12 + 96
