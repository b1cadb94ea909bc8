"""Damage files at random, and see whether what reads them notices.

    python tests/reliability/damage.py --changes 1000

Of everything that gptjax reads back, a file is changed: a bit, a byte, 64 bytes of zeros, its end
cut off, bytes added, all of it emptied or deleted. Reading it must then end in one sentence, or
give what it gave before; other content without a word is silent damage. Where others designed the
format (JSON lines, safetensors, GGUF …) and it holds no checksum, silence is counted and allowed;
a traceback or a hang never is.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import importlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import forked
import numpy as np
from kills import FLAGS, left, prepare

SECONDS = 120
"""After which a reader hangs."""
COMPARE = (
    "--variants", "quickstart", "quickstart:norm=rmsnorm", "--match", "none", "--budget",
    "tokens=1280", "--seeds", "2", "--rates", "1e-3", "--search-seeds", "1", "--evaluations", "2",
    "--context-length", "16", "--batch-size", "4", "--data.tokenizer", "characters",
    "--optimizer.warmup-steps", "2",
)  # fmt: skip


class Kind(NamedTuple):
    """A directory that gptjax reads back."""

    make: Callable[[Path, Path], object]
    """(directory, text) → files in the directory."""
    read: Callable[[Path], Any]
    """What is read from it, as JSON."""
    ours: bool
    """Whether we design the format, or write it with checksums: silence is then a fault."""
    skip: tuple[str, ...] = ()
    """Names that are for people or other programs and are never read back."""


def finished_run(directory: Path, text: Path) -> None:
    """A run that came to its end."""
    _quickstart(directory / "run", text)


def stopped_run(directory: Path, text: Path) -> None:
    """A run that was stopped after a checkpoint."""
    from gptjax.training import loop

    agreed = loop.agreed_stop
    loop.agreed_stop = lambda step, number: 15 if step == 6 else agreed(step, number)
    with contextlib.suppress(SystemExit):
        _quickstart(directory / "run", text)


def _quickstart(out: Path, text: Path) -> None:
    from gptjax.cli import run_experiment

    quickstart = importlib.import_module("quickstart")
    sys.argv = ["quickstart", *FLAGS, f"--data.source={text}", f"--out={out}"]
    run_experiment(quickstart.quickstart, {"quickstart": quickstart.DEFAULTS}, "none", "")


def read_finished_run(directory: Path) -> Any:
    """The config, the curve, and the model and tokenizer of every checkpoint."""
    from gptjax.config import to_dict
    from gptjax.runs.directory import load_config
    from gptjax.runs.loading import checkpoint_steps, load_run
    from gptjax.training.trackers.jsonl import read_jsonl

    run = directory / "run"
    found = {"config": to_dict(load_config(run)), "lines": read_jsonl(run / "metrics.jsonl")}
    found["best"] = load_run(run).step
    for step in checkpoint_steps(run):
        loaded = load_run(run, step)
        found[str(step)] = [_hashed(loaded.model), loaded.tokenizer.fingerprint]
    return found


def read_stopped_run(directory: Path) -> Any:
    """What it leaves when it has gone on to its end."""
    _quickstart(directory / "run", _text(directory))
    return left(directory / "run")


def _hashed(model: Any) -> str:
    import jax

    from gptjax.models.build import split

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(split(model)[1]):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _text(directory: Path) -> Path:
    """The text that all share, and whose path is a part of a run's config."""
    return directory.parent / "text.txt"


def make_cache(directory: Path, text: Path) -> None:
    """Tokens on disk, with a plan of packed rows."""
    read_cache(directory)


def read_cache(directory: Path) -> Any:
    """All tokens and rows that a run would train on."""
    from gptjax.config import DataConfig, TransformerConfig
    from gptjax.data.corpus import learn_tokenizer, open_corpus, open_sources
    from gptjax.data.pipeline import training_batches

    source = f"{_text(directory)}#documents=line"
    data = DataConfig(
        source=(source,), cache=str(directory / "cache"), tokenizer="bpe:270", packing="first_fit"
    )
    sources = open_sources(data)
    corpus = open_corpus(
        sources, learn_tokenizer(data, sources), data, TransformerConfig(context_length=32)
    )
    batches = training_batches(corpus.train, (), batch_size=4, seed=0)
    digest = hashlib.sha256()
    for _ in range(100):  # More than all rows.
        digest.update(np.asarray(next(batches).tokens).tobytes())
    return digest.hexdigest()


def make_dataset(directory: Path, text: Path) -> None:
    """What build-dataset writes."""
    from gptjax.commands import build_dataset

    build_dataset(f"{text}#documents=line", name="corpus", data_dir=directory)


def read_dataset(directory: Path) -> Any:
    """All documents."""
    return _documents(f"tfds:corpus#data_dir={directory}")


def make_exported(directory: Path, text: Path) -> None:
    """A run as Hugging Face's files."""
    from gptjax.commands import convert

    _quickstart(directory / "run", text)
    convert(str(directory / "run"), directory / "theirs")
    shutil.rmtree(directory / "run")


def read_exported(directory: Path) -> Any:
    """The weights."""
    import gptjax

    return _hashed(gptjax.from_huggingface(directory / "theirs"))


def make_comparison(directory: Path, text: Path) -> None:
    """A small study."""
    read_comparison(directory)


def read_comparison(directory: Path) -> Any:
    """Its results, once what is missing is trained again."""
    from gptjax import cli

    script = importlib.import_module("compare")
    source, out = str(_text(directory)), str(directory / "out")
    sys.argv = ["compare", *COMPARE, "--data.source", source, "--out", out]
    cli.run_command(script.compare, "")
    lines = (directory / "out" / "results.jsonl").read_text().splitlines()
    curves = [json.loads(line) for line in lines]
    return [{name: curve.get(name) for name in ("loss", "losses", "rate")} for curve in curves]


def make_texts(directory: Path, text: Path) -> None:
    """The same lines in every format that is read."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = text.read_text().splitlines()[:40]
    (directory / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (directory / "b.txt").write_text("\n".join(lines) + "\n")
    (directory / "c.txt.gz").write_bytes(gzip.compress((directory / "b.txt").read_bytes()))
    (directory / "d.tsv").write_text(
        "".join(f"{number}\t{line}\n" for number, line in enumerate(lines))
    )
    pq.write_table(pa.table({"text": lines}), directory / "e.parquet")


def read_texts(directory: Path) -> Any:
    """All documents of each."""
    options = {"b.txt": "#documents=line", "c.txt.gz": "#documents=line", "d.tsv": "#column=2"}
    names = ("a.jsonl", "b.txt", "c.txt.gz", "d.tsv", "e.parquet")
    return [_documents(f"{directory / name}{options.get(name, '')}") for name in names]


def _documents(spec: str) -> list[str]:
    from gptjax.data.sources import open_source

    documents = open_source(spec)
    return [documents[index] for index in range(len(documents))]


FOR_PEOPLE = ("tfevents", ".png", "samples.txt", "result.json")
KINDS = {
    "finished run": Kind(finished_run, read_finished_run, True, FOR_PEOPLE),
    "stopped run": Kind(stopped_run, read_stopped_run, True, FOR_PEOPLE),
    "cache": Kind(make_cache, read_cache, True, (".lock",)),
    "dataset": Kind(make_dataset, read_dataset, True),
    "comparison": Kind(make_comparison, read_comparison, True, (".html", ".md", ".csv")),
    "exported": Kind(make_exported, read_exported, False),
    "texts": Kind(make_texts, read_texts, False),
}


def damage(path: Path, draw: random.Random) -> str:
    """Change the file in one way, which is returned."""
    content = bytearray(path.read_bytes())
    place = draw.randrange(max(1, len(content)))
    way = draw.choice(["bit", "bit", "byte", "zeros", "cut", "added", "empty", "missing"])
    if way == "missing":
        path.unlink()
        return way
    if way == "bit" and content:
        content[place] ^= 1 << draw.randrange(8)
    elif way == "byte" and content:
        content[place] = (content[place] + draw.randrange(1, 256)) % 256
    elif way == "zeros":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif way == "cut":
        del content[place:]
    elif way == "added":
        content += draw.randbytes(10)
    else:
        content.clear()
    path.write_bytes(content)
    return f"{way} at {place}"


def outcome(ended: forked.Ended, found: Any, expected: Any) -> str:
    """`same`, `sentence`, `said` (other content, and words), `silent`, or a fault."""
    if ended.hung:
        return "hung"
    if "Traceback" in ended.said or "Exception ignored" in ended.said:
        return "traceback"
    if ended.code == 2:
        return "sentence"
    if ended.code != 0:
        return f"exit code {ended.code}"
    if found == expected:
        return "same"
    words = ("damaged", "missing", "lacks", "skipped")
    return "said" if any(word in ended.said for word in words) else "silent"


class Tally(NamedTuple):
    """What a trial came to."""

    outcomes: dict[str, dict[str, int]]
    """By kind of directory, how many changes had each outcome."""
    faults: list[str]
    """One sentence for each traceback, hang, or silence about a format of ours."""


def change(
    name: str, original: Path, work: Path, draw: random.Random, expected: Any
) -> tuple[str, str]:
    """Change a file of a copy of `original` and read it: the outcome, and how it came to it."""
    kind = KINDS[name]
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(original, work, symlinks=True)
    paths = [
        path
        for path in sorted(work.rglob("*"))
        if path.is_file() and not any(part in str(path.relative_to(work)) for part in kind.skip)
    ]
    path = draw.choice(paths)
    way = damage(path, draw)
    ended, found = read_by_another(kind.read, work)
    told = f"{name}: {path.relative_to(work)}, {way}: "
    return outcome(ended, found, expected), f"{told}{ended.said[-300:].strip()}"


def read_by_another(read: Callable[[Path], Any], directory: Path) -> tuple[forked.Ended, Any]:
    """How a process that reads the directory ends, and what it found."""
    path = directory.with_name(f"{directory.name}.found")
    path.unlink(missing_ok=True)

    def program() -> None:
        from gptjax.config import InputError

        try:
            path.write_text(json.dumps(read(directory)))
        except InputError as error:
            print(error)
            raise SystemExit(2) from None

    ended = forked.run(program, directory.with_name(f"{directory.name}.log"), SECONDS)
    return ended, json.loads(path.read_text()) if path.exists() else None


def trial(
    directory: Path, changes: int, *, seed: int = 0, names: tuple[str, ...] = tuple(KINDS)
) -> Tally:
    """`changes` changes, each kind of directory in turn."""
    text, draw = directory / "text.txt", random.Random(seed)
    text.write_text("".join(f"{n} and {n * n} are a number and its square.\n" for n in range(300)))
    expected = {}
    for name in names:
        original, work = directory / f"original {name}", directory / f"work {name}"
        original.mkdir()
        made = functools.partial(KINDS[name].make, original, text)
        ended = forked.run(made, directory / "log", SECONDS)
        assert ended.code == 0, ended.said
        shutil.copytree(original, work)
        ended, expected[name] = read_by_another(KINDS[name].read, work)
        assert ended.code == 0, ended.said
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    faults = []
    for number in range(changes):
        name = names[number % len(names)]
        original, work = directory / f"original {name}", directory / f"work {name}"
        found, how = change(name, original, work, draw, expected[name])
        outcomes[name][found] += 1
        if found not in ("same", "sentence", "said") and (KINDS[name].ours or found != "silent"):
            faults.append(f"{found}: {how}")
            print(faults[-1])
        if (number + 1) % 20 == 0:
            print(f"{number + 1} of {changes}, {len(faults)} faults")
    return Tally({name: dict(counted) for name, counted in outcomes.items()}, faults)


def main() -> None:
    """The trial as a command; its exit code is 1 if anything was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--changes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=tuple(KINDS))
    wanted = parser.parse_args()
    prepare()
    start, directory = time.monotonic(), Path(tempfile.mkdtemp())
    tally = trial(directory, wanted.changes, seed=wanted.seed, names=tuple(wanted.kinds))
    for name, counted in tally.outcomes.items():
        print(f"{name}: {', '.join(f'{count} {what}' for what, count in sorted(counted.items()))}")
    print(
        f"{wanted.changes} changes in {time.monotonic() - start:.0f} s, {len(tally.faults)} faults."
    )
    shutil.rmtree(directory)
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
