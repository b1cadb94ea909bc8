"""The scalars of a run as TensorBoard's event files, which follow from metrics.jsonl.

An event file is a row of records: the length (8 bytes) and its checksum (4), a protocol buffer
`Event`, and its checksum (4). Here each logged step is an event with all its scalars, handed to the
system at once and by the thread that trains, so that no kill loses one, and a full disk is an
OSError there.

What is missing nevertheless (files that were damaged or deleted, a machine that went down) is
written again when a run goes on: TensorBoard reads the files by name, and a `SessionLog.START` at a
step takes back all points from that step on.

TensorBoard draws one chart for each name, with a curve for each directory, which is called by its
path: a run has `train/` and `validation/`, as Keras has them, and the validation loss is in the
charts of the training loss. Custom layouts would need a plugin's tab to be looked for.
"""

import functools
import importlib
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

HEAD = struct.Struct("<QI")
TAIL_BYTES = 4
TRAIN, VALIDATION = "train", "validation"
LOSS = "validation_loss"
"""As metrics.jsonl has it."""


class TensorBoardWriter:
    """A writer of scalars as event files in `train/` and `validation/` of a run's directory.

    Args:
      directory: Of the run.
      lines: Of metrics.jsonl, in order, up to the step from which the run goes on.
    """

    def __init__(self, directory: Path, lines: Iterable[dict[str, Any]]):
        lines = list(lines)
        training, validation = (
            [{"step": line["step"], **scalars} for line in lines if (scalars := part(line))]
            for part in (_training, _validation)
        )
        self._train = _EventFile(directory / TRAIN, training)
        self._validation = _EventFile(directory / VALIDATION, validation)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add each scalar to its chart."""
        self._train.write(step, _training(scalars))
        if validation := _validation(scalars):
            self._validation.write(step, validation)

    def close(self) -> None:
        """Close the files."""
        self._train.close()
        self._validation.close()


def event_files(directory: Path) -> list[Path]:
    """Those of a run, in order."""
    return [path for name in (TRAIN, VALIDATION) for path in _in_order(directory / name)]


def _in_order(directory: Path) -> list[Path]:
    return sorted(directory.glob("events.*tfevents*"))


def _training(scalars: dict[str, float]) -> dict[str, float]:
    """What is of training, under the names of its charts."""
    return {name: value for name, value in scalars.items() if name not in ("step", LOSS)}


def _validation(scalars: dict[str, float]) -> dict[str, float]:
    """The validation loss, if there is one: a cross-entropy, to which evaluation adds nothing."""
    loss = scalars.get(LOSS)
    return {} if loss is None else {"loss": loss, "cross_entropy": loss}


class _EventFile:
    """The event file to which this process adds, behind those that are in `directory`."""

    def __init__(self, directory: Path, lines: list[dict[str, Any]]):
        from tensorboardX.event_file_writer import EventsWriter

        directory.mkdir(exist_ok=True)
        files = _in_order(directory)
        # The name has the second, of which two files may be.
        self._file = EventsWriter(str(directory / "events"), f".{len(files)}")
        there, first = steps_shown(files), 0
        while first < len(lines) and lines[first]["step"] in there:
            first += 1
        again = lines[first:]
        if files:
            begins = again[0]["step"] if again else 1 + (lines[-1]["step"] if lines else 0)
            self._write(begins, session_log={"status": "START"})
        for line in again:
            self._add(**line)
        self._file.flush()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add each scalar under its name."""
        self._add(step, **scalars)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, step: int, **scalars: float) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in scalars.items()]
        self._write(step, summary={"value": values})

    def _write(self, step: int, **content: Any) -> None:
        self._file.write_event(_event()(step=step, wall_time=time.time(), **content))


@functools.cache
def _event() -> Any:
    """The class of events, which protobuf makes when it is imported."""
    return importlib.import_module("tensorboardX.proto.event_pb2").Event


def steps_shown(files: Iterable[Path]) -> set[int]:
    """The steps of which TensorBoard shows points, of its event files in order."""
    steps: set[int] = set()
    for path in files:
        for event in _events(path.read_bytes()):
            if event.HasField("session_log"):
                steps = {step for step in steps if step < event.step}
            elif event.HasField("summary"):
                steps.add(event.step)
    return steps


def _events(content: bytes) -> Iterable[Any]:
    """The events of a file; behind where it is cut or damaged, TensorBoard reads none either."""
    start = 0
    while start + HEAD.size <= len(content):
        length, _ = HEAD.unpack_from(content, start)
        start += HEAD.size
        if start + length + TAIL_BYTES > len(content):
            return
        try:
            yield _event().FromString(content[start : start + length])
        except DecodeError:
            return
        start += length + TAIL_BYTES
