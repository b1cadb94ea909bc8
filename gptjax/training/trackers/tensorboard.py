"""The scalars of a run as TensorBoard event files, which are derived from metrics.jsonl.

An event file is a sequence of records: the length (8 bytes) and its checksum (4), a protocol buffer
`Event`, and its checksum (4). Each logged step is an event with all its scalars, written without
buffering by the training thread, so that no kill loses one and a full disk is an OSError there.

Events that are missing nevertheless (damaged or deleted files, a machine that went down) are
written again when a run is resumed: TensorBoard reads the files by name, and a `SessionLog.START`
at a step discards all points from that step on.

TensorBoard draws one chart per name, with a curve per directory, named by its path: a run has
`train/` and `validation/`, as in Keras, so that the validation loss is in the charts of the
training loss. Custom layouts would be hidden in a plugin's tab.
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
"""Its name in metrics.jsonl."""


class TensorBoardTracker:
    """Scalars as event files in `train/` and `validation/` of a run's directory.

    Args:
      directory: of the run.
      lines: of metrics.jsonl, in order, up to the step from which the run resumes.
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
    """The event files of a run, in order."""
    return [path for name in (TRAIN, VALIDATION) for path in _in_order(directory / name)]


def _in_order(directory: Path) -> list[Path]:
    return sorted(directory.glob("events.*tfevents*"))


def _training(scalars: dict[str, float]) -> dict[str, float]:
    """The training scalars, by the names of their charts."""
    return {name: value for name, value in scalars.items() if name not in ("step", LOSS)}


def _validation(scalars: dict[str, float]) -> dict[str, float]:
    """The validation loss, if there is one, which is a cross-entropy without auxiliary losses."""
    loss = scalars.get(LOSS)
    return {} if loss is None else {"loss": loss, "cross_entropy": loss}


class _EventFile:
    """The event file that this process writes, ordered after those already in `directory`."""

    def __init__(self, directory: Path, lines: list[dict[str, Any]]):
        from tensorboardX.event_file_writer import EventsWriter

        directory.mkdir(exist_ok=True)
        files = _in_order(directory)
        # The name has the time in seconds, which two files may share.
        self._file = EventsWriter(str(directory / "events"), f".{len(files)}")
        shown, first = steps_shown(files), 0
        while first < len(lines) and lines[first]["step"] in shown:
            first += 1
        missing = lines[first:]
        if files:
            start = missing[0]["step"] if missing else 1 + (lines[-1]["step"] if lines else 0)
            self._write(start, session_log={"status": "START"})
        for line in missing:
            self._add(**line)
        self._file.flush()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add an event with each scalar under its name."""
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
    """The class `Event`, which protobuf generates on import."""
    return importlib.import_module("tensorboardX.proto.event_pb2").Event


def steps_shown(files: Iterable[Path]) -> set[int]:
    """The steps of the points that TensorBoard shows of these event files, which are in order."""
    steps: set[int] = set()
    for path in files:
        for event in _events(path.read_bytes()):
            if event.HasField("session_log"):
                steps = {step for step in steps if step < event.step}
            elif event.HasField("summary"):
                steps.add(event.step)
    return steps


def _events(content: bytes) -> Iterable[Any]:
    """The events of a file up to where it is cut or damaged, which is where TensorBoard stops."""
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
