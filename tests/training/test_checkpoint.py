"""What is restored is what was saved, or a sentence says that it is not."""

import gc
import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import distributed
from gptjax.config import InputError
from gptjax.training import checkpoint_files
from gptjax.training.checkpoint import DELETED, UNFINISHED, Checkpoints
from gptjax.training.checkpoint_files import LIST, checksum, list_files, list_own_files, read_list
from gptjax.training.step import State

LOSSES = {2: 1.0, 4: 0.5, 6: 0.7}
BEST, LAST = 4, 6


def state(step: int) -> State:
    """Another one at each step."""
    key = jax.random.key(step)
    params = {
        "layer": {"kernel": jax.random.normal(key, (300, 9))},
        "norm": jnp.arange(7, dtype=jnp.bfloat16) + step,
    }
    return State(jnp.int32(step), params, {"mu": jax.tree.map(lambda leaf: leaf * 0.5, params)})


def restored(directory: Path, step: int | None = None) -> State:
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.restore(state(0), step).state


def same(found: State, expected: State) -> bool:
    """By bits."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def save(directory: Path, *steps: int, keep_every: int = 0) -> None:
    best = min(steps, key=LOSSES.__getitem__)
    with Checkpoints(directory, keep_every=keep_every) as checkpoints:
        for step in steps:
            checkpoints.save(state(step), {"step": step, "best_step": best}, LOSSES[step])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    save(directory, *LOSSES, keep_every=2)
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def older(checkpoint: Path) -> None:
    """As they were before they had a list of their files."""
    (checkpoint / LIST).unlink()
    metadata = checkpoint / checkpoint_files.STEP_METADATA
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"custom_metadata": {}}))


def test_every_file_is_listed_with_its_checksum(saved):
    listed = read_list(saved / str(LAST))
    assert listed
    names = {path.relative_to(saved / str(LAST)).as_posix() for path in files_of(saved / str(LAST))}
    assert names == {*listed.files, LIST, "commit_success.txt"}
    assert listed.arrays["params"] == {"layer.kernel": "float32[300, 9]", "norm": "bfloat16[7]"}
    for name, expected in listed.files.items():
        assert checksum(saved / str(LAST) / name) == expected


def test_a_checksum_notices_every_bit_and_what_is_exchanged(tmp_path):
    draw, file = random.Random(0), tmp_path / "file"
    whole = draw.randbytes((1 << 20) + 12345)
    file.write_bytes(whole)
    expected = checksum(file)
    for place in (
        0,
        7,
        (1 << 20) - 1,
        1 << 20,
        len(whole) - 1,
        *draw.sample(range(len(whole)), 20),
    ):
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        assert checksum(file) != expected
    exchanged = whole[8:16] + whole[:8] + whole[16:]
    for changed in (
        exchanged,
        whole[:-1],
        whole + b"\0",
        bytes(len(whole)),
        whole[4096:8192] + whole,
    ):
        file.write_bytes(changed)
        assert checksum(file) != expected
    file.write_bytes(whole)
    assert checksum(file) == expected


@pytest.mark.parametrize("content", [b"", b"a", bytes(range(256)) * 5000])
def test_a_file_just_written_has_the_checksum_that_is_read_later(tmp_path, monkeypatch, content):
    """Whether it can be mapped or not."""
    file = tmp_path / "file"
    file.write_bytes(content)
    assert checksum(file, just_written=True) == checksum(file)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("No such device")

    monkeypatch.setattr(checkpoint_files.mmap, "mmap", refuse)
    assert checksum(file, just_written=True) == checksum(file)


def harm_bit(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def harm_by_zeros(path: Path, draw: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def harm_by_cutting(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def harm_by_removal(path: Path, draw: random.Random) -> None:
    path.unlink()


HARMS = harm_bit, harm_by_zeros, harm_by_cutting, harm_by_removal


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_damage_to_any_file_is_one_sentence(copied, harm):
    draw, last = random.Random(0), copied / str(LAST)
    for path in files_of(last):
        whole = path.read_bytes()
        harm(path, draw)
        if path == last / "commit_success.txt":  # Orbax's last file, which nobody reads.
            assert same(restored(copied), state(LAST))
        else:
            with pytest.raises(InputError) as error:
                restored(copied)
            begin, end = (
                f"The checkpoint {last.resolve()} is damaged (",
                "the checkpoints of step 2, 4.",
            )
            assert str(error.value).startswith(begin)
            assert str(error.value).endswith(f"): delete that directory to use {end}")
        path.write_bytes(whole)
    assert same(restored(copied), state(LAST))


PARTS = "params", "optimizer", "progress", "metrics", "params/d", "optimizer/ocdbt.process_0"


@pytest.mark.parametrize("name", PARTS)
def test_a_missing_directory_is_damage(copied, name):
    shutil.rmtree(copied / str(LAST) / name)
    with Checkpoints(copied, read_only=True) as checkpoints:
        assert checkpoints.last_step == LAST
        with pytest.raises(InputError, match=rf"is damaged \({name}/\S+ is missing\)"):
            checkpoints.restore(state(0))
    with pytest.raises(InputError, match=rf"is damaged \({name}/\S+ is missing\)"):
        Checkpoints(copied)


def largest(directory: Path) -> Path:
    return max(files_of(directory), key=lambda path: path.stat().st_size)


def test_a_damaged_directory_taken_away_the_one_before_goes_on(copied):
    harm_bit(
        max(files_of(copied / str(LAST) / "params"), key=lambda path: path.stat().st_size),
        random.Random(0),
    )
    with pytest.raises(InputError, match="is damaged"):
        restored(copied)
    shutil.rmtree(copied / str(LAST))
    assert same(restored(copied), state(BEST))
    save(copied, LAST, keep_every=2)
    assert same(restored(copied), state(LAST))


def test_a_single_damaged_checkpoint_leaves_nothing_to_go_on_with(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "2" / "progress" / "metadata").write_text("{}")
    with pytest.raises(InputError) as error:
        restored(tmp_path)
    assert str(error.value) == (
        f"The checkpoint {tmp_path / '2'} is damaged (progress/metadata is not what was written), "
        "and there is no other: --overwrite restarts the run."
    )


def test_where_a_validation_loss_is_damaged_the_best_is_not_guessed(copied):
    (copied / "2" / "metrics" / "metrics").write_text('{"validation_loss": 0.1}')
    with Checkpoints(copied, read_only=True) as checkpoints:
        assert same(checkpoints.restore(state(0)).state, state(LAST))
        with pytest.raises(
            InputError, match=r"/2 is damaged \(metrics/metrics is not what was written\)"
        ):
            _ = checkpoints.best_step
    with pytest.raises(InputError, match=r"/2 is damaged"):
        Checkpoints(copied)
    assert (copied / "2").exists()


def test_a_deletion_cut_short_is_left_out_and_finished_by_the_run(copied, capsys):
    shutil.rmtree(copied / "2" / "params")
    (copied / f"4{UNFINISHED}").mkdir()
    (copied / f"3.1{DELETED}" / "params").mkdir(parents=True)
    with Checkpoints(copied, read_only=True) as checkpoints:
        assert (checkpoints.steps, checkpoints.best_step) == ([4, 6], BEST)
        with pytest.raises(InputError, match=r"/2 is damaged \(params/_METADATA is missing\)"):
            checkpoints.restore(state(0), 2)
    assert capsys.readouterr().err == (
        f"{copied.resolve() / '2'} is skipped: params/_METADATA is missing.\n"
    )
    assert len(list(copied.iterdir())) == 5  # A reader touches nothing.
    with Checkpoints(copied) as checkpoints:
        assert same(checkpoints.restore(state(0)).state, state(LAST))
        checkpoints.save(state(8), {}, 2.0)
    assert sorted(path.name for path in copied.iterdir()) == ["4", "8"]


def test_the_best_is_not_taken_for_a_deletion_cut_short(copied):
    (copied / str(BEST) / "metrics" / "metrics").unlink()
    with (
        Checkpoints(copied, read_only=True) as checkpoints,
        pytest.raises(InputError, match=r"/4 is damaged \(metrics/metrics is missing\)"),
    ):
        _ = checkpoints.best_step
    with pytest.raises(InputError, match=r"/4 is damaged"):
        Checkpoints(copied)


def test_what_need_not_stay_goes_once_the_next_is_there(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step, left in ((2, [2]), (4, [4]), (6, [4, 6])):
            checkpoints.save(state(step), {}, LOSSES[step])
            checkpoints.wait()
            assert checkpoints.steps == left
            assert [
                int(path.name) for path in sorted(tmp_path.iterdir()) if path.name.isdecimal()
            ] == left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "6"]


def test_an_older_checkpoint_is_read_with_a_line_that_says_so(copied, capfd):
    older(copied / str(LAST))
    assert same(restored(copied), state(LAST))
    assert capfd.readouterr().err == (
        f"The checkpoint {copied.resolve() / str(LAST)} was saved without checksums: damage to its "
        "arrays would not be noticed.\n"
    )
    data = largest(copied / str(LAST) / "params")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(InputError, match=r"is damaged \(it cannot be read\)"):
        restored(copied)
    gc.collect()
    assert len(capfd.readouterr().err.splitlines()) == 1  # Nothing of Orbax's threads.


def test_a_lost_list_is_damage(copied):
    (copied / str(LAST) / LIST).unlink()
    with pytest.raises(InputError, match=rf"is damaged \({LIST} is missing\)"):
        restored(copied)


def test_each_process_lists_what_it_wrote_and_the_first_the_rest(tmp_path, monkeypatch):
    draw, items = random.Random(0), ("params", "optimizer")
    for item in items:
        for process in range(3):
            own = tmp_path / item / f"ocdbt.process_{process}"
            (own / "d").mkdir(parents=True)
            (own / "manifest.ocdbt").write_bytes(draw.randbytes(100))
            (own / "d" / "data").write_bytes(draw.randbytes(5000))
            list_own_files(own)
        list_own_files(tmp_path / item / "ocdbt.process_3")  # Has written nothing.
        (tmp_path / item / "_METADATA").write_text("{}")
    read, original = [], checkpoint_files.checksum

    def noted(path: Path, *, just_written: bool) -> str:
        read.append(path)
        return original(path, just_written=just_written)

    monkeypatch.setattr(checkpoint_files, "checksum", noted)
    list_files(tmp_path, {"params": {"a": "float32[]"}})
    assert sorted(read) == [tmp_path / item / "_METADATA" for item in sorted(items)]
    listed = read_list(tmp_path)
    assert listed
    assert sorted(listed.files) == [
        path.relative_to(tmp_path).as_posix() for path in files_of(tmp_path) if path.name != LIST
    ]
    assert {name: original(tmp_path / name) for name in listed.files} == listed.files


def test_what_one_process_finds_damaged_all_refuse(copied, monkeypatch):
    shares = []

    def changed(_, listed, names):
        shares.append(list(names))

    monkeypatch.setattr(checkpoint_files, "changed", changed)
    found = "the other's file is bad"
    monkeypatch.setattr(distributed, "meet", lambda name, value: [value, found])
    with Checkpoints(copied) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(jax, "process_index", lambda: 1)
        with pytest.raises(InputError, match=r"is damaged \(the other's file is bad\)"):
            checkpoints.restore(state(0))
    listed = read_list(copied / str(LAST))
    assert listed
    assert shares[-1] == list(listed.files)[1::2]


def test_the_checksums_are_made_in_the_background(tmp_path, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert may_end.wait(60)
        list_files(*arguments)

    monkeypatch.setattr(checkpoint_files, "list_files", slow)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(2), {}, 1.0)
        assert begun.wait(60)
        assert not (tmp_path / "2").exists()  # And is no checkpoint before it has them.
        may_end.set()
    assert same(restored(tmp_path), state(2))
