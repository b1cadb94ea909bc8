"""Kill training runs, again and again, and compare what they leave with a run left alone.

    python tests/reliability/kills.py --kills 1000
    python tests/reliability/kills.py --kills 50 --processes 2 --bucket

A run of experiments/quickstart.py, in one process or in two, is killed by SIGKILL at a random
moment, at a random change of a file in its directory, or at one while it writes its results;
started again by the same command, and so on to its end. Then every step, line of metrics, point in
TensorBoard, checkpoint, sample and result must be that of the run left alone, bit for bit; speeds
and times differ and are left out.

With `--bucket` the runs are in a bucket of an S3 server on this machine, which takes
`pip install 's3fs[boto3]' 'moto[server]'`. Then no two processes share a directory, and a run of
two processes goes on now in one with two devices, now in two.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import buckets
import forked
import numpy as np

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FLAGS = (
    "--model.depth=1",
    "--model.width=16",
    "--model.heads=2",
    "--model.context_length=32",
    "--model.dropout=0.1",
    "--train.steps=12",
    "--train.batch-size=4",
    "--train.log-every=1",
    "--train.eval-every=3",
    "--train.checkpoint-every=4",
    "--train.keep-every=8",
    "--optimizer.warmup-steps=1",
)
TIMES = {"tokens_per_second", "data_wait", "mfu", "wall_seconds", "compile_seconds", "crc32"}
"""What no two runs have in common: times, and the checksum of a line with times."""
CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link"}
"""Python's audit events that change a directory; `open` does if it may write."""
BUCKET, DEVICES = "trial", "JAX_NUM_CPU_DEVICES"
KILLED = -signal.SIGKILL
SECONDS = 120
"""After which a run that should have ended hangs."""


class Kill(NamedTuple):
    """When one process of a run is killed."""

    kind: str
    """`moment`, `change`, or `result`: a change once training is over."""
    at: float
    """Seconds from the start, or the number of the change."""
    process: int
    """Which one of the run's."""


def drawn_kill(draw: random.Random, processes: int, seconds: float) -> Kill:
    """A kill somewhere in a run that takes about `seconds` and changes a few hundred files."""
    kind = draw.choice(["moment", "change", "result"])
    at = {
        "moment": draw.uniform(0, 0.9 * seconds),
        "change": draw.randint(1, 120),
        "result": draw.randint(1, 12),
    }
    return Kill(kind, at[kind], draw.randrange(processes))


def address(out: Path) -> str:
    """Where the run is: its directory, or its URL in the bucket."""
    return f"s3://{BUCKET}/{out.name}" if buckets.ENDPOINT in os.environ else str(out)


def train(out: Path, text: Path, kill: Kill | None, process: int, processes: int, port: int):
    """One process of the run; the program of a forked process."""
    import jax

    jax.config.update("jax_num_cpu_devices", int(os.environ[DEVICES]) // processes)
    if processes > 1:
        os.environ["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
        os.environ["JAX_NUM_PROCESSES"] = str(processes)
        os.environ["JAX_PROCESS_ID"] = str(process)
        os.environ["GPTJAX_SECRET"] = "known to the processes of a trial"
    if kill and kill.process == process and kill.kind != "moment":
        local = Path(os.environ["XDG_CACHE_HOME"]) if buckets.ENDPOINT in os.environ else out
        die_at_change(local, int(kill.at), "loss.png" if kill.kind == "result" else "")
    from gptjax.cli import run_experiment

    quickstart = importlib.import_module("quickstart")
    sys.argv = ["quickstart", *FLAGS, f"--data.source={text}", f"--out={address(out)}"]
    run_experiment(quickstart.quickstart, {"quickstart": quickstart.DEFAULTS}, "none", "")


def die_at_change(directory: Path, number: int, first: str) -> None:
    """Have this process killed at change `number` of a file in `directory`, from `first` on."""
    inside, counted = str(directory), 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal counted
        if event not in CHANGES or not str(arguments[0]).startswith(inside):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if counted or first in str(arguments[0]):
            counted += 1
        if counted == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def run_once(
    out: Path, text: Path, kill: Kill | None, processes: int, port: int
) -> list[forked.Ended]:
    """Run it until it ends or is killed; how each of its processes ended."""
    logs = [out.with_name(f"{out.name}-{process}.log") for process in range(processes)]
    started = [
        forked.start(functools.partial(train, out, text, kill, process, processes, port), log)
        for process, log in enumerate(logs)
    ]
    if kill and kill.kind == "moment":
        time.sleep(kill.at)
        os.kill(started[kill.process], signal.SIGKILL)
    ended = []
    for pid, log in zip(started, logs, strict=True):
        code, hung = forked.wait(pid, SECONDS)
        ended.append(forked.Ended(code, log.read_text(errors="replace"), hung))
    return ended


def left(run: Path) -> dict[str, Any]:
    """What a finished run left, by the name of each thing, without times."""
    from gptjax.system.mirrors import copied

    with copied(Path(address(run))) as out:
        return _left(out)


def _left(out: Path) -> dict[str, Any]:
    # Whoever was killed behind its last file leaves a lock that nobody holds.
    names = {path.name for path in out.iterdir() if not path.name.startswith(".lock")}
    names -= {".mirror.json"}
    found: dict[str, Any] = {"files": sorted(names)}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found["steps"] = [line["step"] for line in lines]
    found["lines"] = [_without_times(line) for line in lines]
    found["points"] = tensorboard_points(out / "train")
    found["points of validation"] = tensorboard_points(out / "validation")
    found["result"] = _without_times(json.loads((out / "result.json").read_text()))
    for name in ("samples.txt", "attention.png", "loss.png"):
        found[name] = hashlib.sha256((out / name).read_bytes()).hexdigest()
    found["checkpoints"] = checkpoint_hashes(out)
    return found


def _without_times(scalars: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in scalars.items() if name not in TIMES}


def tensorboard_points(directory: Path) -> list[tuple[str, int, float]]:
    """The points that TensorBoard shows: those before a restart that purges them are gone."""
    import struct

    from tensorboardX.proto import event_pb2

    points: list[tuple[str, int, float]] = []
    for path in sorted(directory.glob("events*")):
        content, place = path.read_bytes(), 0
        while place + 12 <= len(content):
            (size,) = struct.unpack_from("<Q", content, place)
            record = content[place + 12 : place + 12 + size]
            place += 16 + size
            if len(record) < size:
                break  # Cut short by a kill.
            event = vars(event_pb2)["Event"].FromString(record)
            if event.HasField("session_log"):
                points = [point for point in points if point[1] < event.step]
            points += [
                (value.tag, event.step, value.simple_value)
                for value in event.summary.value
                if value.HasField("simple_value") and value.tag not in TIMES
            ]
    return sorted(points)


def checkpoint_hashes(out: Path) -> dict[str, str]:
    """A hash of the parameters of each checkpoint that the run keeps."""
    import jax

    from gptjax.models.build import split
    from gptjax.runs.loading import checkpoint_steps, load_run

    hashes = {}
    for step in checkpoint_steps(out):
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(split(load_run(out, step).model)[1]):
            digest.update(np.asarray(leaf).tobytes())
        hashes[str(step)] = digest.hexdigest()
    return hashes


def left_by_another(out: Path) -> dict[str, Any]:
    """`left`, read in a process of its own."""
    path = out.with_name(f"{out.name}.left")

    def read() -> None:
        path.write_text(json.dumps(left(out)))

    ended = forked.run(read, out.with_name(f"{out.name}-left.log"))
    return json.loads(path.read_text()) if ended.code == 0 else {"unreadable": ended.said}


def differences(found: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    """What is lost, repeated or different, a sentence each."""
    problems = []
    for name in found.keys() | whole.keys():
        here, there = found.get(name), whole.get(name)
        if here == there:
            continue
        if isinstance(here, list) and isinstance(there, list):
            words = [json.dumps(item) for item in here], [json.dumps(item) for item in there]
            counts = collections.Counter(words[0]), collections.Counter(words[1])
            lost = sorted((counts[1] - counts[0]).elements())
            more = sorted((counts[0] - counts[1]).elements())
            problems.append(f"{name}: lost {lost[:3]}, repeated or different {more[:3]}")
        else:
            problems.append(f"{name}: {str(here)[:200]} instead of {str(there)[:200]}")
    return problems


class Tally(NamedTuple):
    """What a trial came to."""

    kills: dict[str, int]
    """How many of each kind ended a process."""
    runs: int
    """Killed runs that came to their end."""
    problems: list[str]
    """One sentence for each thing that was lost, repeated, different, stuck or a traceback."""


def killed_runs(
    directory: Path,
    text: Path,
    whole: dict[str, Any],
    *,
    kills: int,
    processes: int,
    seed: int,
    seconds: float,
) -> Tally:
    """Runs one after another, each killed and started again until it ends."""
    draw, counted, runs, problems = random.Random(seed), collections.Counter[str](), 0, []
    while counted.total() < kills:
        out, history, found = directory / f"{seed}-{runs}", [], []
        while not found:
            now = draw.randint(1, processes) if buckets.ENDPOINT in os.environ else processes
            kill = drawn_kill(draw, now, seconds)
            history.append(f"{kill.kind} {kill.at:.3g} of process {kill.process} of {now}")
            ended = run_once(out, text, kill, now, port=20_000 + seed % 10_000)
            found = list(troubles(ended, now))
            if ended[kill.process].code != KILLED:
                break
            counted[kill.kind] += 1
        if not found:
            found = differences(left_by_another(out), whole)
        problems += [f"{out.name}: {' then '.join(history)}: {trouble}" for trouble in found]
        runs += 1
        print(f"{counted.total()} kills, {runs} runs", *problems[-len(found) or len(problems) :])
        if not found:
            shutil.rmtree(out, ignore_errors=True)
    return Tally(counted, runs, problems)


def troubles(ended: list[forked.Ended], processes: int) -> Iterator[str]:
    """What no process of a run may do, whatever happens to it or to another."""
    # With process 0 JAX's own service ends, and may abort the others before they say why.
    lost = {75, -signal.SIGABRT} if processes > 1 else set()
    for process, end in enumerate(ended):
        if end.hung:
            yield f"process {process} hung: {end.said[-300:]}"
        elif end.code not in {0, KILLED} | lost:
            yield f"process {process} ended with {end.code}: {end.said[-300:]}"
        elif "Traceback" in end.said:
            yield f"process {process} showed a traceback: {end.said[-600:]}"


def trial(
    directory: Path, kills: int, *, processes: int = 1, seed: int = 0, at_once: int = 2
) -> Tally:
    """Kill runs below `directory`, `kills` times or a few more, `at_once` runs side by side."""
    text, whole = directory / "text.txt", directory
    text.write_text("".join(f"{n} and {n * n} are a number and its square.\n" for n in range(300)))
    start = 0.0
    for whole in (directory / "compiled", directory / "whole"):
        # The second has its programs compiled, and so its usual length.
        start = time.monotonic()
        for end in run_once(whole, text, None, processes, port=20_000 + seed % 10_000):
            assert end.code == 0, end.said
    seconds, expected = time.monotonic() - start, left_by_another(whole)

    def share(number: int) -> None:
        tally = killed_runs(
            directory,
            text,
            expected,
            kills=-(-kills // at_once),
            processes=processes,
            seed=at_once * seed + number,
            seconds=seconds,
        )
        (directory / f"share-{number}.json").write_text(json.dumps(tally))

    started = [forked.start(functools.partial(share, number)) for number in range(at_once)]
    for pid in started:
        assert forked.wait(pid, math.inf) == (0, False)
    shares = [(directory / f"share-{number}.json").read_text() for number in range(at_once)]
    tallies = [Tally(*json.loads(share)) for share in shares]
    counted = sum((collections.Counter(tally.kills) for tally in tallies), collections.Counter())
    problems = [problem for tally in tallies for problem in tally.problems]
    return Tally(counted, sum(tally.runs for tally in tallies), problems)


def prepare(devices: int = 1) -> None:
    """Import, before any process is forked, what a run on `devices` devices imports."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ[DEVICES] = str(devices)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    sys.path.insert(0, str(EXPERIMENTS))
    for name in ("quickstart", "gptjax.cli", "tensorboardX", "matplotlib.pyplot"):
        importlib.import_module(name)


def main() -> None:
    """The trial as a command; its exit code is 1 if anything was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side")
    parser.add_argument("--bucket", action="store_true", help="keep the runs in a bucket")
    wanted = parser.parse_args()
    prepare(wanted.processes)
    start, directory = time.monotonic(), Path(tempfile.mkdtemp())
    with buckets.s3(BUCKET, directory) if wanted.bucket else contextlib.nullcontext():
        tally = trial(
            directory,
            wanted.kills,
            processes=wanted.processes,
            seed=wanted.seed,
            at_once=wanted.at_once,
        )
    kinds = ", ".join(f"{number} by {kind}" for kind, number in sorted(tally.kills.items()))
    print(
        f"{sum(tally.kills.values())} kills ({kinds}) of {tally.runs} runs of {wanted.processes} "
        f"processes, in {time.monotonic() - start:.0f} s: {len(tally.problems)} problems."
    )
    if tally.problems:
        print(*tally.problems, f"Their directories are in {directory}.", sep="\n")
        sys.exit(1)
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
