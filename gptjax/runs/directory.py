"""A run's directory: its files, its lock, and its beginning.

| file | content |
|---|---|
| config.json | everything needed to rebuild the run: the config and the data's fingerprint |
| tokenizer_kind.json | the tokenizer's kind, checksum and special tokens |
| bytes.txt, characters.json, tokenizer.json, tokenizer.model | the tokenizer, in one of them |
| checkpoints/ | the last and the best state, and those that train.keep_every keeps |
| metrics.jsonl | scalars of the logged steps |
| sessions.jsonl | where the wall time went, from session to session |
| train/, validation/ | the same as TensorBoard's event files |
| result.json | written last: a directory that has it holds a finished run |
| .lock | while a process writes here: the owner of the directory |
| .begun | while a run is set up: the directory is incomplete, and the next run starts over |
"""

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from gptjax import distributed
from gptjax.config import (
    DataConfig,
    ExperimentConfig,
    InputError,
    differences,
    from_dict,
    near_directories,
    read_sealed,
    sealed,
    to_dict,
)
from gptjax.data.tokenizers import TOKENIZER_FILES, Tokenizer, load_tokenizer, save_tokenizer
from gptjax.data.tokenizers.special import DecodingTokens
from gptjax.models.build import LanguageModel, split
from gptjax.runs.bucket import address, delete_checkpoints, held_in_bucket, is_pushed, pull, push
from gptjax.system.buckets import url_of
from gptjax.system.disk import DiskError, check_local, is_failure, write_error, write_json
from gptjax.system.exits import Interrupted
from gptjax.system.locks import LOCK, locked
from gptjax.system.mirrors import INDEX, Rules, copied
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.checkpoint_files import CHECKPOINTS
from gptjax.training.profile.steps import PROFILE_PAGE, PROFILE_TRACE
from gptjax.training.step import State
from gptjax.training.trackers import check_installed
from gptjax.training.trackers.tensorboard import event_files

CONFIG, RESULT = "config.json", "result.json"
TOKENS = "tokens"
"""The field of an imported model's config.json with its begin and end tokens."""
BEGUN = ".begun"
SHOWING = ".showing"
"""Exists while figures and samples are made: a run killed then makes them again."""
DIRECTORY_READY = "the run's directory"
"""The name of the barrier at which the processes of a run wait for its directory."""
FREE_TO_CHANGE = tuple(
    f"config.{name}"
    for name in (
        "mesh",
        "train.steps_per_dispatch",
        "train.track",
        "train.checkpoint_minutes",
        "train.watch",
        "train.watch_every",
        "train.profile",
    )
)
"""What changes no result, and so may change when a run is resumed."""
# A comparison's question comes first, since a directory with results and without it is refused.
UPLOADS = Rules(is_pushed, first=(BEGUN, SHOWING, "comparison.json"), last=(CONFIG, RESULT))
"""What process 0 of a run in a bucket uploads, and in which order."""
WRITTEN = (
    LOCK,
    BEGUN,
    SHOWING,
    CONFIG,
    RESULT,
    CHECKPOINTS,
    *TOKENIZER_FILES,
    "config.tmp",
    "result.tmp",
    "metrics.jsonl",
    "metrics.tmp",
    "sessions.jsonl",
    PROFILE_TRACE,
    PROFILE_PAGE,
    "wandb",
    "mlflow",
    "trackio",
    "loss.png",
    "watch.png",
    "attention.png",
    "samples.txt",
    "predictions.txt",
    "translations.txt",
)
"""All that a run writes into its directory and `--overwrite` deletes, besides the event files in
`train/` and `validation/`, whose other files stay."""


@contextlib.contextmanager
def or_temporary(directory: str | Path | None) -> Iterator[Path]:
    """`directory`, or if it is None one that is deleted when the context ends.

    Raises:
      Interrupted: as the run in it does; its sentence says whether anything is kept.
    """
    if directory is not None:
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory() as temporary:
        try:
            yield Path(temporary)
        except Interrupted as error:
            raise Interrupted(error.step, error.number, kept=False) from None


@contextlib.contextmanager
def hold(directory: Path, *, finished: bool = True) -> Iterator[Path]:
    """Create `directory` and hold its lock while the context is open; yields where to work.

    That is the directory itself, or of one in a bucket a local one of each process. Of several
    processes of a run, process 0 holds the lock.

    Args:
      directory: of a run.
      finished: whether to lock the directory of a finished run too, to overwrite it.

    Raises:
      InputError: another process holds the lock, or the directory cannot be created.
      DiskError: the disk fails, now or while the context is open.
    """
    with contextlib.ExitStack() as held:
        if url := url_of(directory):
            directory = held.enter_context(held_in_bucket(url, UPLOADS))
        elif distributed.is_first() and (finished or not _is_finished(directory)):
            try:
                check_local(directory).mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(directory / LOCK, directory))
            except OSError as error:
                raise write_error(error, directory) from error
        try:
            yield directory
        except OSError as error:
            if not distributed.is_first() or not is_failure(error):
                raise
            raise DiskError(
                f"{error.filename or directory}: {error.strerror}; what is saved in {directory} "
                "stays, and once there is room the same command resumes from it."
            ) from error


def _is_finished(directory: Path) -> bool:
    unfinished = (BEGUN, SHOWING)
    return (directory / RESULT).exists() and not any((directory / n).exists() for n in unfinished)


def begins(directory: Path) -> bool:
    """Whether a new run may begin in `directory`: it is empty, or was set up only in part."""
    names = {path.name for path in directory.iterdir()}
    return BEGUN in names or names <= {LOCK, INDEX}


def begin(
    directory: Path, content: dict[str, Any], make: Callable[[], None] = lambda: None
) -> None:
    """Set up a new run: delete the old one's files, call `make`, and write the config last.

    If the process is killed meanwhile, a new run still `begins` in the directory.
    """
    (directory / BEGUN).touch()
    push(directory)
    delete_checkpoints(directory)
    for name in reversed(WRITTEN):
        path = directory / name
        if name not in (LOCK, BEGUN):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in event_files(directory):  # A data set may have other files in such folders.
        path.unlink()
    make()
    write_json(directory / CONFIG, sealed(content))
    push(directory)
    (directory / BEGUN).unlink()
    push(directory)


def open_run(
    directory: Path,
    config: ExperimentConfig,
    tokenizer: Tokenizer,
    fingerprint: str,
    *,
    overwrite: bool = False,
) -> bool:
    """Set up `directory` for a new or resumed run; True, with a message, if it is finished.

    Process 0 sets it up, then the other processes check that they see the same. The caller must
    `hold` it.

    Raises:
      InputError: a directory that holds another run or other files, that cannot be written, or
        that the processes do not share; or a tracker that is not installed.
    """
    check_installed(config.train)
    wanted = {
        "config": to_dict(config),
        "data_sha256": fingerprint,
        "tokenizer_sha256": tokenizer.fingerprint,
    }
    if not distributed.is_first():
        distributed.meet(DIRECTORY_READY)
        pull(directory)
        if not (directory / CONFIG).exists():
            raise InputError(
                f"{directory} on {socket.gethostname()} is not the directory of process 0: "
                "--out must be in a file system that all hosts share."
            )
        _check_same(directory, wanted)
        return _is_finished(directory)
    finished = _open_first(directory, wanted, tokenizer, overwrite)
    distributed.meet(DIRECTORY_READY)
    if finished:
        print(f"{address(directory)} holds a finished run of this config; --overwrite starts over.")
    return finished


def _open_first(
    directory: Path, wanted: dict[str, Any], tokenizer: Tokenizer, overwrite: bool
) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        new = begins(directory)
        if not new and not (directory / CONFIG).exists():
            raise InputError(f"{directory} holds files but no {CONFIG}: choose another --out.")
        if overwrite and _is_imported(directory):
            raise InputError(
                f"{directory} holds an imported model, which --overwrite does not delete: choose "
                "another --out."
            )
        if not new and not overwrite:
            _check_same(directory, wanted)
            return _is_finished(directory)
        begin(directory, wanted, lambda: save_tokenizer(tokenizer, directory))
    except OSError as error:
        raise write_error(error, directory, flag="--out") from error
    return False


def saved_tokenizer(directory: Path, data: DataConfig, fingerprint: str) -> Tokenizer | None:
    """The tokenizer of the run in `directory`; None if it is of another text or tokenizer name.

    With it a resumed run neither trains its tokenizer again nor needs the files it was read from.
    """
    with copied(directory, {BEGUN, CONFIG, *TOKENIZER_FILES}.__contains__, empty=True) as own:
        if not (own / CONFIG).exists() or begins(own):
            return None
        saved = read_config(own)
        was = saved["config"].get("data")
        same = isinstance(was, dict) and was.get("tokenizer") == data.tokenizer
        same = same and saved.get("data_sha256") == fingerprint
        return load_tokenizer(own) if same else None


def _is_imported(directory: Path) -> bool:
    """Whether the directory holds an imported model, which no run could make again."""
    try:
        return "data" not in read_config(directory)["config"]
    except (InputError, OSError):
        return False  # Without its config no model can be loaded.


def _check_same(directory: Path, wanted: dict[str, Any]) -> None:
    """Refuse another config; what changes no result may change when a run is resumed."""
    saved = read_config(directory)
    if "data" not in saved["config"]:
        raise InputError(
            f"{directory} holds an imported model, which cannot be resumed: choose another --out."
        )
    changed = [
        field for field in differences(saved, wanted) if not field.startswith(FREE_TO_CHANGE)
    ]
    if changed:
        raise InputError(
            f"{directory} holds a run with another config ({', '.join(changed)}): choose another "
            "--out, or --overwrite to delete it."
        )


def load_config(directory: str | Path) -> ExperimentConfig:
    """The config of a run.

    Raises:
      InputError: no run, or a `config.json` that does not hold a config.
    """
    with copied(Path(directory), {CONFIG}.__contains__) as directory:
        if not directory.exists():
            raise InputError(f"{directory} is no run: {near_directories(directory)}")
        if not (directory / CONFIG).exists():
            raise InputError(f"{directory} holds no run: it has no {CONFIG}.")
        saved = read_config(directory)
        return from_dict(ExperimentConfig, saved["config"], str(directory / CONFIG))


def read_config(directory: Path) -> dict[str, Any]:
    """The content of a run's `config.json`.

    Raises:
      InputError: a file that is not of a run, or damaged.
    """
    path = directory / CONFIG
    saved = read_sealed(path)
    if not isinstance(saved.get("config"), dict):
        raise InputError(f"{path} is not of a gptjax run: it has no field 'config'.")
    return saved


def save_model(
    directory: str | Path, model: LanguageModel, tokens: DecodingTokens | None = None
) -> None:
    """Save an imported model as a run's directory: its config, and a checkpoint.

    `tokens` are its begin and end tokens, where they do not follow from its tokenizer. There is no
    tokenizer yet and no optimizer state: `load_model` loads it, and no run resumes it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = State(jax.numpy.int32(0), split(model)[1], {"none": jax.numpy.zeros(1)})
    with Checkpoints(directory / CHECKPOINTS) as checkpoints:
        checkpoints.save(state, {})
        checkpoints.wait()
    # Its data and training are unknown.
    saved: dict[str, Any] = {"config": {"model": to_dict(model.config)}}
    if tokens is not None:
        saved[TOKENS] = tokens._asdict()
    write_json(directory / CONFIG, sealed(saved))
