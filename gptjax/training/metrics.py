"""What a run tells of itself while it trains: throughput, MFU, and the places they are written."""

import contextlib
import importlib
import itertools
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import psutil

from gptjax.config import (
    SEAL,
    InputError,
    TrainConfig,
    parse_json,
    read_json_object,
    sealed,
    unsealed,
)
from gptjax.costs.chips import chip_of
from gptjax.distributed import is_first
from gptjax.system.disk import DiskError, replacing
from gptjax.training.checkpoint_files import CHECKPOINTS, survey
from gptjax.training.console import ConsoleWriter
from gptjax.training.tensorboard import TensorBoardWriter

METRICS = "metrics.jsonl"
MFU_FORMULA = "MFU = tokens/s × training FLOPs per token / peak FLOP/s"
"""Model FLOPs utilisation, after PaLM (Chowdhery et al. 2022, appendix B)."""


BUSY = 0.1
"""Share of a machine's CPU time from which on other programs spoil a measurement."""
CLOCK_TICK = 0.01
"""Seconds that a system counts CPU time in."""


class Peak(NamedTuple):
    """The most that a device could do."""

    flops: float
    """FLOP/s of all devices together."""
    source: str
    """Where the figure comes from, for the reader of the log."""


def peak_flops() -> Peak:
    """The peak of the devices in use: the data sheet's where it is known, else measured here."""
    device, count = jax.devices()[0], jax.device_count()
    chip = chip_of(device.device_kind)
    if chip is not None:
        flops = count * chip.flops / chip.devices
        return Peak(flops, f"{count} × {device.device_kind}, dense bfloat16 data sheet")
    if device.platform == "cpu":
        # Virtual CPU devices share the cores that one product already uses.
        before, others_before = _cpu_seconds()
        measured = measured_matmul_flops()
        after, others_after = _cpu_seconds()
        source = "a 2048 × 2048 × 2048 float32 product, measured now"
        busy = (others_after - others_before) / max(after - before, CLOCK_TICK)
        if busy > BUSY:
            source += f" while other programs took {busy:.0%} of the CPU, so MFU reads too high"
        return Peak(measured, source)
    measured = count * measured_matmul_flops()
    return Peak(measured, f"{count} × {device.device_kind}, a 2048³ float32 product measured now")


def _cpu_seconds() -> tuple[float, float]:
    """CPU time of this machine so far, idle time too, and how much of it other programs took."""
    times = psutil.cpu_times()
    guests = getattr(times, "guest", 0) + getattr(times, "guest_nice", 0)  # In user and nice, too.
    everything, idle = sum(times) - guests, times.idle + getattr(times, "iowait", 0)
    return everything, everything - idle - time.process_time()


def measured_matmul_flops(size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of the fastest of a few float32 products of size × size matrices."""
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


class Writer(Protocol):
    """A place for scalars."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record `scalars` at `step`."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


@runtime_checkable
class DurableWriter(Writer, Protocol):
    """A writer whose lines must be on the disk before the checkpoint that they lead to."""

    def write_through(self, step: int, scalars: dict[str, float] | None) -> None:
        """Record `scalars`, if there are any, and return when all so far is on the disk."""
        ...


@contextlib.contextmanager
def open_writers(directory: Path, config: TrainConfig, resume_step: int) -> Iterator[list[Writer]]:
    """The writers of a run that goes on from `resume_step`; in process 0 alone.

    Weights & Biases is one of them where its own variable `WANDB_PROJECT` is set.
    """
    writers: list[Writer] = []
    if not is_first():
        yield writers
        return
    with contextlib.ExitStack() as opened:

        def add(writer: Writer) -> None:
            opened.callback(writer.close)
            writers.append(writer)

        if project := os.environ.get("WANDB_PROJECT"):
            add(WandbWriter(project, directory))
        add(JsonlWriter(directory / METRICS, resume_step, config.log_every))
        add(TensorBoardWriter(directory, read_jsonl(directory / METRICS)))
        add(ConsoleWriter(config.steps))
        yield writers


class JsonlWriter:
    """One JSON object a line, `step` first; lines of steps after `resume_step` are dropped.

    So are damaged ones, with a sentence on standard error that says which, as it does of lines that
    are missing at the end where there should be one for every `log_every` steps. A line ends with
    its checksum (`gptjax.config.sealed`).
    """

    def __init__(self, path: Path, resume_step: int, log_every: int):
        self._path = path
        kept = [line for line in _undamaged(path) if line["step"] <= resume_step]
        _say_lost_behind(path, kept, resume_step, log_every)
        text = "".join(map(line_of, kept)).encode()
        if not path.exists() or path.read_bytes() != text:
            with replacing(path, path.with_suffix(".tmp")) as file:
                file.write(text)
        self._file = path.open("a")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Append one line, at once readable by others."""
        self._append(step, scalars)

    def write_through(self, step: int, scalars: dict[str, float] | None) -> None:
        """Append one line, if there are scalars, and return when all lines are on the disk.

        Raises:
          OSError: the disk fails.
          DiskError: the file is no longer where it was.
        """
        if scalars is not None:
            self._append(step, scalars)
        os.fsync(self._file.fileno())
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                return
        raise DiskError(f"{self._path} was deleted or replaced while this run wrote it.")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, step: int, scalars: dict[str, float]) -> None:
        self._file.write(line_of({"step": step, **scalars}))
        self._file.flush()


class WandbWriter:
    """Weights & Biases; a run that goes on in its directory goes on there too.

    Raises:
      InputError: wandb is not installed.
    """

    def __init__(self, project: str, directory: Path):
        try:
            # By name, since the package is there only with the extra `wandb`.
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise InputError(
                "WANDB_PROJECT is set, but the package wandb is not installed: "
                "pip install -e '.[wandb]', or unset it."
            ) from error
        identity = directory / "wandb" / "run_id"
        if not identity.exists():
            identity.parent.mkdir(exist_ok=True)
            identity.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            name=directory.name,
            id=identity.read_text(),
            resume="allow",
            dir=directory,
            config=json.loads((directory / "config.json").read_text()),
        )

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Log the scalars of one step."""
        self._run.log(scalars, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, if it is there, without a last one that was cut short.

    Those that are damaged are left out, and a sentence on standard error says which: what is no
    object of numbers, or has a step that its neighbours cannot have. So it does of lines that are
    missing at the end: they were on the disk before the newest of the run's checkpoints.
    """
    lines = _undamaged(path)
    checkpoints, config = path.parent / CHECKPOINTS, path.parent / "config.json"
    if path.exists():
        with contextlib.suppress(InputError, KeyError, TypeError):
            log_every = read_json_object(config)["train"]["log_every"]
            _say_lost_behind(path, lines, max(survey(checkpoints)[0], default=0), log_every)
    return lines


def _say_lost_behind(path: Path, lines: list[dict[str, Any]], until: int, log_every: int) -> None:
    """Say that lines are missing at the end, if there should be some up to the step `until`."""
    last = lines[-1]["step"] if lines else 0
    if until // log_every > last // log_every:
        lost = f"those behind step {last}" if lines else "all"
        print(f"{path}: lines are lost, {lost} up to step {until}.", file=sys.stderr)


def _undamaged(path: Path) -> list[dict[str, Any]]:
    """The lines but for damaged ones, which are named on standard error."""
    if not path.exists():
        return []
    *written, _ = path.read_bytes().split(b"\n")
    sealed_lines = any(f'"{SEAL}"'.encode() in text for text in written)
    kept: list[tuple[int, dict[str, Any]]] = []
    for number, text in enumerate(written, 1):
        line = _scalars(text, sealed_lines)
        if line is None:
            continue
        if kept and line["step"] <= kept[-1][1]["step"]:
            if len(kept) > 1 and line["step"] <= kept[-2][1]["step"]:
                continue
            kept.pop()
        kept.append((number, line))
    if lost := sorted(set(range(1, len(written) + 1)) - {number for number, _ in kept}):
        print(f"{path}: {_loss(lost, kept)}.", file=sys.stderr)
    return [line for _, line in kept]


def line_of(scalars: dict[str, Any]) -> str:
    """The line of a `metrics.jsonl` with these scalars, `step` first, and its checksum."""
    return json.dumps(sealed(scalars)) + "\n"


def _scalars(text: bytes, sealed_lines: bool) -> dict[str, Any] | None:
    """A line's content; None of one that is not what was written, or that nothing here writes."""
    try:
        line = parse_json(text, "a line")
        if sealed_lines and isinstance(line, dict):
            line = unsealed(line, "a line")
    except InputError:
        return None
    numbers = isinstance(line, dict) and all(type(value) in (int, float) for value in line.values())
    return line if numbers and type(line.get("step")) is int else None


def _loss(lost: list[int], kept: list[tuple[int, dict[str, Any]]]) -> str:
    """Which lines were lost, as far as those around them tell."""
    words = []
    for _, run in itertools.groupby(enumerate(lost), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        which = f"line {numbers[0]}" if len(numbers) == 1 else f"lines {numbers[0]}-{numbers[-1]}"
        before = [line["step"] for number, line in kept if number < numbers[0]][-1:]
        after = [line["step"] for number, line in kept if number > numbers[0]][:1]
        where = [f"behind step {step}" for step in before]
        where += [f"before step {step}" for step in after]
        words.append(f"{which} ({' and '.join(where)})" if where else which)
    verb = "is damaged and is" if len(lost) == 1 else "are damaged and are"
    return f"{', '.join(words)} {verb} left out"
