"""A run's directory: who may write into it, what lies there, and how it is read back.

| file | content |
|---|---|
| config.json | everything needed to rebuild the run: the config and the data's fingerprint |
| tokenizer_kind.json | which tokenizer it is, its checksum and special tokens |
| bytes.txt, characters.json, tokenizer.json, tokenizer.model | one of them, what it learnt |
| checkpoints/ | the last and the best state, and those that train.keep_every keeps |
| metrics.jsonl | scalars of the logged steps |
| train/, validation/ | the same as TensorBoard's event files |
| result.json | written last: a directory that has it holds a finished run |
| .lock | while a process writes here: whose the directory is |
| .begun | while a run begins: what lies here is a half-made start, which the next one begins anew |
"""

import contextlib
import platform
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

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
from gptjax.data.objectives.rows import objective_vocabulary
from gptjax.data.tokenizers import TOKENIZER_FILES, Tokenizer, load_tokenizer, save_tokenizer
from gptjax.data.tokenizers.special import DecodingTokens
from gptjax.models.build import LanguageModel, abstract, split
from gptjax.system.disk import DiskError, check_local, is_failure, write_error, write_json
from gptjax.system.locks import LOCK, locked
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.checkpoint_files import CHECKPOINTS
from gptjax.training.metrics import METRICS, read_jsonl
from gptjax.training.step import State
from gptjax.training.tensorboard import event_files

CONFIG, RESULT = "config.json", "result.json"
TOKENS = "tokens"
"""The field of an imported model's config.json for what it decodes from and to."""
BEGUN = ".begun"
SHOWING = ".showing"
"""Beside result.json while figures and samples are made: who is killed then makes them again."""
OPENED = "the run's directory"
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
    "wandb",
    "loss.png",
    "attention.png",
    "samples.txt",
    "predictions.txt",
    "translations.txt",
)
"""All that a run leaves in its directory, and all that `--overwrite` deletes; beside it event files
in `train/` and `validation/`, of which it deletes no others."""


@contextlib.contextmanager
def hold(directory: Path, *, finished: bool = True) -> Iterator[None]:
    """Make `directory`, and let no other process write into it while the context is open.

    Of several processes of a run the first holds it.

    Args:
      directory: Of a run.
      finished: Hold it if it has a finished run, too, which is to be overwritten.

    Raises:
      InputError: another process holds it, or it cannot be made.
      DiskError: the disk fails, there or at what is written while the context is open.
    """
    if not distributed.is_first() or (not finished and _is_finished(directory)):
        yield
        return
    with contextlib.ExitStack() as held:
        try:
            check_local(directory).mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(directory / LOCK, directory))
        except OSError as error:
            raise write_error(error, directory) from error
        try:
            yield
        except OSError as error:
            if not is_failure(error):
                raise
            raise DiskError(
                f"{error.filename or directory}: {error.strerror}; what is saved in {directory} "
                "stays, and once there is room the same command goes on from it."
            ) from error


def _is_finished(directory: Path) -> bool:
    unfinished = (BEGUN, SHOWING)
    return (directory / RESULT).exists() and not any((directory / n).exists() for n in unfinished)


def begins(directory: Path) -> bool:
    """Whether a new run may begin in `directory`: it is empty, or holds a half-made start."""
    names = {path.name for path in directory.iterdir()}
    return BEGUN in names or names <= {LOCK}


def begin(
    directory: Path, content: dict[str, Any], make: Callable[[], None] = lambda: None
) -> None:
    """Delete what a run has left in `directory`, let `make` write, and write the config last.

    Whoever is killed on the way leaves a directory in which a new run `begins`.
    """
    (directory / BEGUN).touch()
    for name in reversed(WRITTEN):
        path = directory / name
        if name not in (LOCK, BEGUN):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in event_files(directory):  # A data set may have files of its own in such folders.
        path.unlink()
    make()
    write_json(directory / CONFIG, sealed(content))
    (directory / BEGUN).unlink()


def open_run(
    directory: Path,
    config: ExperimentConfig,
    tokenizer: Tokenizer,
    fingerprint: str,
    *,
    overwrite: bool = False,
) -> bool:
    """Make `directory` this run's, new or to be resumed; True if the run is already finished.

    Which is printed then. Of several processes the first makes it, and then the others look.
    Meanwhile the caller is to `hold` it.

    Raises:
      InputError: a directory that holds another run or other files, or that cannot be written, or
        that another process does not see.
    """
    wanted = {
        "config": to_dict(config),
        "data_sha256": fingerprint,
        "tokenizer_sha256": tokenizer.fingerprint,
    }
    if not distributed.is_first():
        distributed.meet(OPENED)
        if not (directory / CONFIG).exists():
            raise InputError(
                f"{directory} on {socket.gethostname()} is not the one that process 0 writes: "
                "--out must be in a file system that all hosts share."
            )
        _check_same(directory, wanted)
        return _is_finished(directory)
    finished = _open_first(directory, wanted, tokenizer, overwrite)
    distributed.meet(OPENED)
    if finished:
        print(f"{directory} holds a finished run of this config; --overwrite starts it anew.")
    return finished


def _open_first(
    directory: Path, wanted: dict[str, Any], tokenizer: Tokenizer, overwrite: bool
) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        new = begins(directory)
        if not new and not (directory / CONFIG).exists():
            raise InputError(f"{directory} holds files but no {CONFIG}: choose another --out.")
        if not new and not overwrite:
            _check_same(directory, wanted)
            return _is_finished(directory)
        begin(directory, wanted, lambda: save_tokenizer(tokenizer, directory))
    except OSError as error:
        raise write_error(error, directory, flag="--out") from error
    return False


def saved_tokenizer(directory: Path, data: DataConfig, fingerprint: str) -> Tokenizer | None:
    """The tokenizer of the run in `directory`, if it was learnt or read for the same text.

    So a run that is resumed does not learn it again, nor ask for the files that it was read from.
    """
    if not (directory / CONFIG).exists() or begins(directory):
        return None
    saved = _read_config(directory)
    was = saved["config"].get("data")
    same = isinstance(was, dict) and was.get("tokenizer") == data.tokenizer
    same = same and saved.get("data_sha256") == fingerprint
    return load_tokenizer(directory) if same else None


def _check_same(directory: Path, wanted: dict[str, Any]) -> None:
    """Refuse another config; over which devices a run is spread may change while it goes on."""
    saved = _read_config(directory)
    if "data" not in saved["config"]:
        raise InputError(
            f"{directory} holds a model that was not trained here, which no run resumes: choose "
            "another --out."
        )
    changed = differences(_without_mesh(saved), _without_mesh(wanted))
    if changed:
        raise InputError(
            f"{directory} holds a run with another config ({', '.join(changed)}): choose another "
            "--out, or --overwrite to delete it."
        )


def _without_mesh(saved: dict[str, Any]) -> dict[str, Any]:
    config = {name: value for name, value in saved["config"].items() if name != "mesh"}
    return {**saved, "config": config}


class Question(NamedTuple):
    """What `generate` and `beam_search` are given for a text of a user's."""

    prompt: np.ndarray
    """[T], tokens to continue."""
    source: np.ndarray | None
    """[S], what an encoder-decoder reads."""
    ends: tuple[int, ...]
    """The tokens behind which there is nothing more."""


class Run(NamedTuple):
    """A trained run, read back."""

    config: ExperimentConfig
    model: LanguageModel
    tokenizer: Tokenizer
    step: int
    """Of the checkpoint that the model is from."""
    tokens: DecodingTokens
    """What decoding begins and ends with."""
    metrics: list[dict[str, Any]]
    """Scalars of the logged steps; none of an imported model."""

    def question(self, text: str) -> Question:
        """The text as what is to be continued, or as the source of an encoder-decoder.

        Raises:
          InputError: an encoder-decoder that was imported without a token to begin or end with.
        """
        tokens = self.tokens
        if self.config.model.family != "encoder_decoder":
            return Question(self.tokenizer.encode_prompt(text), None, tokens.ends)
        start = tokens.begin if tokens.start is None else tokens.start
        if start is None or not tokens.ends:
            lacking = "eos_token_id" if tokens.ends == () else "decoder_start_token_id"
            raise InputError(
                f"The model was converted from a config.json without {lacking}, so that it cannot "
                "translate: add it there, and convert it again."
            )
        (source,) = self.tokenizer.encode_documents([text])
        return Question(np.array([start]), np.append(source, tokens.ends[0]), tokens.ends)


def load_config(directory: str | Path) -> ExperimentConfig:
    """The config of a run.

    Raises:
      InputError: no run, or a `config.json` that does not hold a config.
    """
    directory = Path(directory)
    if not directory.exists():
        raise InputError(f"{directory} is no run: {near_directories(directory)}")
    if not (directory / CONFIG).exists():
        raise InputError(f"{directory} holds no run: it has no {CONFIG}.")
    return from_dict(ExperimentConfig, _read_config(directory)["config"], str(directory / CONFIG))


def load_run(directory: str | Path, step: int | None = None) -> Run:
    """The model, tokenizer and metrics of a run, from its best checkpoint or the one of `step`.

    Raises:
      InputError: no run, no checkpoint, or one that does not fit its config.
    """
    directory = Path(directory)
    config, model, step = load_model(directory, step)
    tokenizer = load_tokenizer(directory)
    tokens = decoding_tokens(directory, config, tokenizer)
    return Run(config, model, tokenizer, step, tokens, read_jsonl(directory / METRICS))


def decoding_tokens(
    directory: str | Path, config: ExperimentConfig, tokenizer: Tokenizer | None
) -> DecodingTokens:
    """What decoding begins and ends with in a run: as it was imported, or as it was trained.

    Raises:
      InputError: a `config.json` that holds something else there.
    """
    path = Path(directory) / CONFIG
    saved = _read_config(Path(directory)).get(TOKENS)
    if saved is not None:
        try:
            fields = DecodingTokens(**saved).fields()
        except TypeError as error:
            raise InputError(f"{path}: {TOKENS} is {saved!r}, not of a gptjax run.") from error
        tokens = DecodingTokens.of_fields([(str(path), fields)], config.model.vocab_size)
        # A decoder's config may have one too, of which transformers makes no use.
        return tokens if config.model.family == "encoder_decoder" else tokens._replace(start=None)
    if tokenizer is None or config.model.family == "encoder":
        return DecodingTokens(pad=tokenizer.special.get("pad") if tokenizer else None)
    begin, pad = tokenizer.special.get("begin"), tokenizer.special.get("pad")
    if config.model.family != "encoder_decoder" or config.data.objective == "causal":
        ends = () if tokenizer.end_token is None else (tokenizer.end_token,)
        return DecodingTokens(begin, ends, pad)
    words = objective_vocabulary(config.data, config.model, tokenizer)
    return DecodingTokens(begin, (words.needed("end"),), pad, words.needed("begin"))


def load_model(
    directory: str | Path, step: int | None = None
) -> tuple[ExperimentConfig, LanguageModel, int]:
    """The config, the model and the step of a run, which may lack a tokenizer.

    Raises:
      InputError: no run, no checkpoint, or one that does not fit its config.
    """
    directory, config = Path(directory), load_config(directory)
    _check_checkpoints(directory)
    graphdef, shapes = abstract(config.model)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes
    )
    with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
        step = checkpoints.best_step if step is None else step
        params = checkpoints.restore_params(shapes, step)
        step = checkpoints.last_step if step is None else step
    assert step is not None
    return config, nnx.merge(graphdef, params), step


def checkpoint_steps(directory: str | Path) -> list[int]:
    """The steps whose state a run has kept, in order.

    Raises:
      InputError: no run, or no checkpoint.
    """
    directory = Path(directory)
    load_config(directory)
    _check_checkpoints(directory)
    with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
        return checkpoints.steps


def _check_checkpoints(directory: Path) -> None:
    if not (directory / CHECKPOINTS).is_dir():
        raise InputError(f"{directory} holds no {CHECKPOINTS} yet.")


def save_model(
    directory: str | Path, model: LanguageModel, tokens: DecodingTokens | None = None
) -> None:
    """A run's directory for a model that was not trained here: its config, and a checkpoint.

    `tokens` are what it decodes from and to, where that does not follow from its tokenizer.

    It has no tokenizer yet and no optimizer state: `load_model` reads it, and no run resumes it.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = State(jax.numpy.int32(0), split(model)[1], {"none": jax.numpy.zeros(1)})
    with Checkpoints(directory / CHECKPOINTS) as checkpoints:
        checkpoints.save(state, {})
        checkpoints.wait()
    # Of its data and its training nothing is known.
    saved: dict[str, Any] = {"config": {"model": to_dict(model.config)}}
    if tokens is not None:
        saved[TOKENS] = tokens._asdict()
    write_json(directory / CONFIG, sealed(saved))


def environment() -> dict[str, Any]:
    """The versions and the device that a result was reached with."""
    device = jax.devices()[0]
    return {
        "versions": distributed.versions(),
        "device": f"{jax.device_count()} × {device.device_kind}",
        "machine": platform.platform(),
    }


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    saved = read_sealed(path)
    if not isinstance(saved.get("config"), dict):
        raise InputError(f"{path} is not of a gptjax run: it has no field 'config'.")
    return saved
