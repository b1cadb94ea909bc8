"""Files that a user names: regular ones are written, and nothing else is touched."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from gptjax.config import InputError
from gptjax.plots import save
from gptjax.plots.attention_view import AttentionPart, AttentionView
from gptjax.system.outputs import check_output, whole_directory, write_whole


def _view(path: Path) -> None:
    part = AttentionPart("attention", ["a"], ["a"], np.ones((1, 1, 1, 1)))
    AttentionView([part]).save(path, overwrite=True)


WRITERS = {
    "text": lambda path: write_whole(path, "new", overwrite=True),
    "page": _view,
    "figure": lambda path: save(Figure(), path),
}


@pytest.fixture(params=WRITERS)
def write(request):
    """Each function of the house that writes a file for a path of the user's, over another one."""
    return WRITERS[request.param]


def test_a_link_is_followed_and_stays(write, tmp_path):
    target, link = tmp_path / "target.svg", tmp_path / "link.svg"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target.name)
    write(link)
    assert link.is_symlink()
    assert target.read_text() != "old"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert sorted(tmp_path.iterdir()) == [link, target]


def test_a_link_that_leads_nowhere_is_refused_and_stays(write, tmp_path):
    link, circle = tmp_path / "link.svg", tmp_path / "circle.svg"
    link.symlink_to("nowhere")
    circle.symlink_to(circle.name)
    for path in (link, circle):
        with pytest.raises(InputError, match=r"is a broken link: give the path of a"):
            write(path)
        assert path.is_symlink()
    assert sorted(tmp_path.iterdir()) == [circle, link]


def test_what_is_no_file_is_refused_and_stays(write, tmp_path):
    pipe, link = tmp_path / "pipe.svg", tmp_path / "device.svg"
    os.mkfifo(pipe)
    link.symlink_to(os.devnull)
    for path in (pipe, link):
        with pytest.raises(InputError, match=r"is a device or a pipe: give the path of a file\."):
            write(path)
    (tmp_path / "directory.svg").mkdir()
    with pytest.raises(InputError, match=r"is a directory: give the path of a file\."):
        write(tmp_path / "directory.svg")
    assert pipe.is_fifo()
    assert link.readlink() == Path(os.devnull)
    assert Path(os.devnull).is_char_device()


def test_a_name_that_is_too_long_or_in_a_file_is_one_sentence(write, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"cannot write .*: File name too long\."):
        write(tmp_path / f"{'x' * 300}.svg")
    with pytest.raises(InputError, match=r"cannot write .*: (Not a directory|there is no direc)"):
        write(tmp_path / "file" / "a.svg")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_what_fails_while_it_is_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"cannot write .*a\.json: No space left on device\."):
        write_whole(path, "new", overwrite=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_another_name_beside_it_stays(tmp_path):
    (tmp_path / "figures.tmp").write_text("mine")
    write_whole(tmp_path / "figures.json", "{}")
    assert (tmp_path / "figures.tmp").read_text() == "mine"


def test_a_figure_of_no_known_kind_is_refused(tmp_path):
    for name in ("a", "a.zebra"):
        with pytest.raises(InputError, match=r"cannot write .*: it must end in .*\.png.*\.svg"):
            save(Figure(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_kept_unless_told(tmp_path):
    path = tmp_path / "a.html"
    check_output(path)
    path.write_text("mine")
    with pytest.raises(InputError, match=r"already exists: choose another, or --overwrite it\."):
        write_whole(path, "new")
    assert path.read_text() == "mine"


@pytest.mark.parametrize("there", [False, True])
def test_a_directory_is_there_whole_or_not_at_all(tmp_path, there):
    path = tmp_path / "converted"
    if there:
        path.mkdir()
    left = tmp_path / ".converted.partial" / "new"
    left.mkdir(parents=True)
    (left / "weights").write_text("of a process that was killed")

    def fail() -> None:
        with whole_directory(path) as made:
            (made / "weights").write_text("half")
            with whole_directory(path):
                pass

    with pytest.raises(InputError, match=r"converted is in use by process \d+ on "):
        fail()
    assert [each.name for each in tmp_path.iterdir() if each.suffix != ".partial"] == (
        ["converted"] * there
    )
    with whole_directory(path) as made:
        assert not list(made.iterdir())
        (made / "config").write_text("whole")
    assert [each.name for each in tmp_path.iterdir()] == ["converted"]
    assert [each.name for each in path.iterdir()] == ["config"]


def test_a_directory_that_somebody_else_filled_is_not_replaced(tmp_path):
    path = tmp_path / "converted"

    def fill() -> None:
        with whole_directory(path) as made:
            (made / "config").write_text("ours")
            path.mkdir()
            (path / "thesis.tex").write_text("precious")

    with pytest.raises(InputError, match=r"cannot write .*converted: Directory not empty"):
        fill()
    assert [each.name for each in path.iterdir()] == ["thesis.tex"]


def test_what_a_killed_process_left_is_deleted(tmp_path):
    path, ended = tmp_path / "a.txt", subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".{ended.pid}.a.txt"
    others = {tmp_path / f".{os.getppid()}.a.txt", tmp_path / ".notes.a.txt"}
    for file in (left, *others):
        file.write_text("half")
    write_whole(path, "whole")
    assert {*tmp_path.iterdir()} == {path, *others}
