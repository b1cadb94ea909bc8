"""The results of a finished run: result.json, then figures and samples."""

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gptjax import distributed
from gptjax.costs.model import model_cost
from gptjax.data.corpus import Corpus, Sources
from gptjax.data.pipeline import bits_per_byte
from gptjax.runs.bucket import address, push
from gptjax.runs.data import Data
from gptjax.runs.directory import RESULT, SHOWING
from gptjax.runs.loading import Run, load_run
from gptjax.system.disk import is_failure, write_json
from gptjax.training.loop import Fit

Show = Callable[[Run, Sources, Corpus, Path], str]
"""(trained run, text sources, corpus, directory) → the names of the files that it wrote."""


def finish(out: Path, data: Data, fitted: Fit, *, show: Show | None) -> None:
    """Write result.json and the figures and samples of `show`; print a summary of both.

    result.json comes first: a figure that fails is a warning, and the run is finished. None makes
    no figures. Of several processes only process 0 does it.
    """
    if not distributed.is_first():
        return
    reached = result(data, fitted)
    if show is None:
        write_json(out / RESULT, reached)
        print(summary(reached))
        return
    (out / SHOWING).touch()
    write_json(out / RESULT, reached)
    push(out)
    try:
        shown = f"{show(load_run(out), data.sources, data.corpus, out)}, "
    except Exception as error:  # Of whatever kind.
        if is_failure(error):
            raise
        shown = ""
        print(f"Warning: no figures or samples were made: {error}", file=sys.stderr)
    (out / SHOWING).unlink()
    files = f"{shown}result.json, metrics.jsonl, checkpoints/"
    if "tensorboard" in data.config.train.track:
        files += ", train/ and validation/ for TensorBoard"
    print(f"{summary(reached)}\nIn {address(out)}: {files}.")


def result(data: Data, fitted: Fit) -> dict[str, Any]:
    """The content of result.json: losses, sizes, times, software and machine."""
    progress = fitted.progress
    reached = {
        "final_validation_loss": progress.last_loss,
        "best_validation_loss": progress.best_loss,
        "best_step": progress.best_step,
        "parameters": model_cost(data.config.model).parameters,
        "tokens_seen": progress.tokens,
        "wall_seconds": progress.seconds,
        "compile_seconds": fitted.compile_seconds,
        **environment(),
    }
    if data.corpus.predicted:
        for name in ("final", "best"):
            loss = reached[f"{name}_validation_loss"]
            reached[f"{name}_bits_per_byte"] = bits_per_byte(data.corpus.predicted, loss)
    return reached


def environment() -> dict[str, Any]:
    """The versions, devices and machine of a result."""
    device = jax.devices()[0]
    return {
        "versions": distributed.versions(),
        "device": f"{jax.device_count()} × {device.device_kind}",
        "machine": platform.platform(),
    }


def summary(reached: dict[str, Any]) -> str:
    """The best validation loss and the time taken, in a line."""
    bits = reached.get("best_bits_per_byte")
    return (
        f"Best validation loss {reached['best_validation_loss']:.4f} nats per token"
        f"{f', {bits:.3f} bits per byte' if bits else ''}, at step {reached['best_step']}; "
        f"{reached['wall_seconds']:.0f} s."
    )
