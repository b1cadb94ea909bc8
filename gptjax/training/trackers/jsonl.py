"""metrics.jsonl: the scalars of a run that resumption, figures and reports read again."""

import contextlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

from gptjax.config import (
    SEAL,
    InputError,
    TrainConfig,
    from_dict,
    parse_json,
    sealed,
    unsealed,
)
from gptjax.system.disk import DiskError, replacing
from gptjax.training.checkpoint_files import CHECKPOINTS, survey
from gptjax.training.trackers.protocol import run_config

METRICS = "metrics.jsonl"


class JsonlTracker:
    """JSON Lines, `step` first; lines of steps after `resume_step` are dropped.

    Damaged lines are dropped too, and named on standard error, as are lines missing at the end:
    each step that `config` logs or evaluates has one. Each line ends with its checksum
    (`gptjax.config.sealed`).
    """

    def __init__(self, path: Path, resume_step: int, config: TrainConfig):
        self._path = path
        kept = [line for line in _undamaged(path) if line["step"] <= resume_step]
        _report_missing(path, kept, _last_logged(resume_step, config))
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


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, if it exists, without an incomplete last line.

    Damaged lines are skipped and named on standard error: those that are no object of numbers, or
    whose step is out of order. So are lines missing at the end, since lines are on disk before the
    checkpoint of their step.
    """
    lines, run = _undamaged(path), path.parent
    with contextlib.suppress(InputError):  # No run's directory, or a config that is damaged.
        config = run_config(run)
        if "train" in config:  # An imported model was not trained here.
            saved = max(survey(run / CHECKPOINTS)[0], default=0)
            logged = _last_logged(saved, from_dict(TrainConfig, config["train"]))
            _report_missing(path, lines, logged)
    return lines


def _last_logged(step: int, config: TrainConfig) -> int:
    """The last step up to `step` that has a line: logged, evaluated, or the run's last."""
    if step == config.steps:
        return step
    return max(step - step % every for every in (config.log_every, config.eval_every))


def _report_missing(path: Path, lines: list[dict[str, Any]], logged: int) -> None:
    """Say on standard error if lines up to the step `logged`, which has one, are missing."""
    last = lines[-1]["step"] if lines else 0
    if logged > last:
        lost = f"those after step {last}" if lines else "all"
        print(f"{path}: lines are missing, {lost} up to step {logged}.", file=sys.stderr)


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
    """The content of a line; None of a damaged line, or one that is not written here."""
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
