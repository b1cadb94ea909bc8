import errno
from pathlib import Path

import pytest

from gptjax.config import InputError
from gptjax.system.disk import (
    DiskError,
    check_local,
    is_failure,
    replacing,
    write_error,
    write_json,
)


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO]
)
def test_a_failing_disk_is_told_from_a_mistake(number):
    failed, mistaken = OSError(number, "words"), PermissionError(errno.EACCES, "words")
    assert is_failure(failed)
    assert not is_failure(mistaken)
    assert isinstance(write_error(failed, "runs/mine"), DiskError)
    assert type(write_error(mistaken, "runs/mine")) is InputError
    assert str(write_error(failed, "runs/mine", "--out")) == (
        "--out: cannot write runs/mine: words."
    )


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "note.json"
    write_json(path, {"a": 1})

    def interrupted() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["note.json"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("gs://bucket/run", "gs:/bucket/run is a URL: give a path on this machine's disks."),
        ("s3:/bucket", "s3:/bucket is a URL"),
        ("runs/\udcff", r"'runs/\udcff' is not valid UTF-8: choose another name."),
    ],
)
def test_what_no_file_here_can_be_called_is_refused(path, said, tmp_path):
    with pytest.raises(InputError) as refused:
        check_local(Path(path))
    assert said in str(refused.value)
    for name in ("a:b", "c/d:e", "f"):
        assert check_local(tmp_path / name) == tmp_path / name
