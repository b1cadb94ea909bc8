"""Training metrics: throughput, MFU, and the writers of metrics.jsonl and Weights & Biases."""

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
import numpy as np
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
from gptjax.training.console import ConsoleWriter, ProgressLine, in_notebook
from gptjax.training.tensorboard import TensorBoardWriter

METRICS = "metrics.jsonl"
MFU_FORMULA = "MFU = tokens/s × training FLOPs per token / peak FLOP/s"
"""Model FLOPs utilisation, after PaLM (Chowdhery et al. 2022, appendix B)."""


BUSY = 0.1
"""Share of a machine's CPU time above which other programs spoil a measurement."""
CLOCK_TICK = 0.01
"""Resolution of the system's CPU times, seconds."""


class Peak(NamedTuple):
    """Peak arithmetic throughput."""

    flops: float
    """FLOP/s of all devices together."""
    source: str
    """Where the figure comes from, for the log."""


def peak_flops() -> Peak:
    """The peak of all devices: from the data sheet where it is known, else measured here."""
    device, count = jax.devices()[0], jax.device_count()
    chip = chip_of(device.device_kind)
    if chip is not None:
        flops = count * chip.flops / chip.devices
        return Peak(flops, f"{count} × {device.device_kind}, dense bfloat16 data sheet")
    if device.platform == "cpu":
        # Virtual CPU devices share the cores, all of which one matmul already uses.
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
    """CPU seconds of this machine so far, idle included, and those taken by other programs."""
    times = psutil.cpu_times()
    guests = getattr(times, "guest", 0) + getattr(
        times, "guest_nice", 0
    )  # Counted in user and nice too.
    everything, idle = sum(times) - guests, times.idle + getattr(times, "iowait", 0)
    return everything, everything - idle - time.process_time()


def measured_matmul_flops(size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of the fastest of a few float32 matmuls of size × size matrices."""
    matrix = jax.device_put(np.ones((size, size), np.float32))
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


class Writer(Protocol):
    """A destination of scalars."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Record `scalars` at `step`."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


@runtime_checkable
class DurableWriter(Writer, Protocol):
    """A writer whose lines must be on disk before the checkpoint of the last of their steps."""

    def write_through(self) -> None:
        """Return when everything so far is on disk."""
        ...


@contextlib.contextmanager
def open_writers(directory: Path, config: TrainConfig, resume_step: int) -> Iterator[list[Writer]]:
    """The writers of a run that resumes from `resume_step`; none in processes other than 0.

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
        add(ProgressLine(config.steps) if in_notebook() else ConsoleWriter(config.steps))
        yield writers


class JsonlWriter:
    """JSON Lines, `step` first; lines of steps after `resume_step` are dropped.

    Damaged lines are dropped too, and named on standard error, as are lines missing at the end,
    where there should be one for every `log_every` steps. Each line ends with its checksum
    (`gptjax.config.sealed`).
    """

    def __init__(self, path: Path, resume_step: int, log_every: int):
        self._path = path
        kept = [line for line in _undamaged(path) if line["step"] <= resume_step]
        _report_missing(path, kept, resume_step, log_every)
        text = "".join(map(line_of, kept)).encode()
        if not path.exists() or path.read_bytes() != text:
            with replacing(path, path.with_suffix(".tmp")) as file:
                file.write(text)
        self._file = path.open("a")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Append one line, which other processes can read at once."""
        self._file.write(line_of({"step": step, **scalars}))
        self._file.flush()

    def write_through(self) -> None:
        """Return when all lines are on disk.

        Raises:
          OSError: the disk fails.
          DiskError: the file was deleted or replaced.
        """
        os.fsync(self._file.fileno())
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                return
        raise DiskError(f"{self._path} was deleted or replaced while this run was writing it.")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandbWriter:
    """Weights & Biases; a run that is resumed in its directory is resumed there too.

    Raises:
      InputError: wandb is not installed.
    """

    def __init__(self, project: str, directory: Path):
        try:
            # By name, since the package is installed only with the extra `wandb`.
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
    """The lines of a `metrics.jsonl`, if it exists, without an incomplete last line.

    Damaged lines are skipped and named on standard error: those that are no object of numbers, or
    whose step is out of order. So are lines missing at the end, since lines are on disk before the
    checkpoint of their step.
    """
    lines = _undamaged(path)
    checkpoints, config = path.parent / CHECKPOINTS, path.parent / "config.json"
    if path.exists():
        with contextlib.suppress(InputError, KeyError, TypeError):
            log_every = read_json_object(config)["train"]["log_every"]
            _report_missing(path, lines, max(survey(checkpoints)[0], default=0), log_every)
    return lines


def _report_missing(path: Path, lines: list[dict[str, Any]], until: int, log_every: int) -> None:
    """Say on standard error if lines up to the step `until` are missing at the end."""
    last = lines[-1]["step"] if lines else 0
    if until // log_every > last // log_every:
        lost = f"those after step {last}" if lines else "all"
        print(f"{path}: lines are missing, {lost} up to step {until}.", file=sys.stderr)


def _undamaged(path: Path) -> list[dict[str, Any]]:
    """The undamaged lines; the others are named on standard error."""
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
    """A line of a `metrics.jsonl`: these scalars, `step` first, and their checksum."""
    return json.dumps(sealed(scalars)) + "\n"


def _scalars(text: bytes, sealed_lines: bool) -> dict[str, Any] | None:
    """The content of a line; None of a damaged line, or one that no writer here writes."""
    try:
        line = parse_json(text, "a line")
        if sealed_lines and isinstance(line, dict):
            line = unsealed(line, "a line")
    except InputError:
        return None
    numbers = isinstance(line, dict) and all(type(value) in (int, float) for value in line.values())
    return line if numbers and type(line.get("step")) is int else None


def _loss(lost: list[int], kept: list[tuple[int, dict[str, Any]]]) -> str:
    """Which lines were lost, with the steps of the lines around them."""
    words = []
    for _, run in itertools.groupby(enumerate(lost), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        which = f"line {numbers[0]}" if len(numbers) == 1 else f"lines {numbers[0]}-{numbers[-1]}"
        before = [line["step"] for number, line in kept if number < numbers[0]][-1:]
        after = [line["step"] for number, line in kept if number > numbers[0]][:1]
        where = [f"after step {step}" for step in before]
        where += [f"before step {step}" for step in after]
        words.append(f"{which} ({' and '.join(where)})" if where else which)
    verb = "is damaged and is" if len(lost) == 1 else "are damaged and are"
    return f"{', '.join(words)} {verb} skipped"
