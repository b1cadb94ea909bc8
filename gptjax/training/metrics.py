"""What a run tells of itself while it trains: throughput, MFU, and the places they are written."""

import contextlib
import importlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from gptjax.chips import chip_of
from gptjax.config import InputError
from gptjax.distributed import is_first
from gptjax.training.console import ConsoleWriter

MFU_FORMULA = "MFU = tokens/s × training FLOPs a token / peak FLOP/s"
"""Model FLOPs utilisation, after PaLM (Chowdhery et al. 2022, appendix B)."""


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
        return Peak(measured_matmul_flops(), "a 2048 × 2048 × 2048 float32 product, measured now")
    measured = count * measured_matmul_flops()
    return Peak(measured, f"{count} × {device.device_kind}, a 2048³ float32 product measured now")


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


@contextlib.contextmanager
def open_writers(directory: Path, steps: int, resume_step: int) -> Iterator[list[Writer]]:
    """The writers of a run of `steps` steps that goes on from `resume_step`; in process 0 alone.

    Weights & Biases is one of them where its own variable `WANDB_PROJECT` is set.
    """
    writers: list[Writer] = []
    if not is_first():
        yield writers
        return
    if project := os.environ.get("WANDB_PROJECT"):
        writers.append(WandbWriter(project, directory))
    writers += [
        JsonlWriter(directory / "metrics.jsonl", resume_step),
        TensorBoardWriter(directory / "tensorboard", resume_step),
        ConsoleWriter(steps),
    ]
    try:
        yield writers
    finally:
        for writer in writers:
            writer.close()


class JsonlWriter:
    """One JSON object a line, `step` first; lines of steps after `resume_step` are dropped."""

    def __init__(self, path: Path, resume_step: int):
        kept = [line for line in read_jsonl(path) if line["step"] <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self._file = path.open("a")

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Append one line, at once readable by others."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """TensorBoard event files."""

    def __init__(self, directory: Path, resume_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add each scalar under its name."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


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
    """The objects of a JSONL file, if it is there, without a last line that was cut short."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
