import struct
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2

from gptjax.training.trackers import tensorboard
from gptjax.training.trackers.tensorboard import TensorBoardTracker

LINES = [{"step": step, "loss": step + 0.5} for step in range(1, 7)]


def shown(directory: Path) -> list[tuple[int, float]]:
    """The points of the loss that TensorBoard shows, in the order in which they were written."""
    points = []
    for path in sorted(directory.glob("events*")):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            event = vars(event_pb2)["Event"].FromString(content[start + 12 : start + 12 + length])
            start += 16 + length
            if event.HasField("session_log"):
                points = [point for point in points if point[0] < event.step]
            points += [(event.step, value.simple_value) for value in event.summary.value]
    return points


@pytest.mark.parametrize("lost", [None, 0, 1, 40, 150, 10_000])
def test_what_tensorboard_lacks_is_written_again(tmp_path, lost):
    directory, lines = tmp_path / "train", LINES
    first = TensorBoardTracker(tmp_path, [])
    for line in lines:
        first.write(line["step"], {"loss": line["loss"]})
    if lost is None:  # As at a kill: nothing was closed.
        assert shown(directory) == [(line["step"], line["loss"]) for line in lines]
    first.close()
    (path,) = directory.glob("events*")
    if lost:
        path.write_bytes(path.read_bytes()[:-lost] if lost < 1000 else b"")
    second = TensorBoardTracker(tmp_path, lines[:4])  # It goes on from step 4.
    for step in (5, 6):
        second.write(step, {"loss": step + 0.25})
    second.close()
    # Of a record that is cut the rest is no longer read.
    if lost:
        path.write_bytes(path.read_bytes()[: whole_records(path)])
    assert shown(directory) == [(1, 1.5), (2, 2.5), (3, 3.5), (4, 4.5), (5, 5.25), (6, 6.25)]


def test_tensorboard_has_training_and_validation_in_one_chart(tmp_path):
    lines = [
        {"step": 1, "cross_entropy": 3.5},
        {"step": 2, "cross_entropy": 2.5, "validation_loss": 2.75},
    ]
    first = TensorBoardTracker(tmp_path, [])
    for line in lines:
        first.write(line["step"], {name: line[name] for name in line if name != "step"})
    first.close()
    again = TensorBoardTracker(tmp_path, lines)
    again.write(3, {"cross_entropy": 1.5})
    again.write(4, {"cross_entropy": 1.25, "validation_loss": 1.75})
    again.close()
    # The directory is the curve, and the name is the chart.
    assert shown(tmp_path / "validation") == [(2, 2.75)] * 2 + [(4, 1.75)] * 2
    assert names(tmp_path / "validation") == {"loss", "cross_entropy"}
    assert names(tmp_path / "train") == {"cross_entropy"}
    assert {path.parent.name for path in tmp_path.rglob("*tfevents*")} == {"train", "validation"}


def names(directory: Path) -> set[str]:
    """The tags of all points."""
    found = set()
    for path in directory.glob("events*"):
        for event in tensorboard._events(path.read_bytes()):
            found |= {value.tag for value in event.summary.value}
    return found


def whole_records(path: Path) -> int:
    """Bytes of a file's records that are whole."""
    content, start = path.read_bytes(), 0
    while start + 16 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        if start + 16 + length > len(content):
            break
        start += 16 + length
    return start
