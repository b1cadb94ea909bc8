"""Wrong invocations of every command, each of which must end in one sentence.

    python tests/reliability/invocations.py --count 600

A command line that works is made wrong at random: a number becomes no number or an absurd one, a
path becomes something that cannot be read or written, a flag is misspelt, dropped or repeated, the
terminal knows few characters. A command must then end by itself, with exit code 0 where it is right
all the same, with 2 and one sentence where it is not, and never with a traceback.
"""

import argparse
import collections
import dataclasses
import functools
import importlib
import io
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import forked
from kills import prepare

SECONDS = 90
"""After which a command hangs."""
NUMBERS = (
    "", "abc", "nan", "inf", "-inf", "-1", "0", "1e30", "1" + 30 * "0", "99999999999",
    "2147483648", "1e-400", "0x10", "1,2", "1.5", "None", "1" + 5000 * "0",
)  # fmt: skip
ENCODINGS = ("latin-1", "ascii", "cp1252", "utf-16")
TRAIN = (
    "--model.depth=1", "--model.width=16", "--model.heads=2", "--model.context_length=32",
    "--train.steps=2", "--train.batch-size=4", "--optimizer.warmup-steps=1",
)  # fmt: skip
CODES = {0, 2, 65, 74}
"""Done, a mistake in what was asked, a loss that is not finite, a disk that does not take it."""


class Material(NamedTuple):
    """What commands are given."""

    directory: Path
    text: Path
    run: Path
    """A finished run."""
    exported: Path
    """The same in Hugging Face's files."""

    def paths(self) -> list[str]:
        """Paths that are not what a command asks for."""
        return [str(self.directory / name) for name in ODD_PATHS] + [
            "", " ", "-", "/dev/zero", "/dev/null", "/dev/full", "/", f"{self.text}/below",
            str(self.directory / ("x" * 300)), str(self.directory / "a\nb"), "gs://bucket/none",
            str(self.text), str(self.run), str(self.exported), os.fsdecode(b"\xff\xfe"),
        ]  # fmt: skip


ODD_PATHS = ("missing", "folder", "empty", "fifo", "socket", "binary", "dangling", "loop", "deep")


class Invocation(NamedTuple):
    """A command line, and the terminal that it is given in."""

    program: str
    """`gptjax`, or the name of an experiment."""
    words: tuple[str, ...]
    encoding: str = "utf-8"
    output: str = ""
    """Where standard output goes instead of the trial's log."""

    def __str__(self) -> str:
        words = " ".join(word if len(word) < 60 else f"{word[:50]}..." for word in self.words)
        terminal = f" > {self.output}" if self.output else ""
        return f"{self.program} {words!r}{terminal} ({self.encoding})"


def make_material(directory: Path) -> Material:
    """Files that commands read, and paths that nothing can be read from."""
    text = directory / "text.txt"
    text.write_text("".join(f"{n} and {n * n} are a number, é.\n" for n in range(300)))
    (directory / "folder").mkdir()
    (directory / "empty").touch()
    os.mkfifo(directory / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(directory / "socket"))
    (directory / "binary").write_bytes(random.Random(0).randbytes(5000))
    (directory / "dangling").symlink_to(directory / "nowhere")
    (directory / "loop").symlink_to(directory / "loop")
    (directory / "deep").write_text("[" * 100_000)
    material = Material(directory, text, directory / "run", directory / "exported")
    learnt = "--data.tokenizer=bpe:280"
    words = (*TRAIN, learnt, f"--data.source={text}", f"--out={material.run}")
    for invocation in (
        Invocation("quickstart", words),
        Invocation("gptjax", ("convert", str(material.run), str(material.exported))),
    ):
        ended = invoke(invocation, directory)
        assert ended.code == 0, ended.said
    return material


def templates(material: Material) -> list[Invocation]:
    """Command lines that work."""
    run, text, new = str(material.run), str(material.text), str(material.directory / "new")
    sample = (
        "sample", run, "--prompt=1 and", "--max-new-tokens=4", "--temperature=0.5", "--top-k=5",
        "--top-p=0.9", "--min-p=0.01", "--repetition-penalty=1.1", "--seed=1", "--num-samples=2",
    )  # fmt: skip
    data = (
        "data", text, "--tokenizer=bytes", "--context-length=32", "--batch-size=4",
        f"--cache={new}", "--objective=causal", "--packing=split",
    )  # fmt: skip
    gptjax = [
        sample,
        ("sample", run, "--beams=2", "--max-new-tokens=4", "--step=2"),
        ("params", "gpt2"),
        ("params", run, "--json"),
        ("attention", run, "--text=1 and 1", f"--html={new}.html", "--layers=0", "--heads=1"),
        ("certify", "none-such"),
        ("convert", run, new, "--step=2"),
        ("convert", str(material.exported), new),
        data,
        ("data", f"{text}#documents=line", "--tokenizer=characters", "--context-length=16"),
        ("build-dataset", text, "--name=corpus", f"--data-dir={new}", "--version=1.0.0"),
        ("preflight", "gpt2", "--topology=v5e:2x2", "--seq=64", "--batch-per-device=1"),
        ("launch", "no-such.py", "--local=2", "--devices=1"),
    ]
    flags = (*TRAIN, f"--data.source={text}", f"--out={new}")
    fields = [flag for flag in _number_flags() if not flag.startswith(tuple(TRAIN))]
    return [Invocation("gptjax", words) for words in gptjax] + 6 * [
        Invocation("quickstart", (*flags, *fields)),
        Invocation("quickstart", (*flags, "--data.tokenizer=bpe:270", "--data.packing=first_fit")),
    ]


@functools.cache
def _number_flags() -> tuple[str, ...]:
    """Every number in an experiment's config, as a flag with its default."""
    quickstart = importlib.import_module("quickstart")
    given = {word.partition("=")[0] for word in TRAIN}
    flags = []
    for section in ("model", "data", "optimizer", "train", "mesh"):
        values = getattr(quickstart.DEFAULTS, section)
        for field in dataclasses.fields(values):
            value, flag = getattr(values, field.name), f"--{section}.{field.name.replace('_', '-')}"
            if type(value) in (int, float) and flag not in given:
                flags.append(f"{flag}={value}")
    return tuple(flags)


def made_wrong(invocation: Invocation, draw: random.Random, material: Material) -> Invocation:
    """The invocation with one thing changed in a way that a person or a script might."""
    words = list(invocation.words)
    flags = [place for place, word in enumerate(words) if word.startswith("--")]
    numbers = [place for place in flags if re.search(r"=-?[\d.e-]+$", words[place])]
    paths = [place for place, word in enumerate(words) if "/" in word]

    def value(places: Sequence[int], values: Sequence[str]) -> None:
        place = draw.choice(places)
        flag, equals, _ = words[place].rpartition("=")
        words[place] = f"{flag}{equals}{draw.choice(values)}"

    ways: list[Callable[[], object]] = [
        lambda: words.pop(draw.randrange(len(words))),
        lambda: words.append(draw.choice(["--zzz", "stray", "--", "--debug=1", "-x", "é", ""])),
        lambda: words.append(draw.choice(words)),
    ]
    if flags:
        ways += [
            lambda: value(flags, ["", "é", "\udcff", "none", "x" * 5000]),
            lambda: words.append(words[draw.choice(flags)].partition("=")[0]),
            lambda: words.append(words[draw.choice(flags)].replace("e", "", 1)),
        ]
    if numbers:
        ways += 6 * [lambda: value(numbers, NUMBERS)]
    if paths:
        ways += 4 * [lambda: value(paths, material.paths())]
    draw.choice(ways)()
    wrong = invocation._replace(words=tuple(words))
    if draw.random() < 0.15:
        wrong = wrong._replace(encoding=draw.choice(ENCODINGS))
    if draw.random() < 0.05:
        wrong = wrong._replace(output="/dev/full")
    return wrong


def invoke(invocation: Invocation, directory: Path) -> forked.Ended:
    """How the command ends, in a process of its own."""

    def program() -> None:
        from gptjax import cli

        os.chdir(directory)
        if invocation.output:
            os.dup2(os.open(invocation.output, os.O_WRONLY), 1)
        for name, errors in (("stdout", "strict"), ("stderr", "backslashreplace")):
            raw = io.FileIO(getattr(sys, name).fileno(), "w", closefd=False)
            text = io.TextIOWrapper(
                io.BufferedWriter(raw), invocation.encoding, errors, line_buffering=True
            )
            setattr(sys, name, text)
        sys.argv = [invocation.program, *invocation.words]
        if invocation.program == "gptjax":
            cli.main()
        else:
            module = importlib.import_module(invocation.program)
            run = getattr(module, invocation.program)
            cli.run_experiment(run, {invocation.program: module.DEFAULTS}, "none", "")

    return forked.run(program, directory / "log", SECONDS)


def fault(ended: forked.Ended) -> str | None:
    """What is wrong with how a command ended; None if nothing is."""
    if ended.hung:
        return f"hung: {ended.said[-200:]}"
    if "Traceback" in ended.said or "Exception ignored" in ended.said:
        return f"traceback: {ended.said[-400:]}"
    if ended.code not in CODES:
        return f"exit code {ended.code}: {ended.said[-200:]}"
    if ended.code == 2 and not re.search(r"[.?]\W*\n?\W*$", ended.said):
        return f"no sentence: {ended.said[-200:]!r}"
    return None


class Tally(NamedTuple):
    """What a trial came to."""

    codes: collections.Counter[int]
    """How many commands ended with each exit code."""
    faults: list[str]
    """One sentence for each that ended otherwise than it may."""


def trial(directory: Path, count: int, seed: int = 0) -> Tally:
    """`count` wrong invocations, one after another."""
    material, draw = make_material(directory), random.Random(seed)
    right, codes, faults = templates(material), collections.Counter[int](), []
    for number in range(count):
        wrong = made_wrong(draw.choice(right), draw, material)
        ended = invoke(wrong, directory)
        codes[ended.code] += 1
        if found := fault(ended):
            faults.append(f"{wrong}: {found}")
            print(faults[-1])
        for path in directory.glob("new*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if (number + 1) % 20 == 0:
            print(f"{number + 1} of {count}, {len(faults)} faults")
    return Tally(codes, faults)


def main() -> None:
    """The trial as a command; its exit code is 1 if anything was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    prepare()
    start, directory = time.monotonic(), Path(tempfile.mkdtemp())
    tally = trial(directory, wanted.count, wanted.seed)
    ends = ", ".join(f"{number} with {code}" for code, number in sorted(tally.codes.items()))
    print(
        f"{wanted.count} wrong invocations in {time.monotonic() - start:.0f} s; ended: {ends}; "
        f"{len(tally.faults)} faults."
    )
    shutil.rmtree(directory)
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
