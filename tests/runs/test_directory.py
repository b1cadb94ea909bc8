import dataclasses
import errno
import functools
import gc
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gptjax import distributed
from gptjax.config import (
    ExperimentConfig,
    InputError,
    MeshConfig,
    TransformerConfig,
    from_dict,
    read_sealed,
    sealed,
    to_dict,
)
from gptjax.data.tokenizers import ByteTokenizer, CharacterTokenizer, load_tokenizer
from gptjax.models.build import Decoder, split
from gptjax.probe import history
from gptjax.runs.directory import (
    BEGUN,
    CHECKPOINTS,
    CONFIG,
    RESULT,
    WRITTEN,
    hold,
    load_config,
    open_run,
    saved_tokenizer,
    write_json,
)
from gptjax.runs.loading import checkpoint_steps, load_model, load_run
from gptjax.system.disk import DiskError
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.trackers.tensorboard import event_files

CONFIGURED = ExperimentConfig(model=TransformerConfig(vocab_size=256))
OTHER = ExperimentConfig(model=TransformerConfig(vocab_size=256, depth=5, bias=False))


def _open(directory: Path, config: ExperimentConfig = CONFIGURED, **options) -> bool:
    return open_run(directory, config, ByteTokenizer(), "fingerprint", **options)


def _content(directory: Path) -> dict[str, bytes]:
    """Every file under `directory`."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def copied_run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "copied"))


def test_a_new_directory_gets_the_config_and_the_tokenizer(tmp_path):
    directory = tmp_path / "deep" / "run"
    assert _open(directory) is False
    assert sorted(_content(directory)) == ["bytes.txt", "config.json", "tokenizer_kind.json"]
    assert load_config(directory) == CONFIGURED
    assert load_tokenizer(directory).name == "bytes"


def test_the_same_config_goes_on_where_it_stopped_and_tells_when_it_is_finished(tmp_path):
    _open(tmp_path)
    before = _content(tmp_path)
    assert _open(tmp_path) is False
    assert _content(tmp_path) == before
    write_json(tmp_path / RESULT, {})
    assert _open(tmp_path) is True


def test_another_mesh_goes_on_in_the_same_directory(tmp_path):
    _open(tmp_path)
    parted = dataclasses.replace(CONFIGURED, mesh=MeshConfig(fsdp=2, tensor=4))
    assert _open(tmp_path, parted) is False


def test_the_other_processes_of_a_run_look_at_what_the_first_has_made(tmp_path, monkeypatch):
    met = []
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    monkeypatch.setattr(distributed, "meet", met.append)
    with pytest.raises(InputError, match=r"--out must be in a file system that all hosts share"):
        _open(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    _open(tmp_path / "run")
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    monkeypatch.setattr(distributed, "meet", met.append)
    assert _open(tmp_path / "run", overwrite=True) is False
    with pytest.raises(InputError, match="another config"):
        _open(tmp_path / "run", OTHER)
    assert len(met) == 3


def test_another_config_is_refused_with_the_differing_fields(tmp_path):
    _open(tmp_path)
    before = _content(tmp_path)
    with pytest.raises(InputError) as error:
        _open(tmp_path, OTHER)
    assert str(error.value) == (
        f"{tmp_path} holds a run with another config (config.model.depth: 4 -> 5, "
        "config.model.bias: True -> False): choose another --out, or --overwrite to delete it."
    )
    assert _content(tmp_path) == before


def test_another_text_or_tokenizer_is_refused(tmp_path):
    _open(tmp_path)
    with pytest.raises(InputError, match=r"\(data_sha256: fingerprint -> other\)"):
        open_run(tmp_path, CONFIGURED, ByteTokenizer(), "other")
    with pytest.raises(InputError, match=r"\(tokenizer_sha256: \w+ -> \w+\)"):
        open_run(tmp_path, CONFIGURED, CharacterTokenizer("ab"), "fingerprint")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_with_files_of_others_is_refused(overwrite, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError) as error:
        _open(tmp_path, overwrite=overwrite)
    assert str(error.value) == f"{tmp_path} holds files but no config.json: choose another --out."
    assert _content(tmp_path) == {"thesis.tex": b"precious"}
    assert (tmp_path / "checkpoints").exists()


def test_overwrite_deletes_all_that_a_run_writes_and_nothing_else(tiny_run, copied_run):
    assert {path.name for path in tiny_run.iterdir()} <= {*WRITTEN, "train", "validation"}
    assert {path.parent.name for path in event_files(tiny_run)} == {"train", "validation"}
    (copied_run / "notes.txt").write_text("precious")
    (copied_run / "figures").mkdir()
    (copied_run / "figures" / "loss.png").write_text("precious")
    (copied_run / "train" / "text.txt").write_text("precious")
    assert _open(copied_run, overwrite=True) is False
    assert sorted(_content(copied_run)) == [
        "bytes.txt",
        "config.json",
        "figures/loss.png",
        "notes.txt",
        "tokenizer_kind.json",
        "train/text.txt",
    ]
    assert load_config(copied_run) == CONFIGURED


def test_an_overwrite_cut_short_leaves_a_directory_that_can_be_overwritten(copied_run, monkeypatch):
    def stop(path, *_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(InputError, match=r"--out: cannot write .*: Input/output error\."):
            _open(copied_run, overwrite=True)
    assert (copied_run / CONFIG).exists()
    assert _open(copied_run, overwrite=True) is False


class Killed(BaseException):
    """Instead of a signal, which nothing could catch."""


@pytest.fixture
def killed_at(monkeypatch):
    """Runs a function until just before its event of a number; True if it had so many."""

    def run(number: int, function) -> bool:
        events = iter(range(number))

        def counted(act):
            def counting(*arguments, **options):
                if next(events, None) is None:
                    raise Killed
                return act(*arguments, **options)

            return counting

        with monkeypatch.context() as patch:
            for name in ("mkdir", "touch", "unlink", "rmdir", "open", "replace"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            for name in ("unlink", "rmdir"):  # Those of shutil.rmtree.
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                function()
            except Killed:
                return True
        return False

    return run


def test_a_start_that_was_killed_anywhere_is_begun_anew(tmp_path, killed_at):
    number, whole = 0, tmp_path / "whole"
    _open(whole)
    while killed_at(number, functools.partial(_open, tmp_path / str(number))):
        directory = tmp_path / str(number)
        for overwrite in (False, True):
            assert _open(directory, overwrite=overwrite) is False
            assert _content(directory) == _content(whole)
        number += 1
    assert number > 5


def test_an_overwrite_that_was_killed_anywhere_is_begun_anew(tiny_run, tmp_path, killed_at):
    number = 0
    while True:
        directory = Path(shutil.copytree(tiny_run, tmp_path / str(number)))
        (directory / "notes.txt").write_text("precious")
        if not killed_at(number, functools.partial(_open, directory, overwrite=True)):
            break
        begun = (directory / BEGUN).exists()
        assert begun == (number > 2)  # The directory is made and its config read before.
        if begun:
            assert saved_tokenizer(directory, CONFIGURED.data, "fingerprint") is None
            assert _open(directory) is False
            names = ["bytes.txt", "config.json", "notes.txt", "tokenizer_kind.json"]
            assert sorted(_content(directory)) == names
        shutil.rmtree(directory)
        number += 1
    assert number > 20


def test_a_directory_in_use_is_refused_and_an_overwrite_deletes_nothing(copied_run):
    before = _content(copied_run)
    with (
        hold(copied_run),
        pytest.raises(InputError, match=r" is in use by process \d+ on "),
        hold(copied_run),
    ):
        pass
    assert _content(copied_run) == before
    with hold(copied_run, finished=False), hold(copied_run, finished=False):
        assert _content(copied_run) == before  # What is looked at alone is not held.


def test_a_disk_that_fails_is_one_sentence(tmp_path):
    def fail(number: int) -> None:
        with hold(tmp_path):
            raise OSError(number, os.strerror(number), str(tmp_path / "samples.txt"))

    with pytest.raises(DiskError) as failed:
        fail(errno.ENOSPC)
    assert str(failed.value) == (
        f"{tmp_path / 'samples.txt'}: No space left on device; what is saved in {tmp_path} stays, "
        "and once there is room the same command resumes from it."
    )
    with pytest.raises(FileNotFoundError):
        fail(errno.ENOENT)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match=r"^--out: cannot write .*/file/run: Not a directory\.$"):
        _open(tmp_path / "file" / "run")

    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=r"^--out: cannot write .*/new: Permission denied\.$"):
        _open(tmp_path / "new")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON: "),
        ("[]", "holds list, not a JSON object."),
        ('{"model_type": "gpt2"}', "is not of a gptjax run: it has no field 'config'."),
    ],
)
def test_a_config_of_another_program_is_one_sentence(content, sentence, tmp_path):
    (tmp_path / CONFIG).write_text(content)
    for read in (load_config, load_run, _open):
        with pytest.raises(InputError) as error:
            read(tmp_path)
        assert str(error.value).startswith(f"{tmp_path / CONFIG} {sentence}")
        assert "\n" not in str(error.value)
    assert _content(tmp_path) == {CONFIG: content.encode()}


def test_a_run_with_an_unknown_field_is_refused_with_its_file(tmp_path):
    _open(tmp_path)
    saved = read_sealed(tmp_path / CONFIG)
    saved["config"]["model"]["moe"] = 4
    (tmp_path / CONFIG).write_text(json.dumps(sealed(saved)))
    with pytest.raises(InputError, match=r"config\.json: model has an unknown field 'moe'"):
        load_config(tmp_path)


def test_a_damaged_config_or_tokenizer_is_one_sentence(copied_run):
    config, tokenizer = copied_run / CONFIG, copied_run / "characters.json"
    written, learnt = config.read_bytes(), tokenizer.read_bytes()
    config.write_bytes(written.replace(b"0.003", b"0.002"))
    for read in (load_config, load_run):
        with pytest.raises(InputError, match=r"config\.json is damaged or was edited"):
            read(copied_run)
    config.write_bytes(written)
    tokenizer.write_bytes(learnt.replace(b"a", b"A"))
    with pytest.raises(InputError, match=r"characters\.json is damaged"):
        load_run(copied_run)


def test_a_loaded_run_is_the_trained_model(tiny_run):
    run = load_run(tiny_run)
    result = json.loads((tiny_run / RESULT).read_text())
    assert run.step == result["best_step"]
    assert run.config.model == run.model.config
    assert run.tokenizer.name == "characters"
    initial = Decoder(run.model.config, rngs=nnx.Rngs(run.config.train.seed))
    moved = jax.tree.map(
        lambda trained, before: not jnp.array_equal(trained, before),
        split(run.model)[1],
        split(initial)[1],
    )
    assert all(jax.tree.leaves(moved))


def test_a_step_without_checkpoint_is_refused_with_those_there(tiny_run):
    with pytest.raises(InputError, match=r"has no checkpoint of step 3: it has 4\.$"):
        load_run(tiny_run, 3)


def test_a_run_without_checkpoints_is_refused_and_gets_none(tmp_path):
    _open(tmp_path)
    with pytest.raises(InputError, match=r" holds no checkpoints yet\.$"):
        load_run(tmp_path)
    assert not (tmp_path / CHECKPOINTS).exists()


def test_a_checkpoint_of_another_model_is_refused_with_every_leaf(copied_run):
    saved = read_sealed(copied_run / CONFIG)
    config = from_dict(ExperimentConfig, saved["config"])
    model = dataclasses.replace(config.model, width=8, bias=False, tie_embeddings=False)
    saved["config"] = to_dict(dataclasses.replace(config, model=model))
    (copied_run / CONFIG).write_text(json.dumps(sealed(saved)))
    with pytest.raises(InputError) as error:
        load_run(copied_run)
    sentence = str(error.value)
    assert "does not fit the model: " in sentence
    assert "params.head.table is missing" in sentence
    assert "params.decoder.blocks.attention.query.bias is unexpected" in sentence
    assert "params.decoder.norm.scale is float32[16], not float32[8]" in sentence
    assert "\n" not in sentence


def test_leaves_missing_extra_of_another_shape_and_of_another_dtype_are_listed_at_once(tiny_run):
    _, params = split(load_run(tiny_run).model)
    del params["decoder"]["norm"]["bias"]
    params["added"] = jnp.zeros(3)
    params["decoder"]["norm"]["scale"] = jnp.zeros((4, 4))
    params["positions"]["table"] = params["positions"]["table"].astype(jnp.bfloat16)
    with (
        Checkpoints(tiny_run / CHECKPOINTS) as checkpoints,
        pytest.raises(InputError) as error,
    ):
        checkpoints.restore_params(params)
    assert str(error.value) == (
        f"The checkpoint {tiny_run.resolve() / CHECKPOINTS / '4'} does not fit the model: "
        "params.added is missing; "
        "params.decoder.norm.bias is unexpected; "
        "params.decoder.norm.scale is float32[16], not float32[4, 4]; "
        "params.positions.table is float32[32, 16], not bfloat16[32, 16]."
    )


@pytest.mark.slow
def test_loading_again_and_again_keeps_nothing(tiny_run):
    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    def kept() -> int:
        before = objects()
        for _ in range(5):
            load_run(tiny_run)
        return objects() - before

    load_run(tiny_run)
    # Orbax asks TensorStore for its counters, which leak a dozen; the arrays' specs were 650. What
    # an earlier test left running may add its own meanwhile, and does not each time.
    assert any(kept() < 5 * 40 for _ in range(3))


def test_a_damaged_checkpoint_is_one_sentence_of_every_reader(copied_run, command):
    data = max((copied_run / CHECKPOINTS / "4" / "params").rglob("d/*"), key=os.path.getsize)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    name = data.relative_to(copied_run / CHECKPOINTS / "4")
    sentence = (
        f"The checkpoint {copied_run.resolve() / CHECKPOINTS / '4'} is damaged ({name} is not what "
        "was written), and there is no other: --overwrite restarts the run."
    )
    for read in (load_run, load_model, lambda run: history(run, id)):
        with pytest.raises(InputError) as error:
            read(copied_run)
        assert str(error.value) == sentence
    assert command("sample", copied_run, "--prompt", "1") == (2, "", f"{sentence}\n")


def test_a_checkpoint_deleted_by_half_is_not_listed(copied_run, capsys):
    half = copied_run / CHECKPOINTS / "2"
    (half / "optimizer").mkdir(parents=True)
    assert checkpoint_steps(copied_run) == [4]
    assert history(copied_run, lambda model: model.config.width)[0] == [4]
    assert load_run(copied_run).step == 4
    left_out = f"{half.resolve()} is skipped: _CHECKPOINT_METADATA is missing."
    assert {*capsys.readouterr().err.splitlines()} == {left_out}
    with pytest.raises(InputError, match=r"checkpoints/2 is damaged \(_CHECKPOINT_METADATA is"):
        load_run(copied_run, 2)
