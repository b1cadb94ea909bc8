"""Directories of Hugging Face models: `config.json` and safetensors, read without executing code.

Weights are memory-mapped, and tensors are read on demand. Pickles (`.bin`, `.pt`) can run any code
when read, so they are refused.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gptjax.config import InputError, near_directories, read_json_object, shown
from gptjax.system.buckets import url_of
from gptjax.system.mirrors import downloaded_directory

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TIMEOUT_SECONDS = 5
MOST_LISTED = 20
"""Most problems listed in one sentence."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""OWNER/NAME."""


class Weights:
    """The tensors of a directory, in one file or in several with an index.

    If both exist the single file counts, as in transformers: saving a smaller model over a sharded
    one leaves the old index.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._files: dict[str, Any] = {}
        if (directory / WEIGHTS).exists():
            self._files = dict.fromkeys(*self._open(WEIGHTS))
        elif (directory / INDEX).exists():
            self._read_shards(_shards(directory / INDEX))
        else:
            raise InputError(_no_weights(directory))

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor.

        Raises:
          InputError: numbers that are not floating-point, a NaN or an infinity among them.
        """
        try:
            tensor = self._files[name].get_tensor(name)
        except (SafetensorError, TypeError, AttributeError, KeyError) as error:
            raise InputError(f"{self.directory}: {name} cannot be read: {error}.") from error
        return checked(tensor, f"{self.directory}: {name}")

    def _open(self, name: str) -> tuple[list[str], Any]:
        """Opens a file; returns the names of its tensors, and the file."""
        path = self.directory / name
        try:
            if not path.is_file():
                why = (
                    "is no regular file"
                    if path.exists()
                    else f"is missing, though {INDEX} names it"
                )
                raise InputError(f"{path} {why}.")
            opened = safe_open(path, framework="np")
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} is damaged or cut short ({error}): copy or download it again."
            ) from error
        return opened.keys(), opened

    def _read_shards(self, indexed: Mapping[str, str]) -> None:
        """Open all shards, checking that every tensor is in the shard that the index says."""
        held: dict[str, str] = {}
        for shard in sorted(set(indexed.values())):
            names, opened = self._open(shard)
            twice = sorted(held.keys() & names)
            if twice:
                both = f"{held[twice[0]]} and {shard}"
                raise InputError(f"{self.directory} holds {twice[0]} twice, in {both}.")
            held |= dict.fromkeys(names, shard)
            self._files |= dict.fromkeys(names, opened)
        lost = sorted(name for name, shard in indexed.items() if held.get(name) != shard)
        if lost:
            where = listed(f"{indexed[name]} lacks {name}" for name in lost)
            raise InputError(f"{self.directory / INDEX} names tensors that are missing: {where}.")


def checked(tensor: np.ndarray, what: str) -> np.ndarray:
    """Returns the tensor, called `what` in errors, if it is valid.

    Raises:
      InputError: numbers that are not floating-point, a NaN or an infinity among them.
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(f"{what} is {tensor.dtype}: gptjax reads only floating-point weights.")
    if not np.isfinite(tensor).all():
        found = "a NaN" if np.isnan(tensor).any() else "an infinity"
        raise InputError(f"{what} holds {found}, so no output would be right.")
    return tensor


def converted(tensor: np.ndarray, dtype: Any, what: str) -> np.ndarray:
    """Returns the finite tensor, called `what` in errors, as another dtype.

    Raises:
      InputError: a number too large for the dtype.
    """
    with np.errstate(over="ignore"):
        result = tensor.astype(dtype)
    if not np.isfinite(result).all():
        largest = float(np.abs(tensor).max())
        raise InputError(
            f"{what} holds a number of size {largest:g}, too large for {np.dtype(dtype).name} "
            f"(at most {float(jnp.finfo(dtype).max):g}): read it as another dtype."
        )
    return result


def listed(problems: Iterable[str]) -> str:
    """Returns the first problems, and the number of the rest."""
    every = list(problems)
    more = len(every) - MOST_LISTED
    return "; ".join(every[:MOST_LISTED]) + (f"; and {more:,} more" if more > 0 else "")


def _shards(path: Path) -> dict[str, str]:
    """Returns the file of each tensor."""
    shards = read_json_object(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{path} has no weight_map, which names the file of each tensor.")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.isprintable():
            raise InputError(f"{path} names {shown(shard)}: a file must lie in the same directory.")
    return shards


def _no_weights(directory: Path) -> str:
    pickles = sorted(path.name for kind in ("bin", "pt") for path in directory.glob(f"*.{kind}"))
    if pickles:
        return (
            f"{directory} holds {', '.join(pickles)} alone, a pickle, which can run any code when "
            "it is read: convert it with transformers' from_pretrained and save_pretrained, which "
            f"writes {WEIGHTS}."
        )
    return f"{directory} holds neither {WEIGHTS} nor {INDEX}."


def find(source: str | Path) -> Path:
    """Returns the directory of a model: `source` itself, or a download from a bucket or the hub.

    If there is a directory OWNER, `source` is a path, and the hub is not queried.

    Raises:
      InputError: neither; or a failed download.
    """
    if url := url_of(source):
        return downloaded_directory(url)
    path = Path(source)
    try:
        if path.is_dir():
            return path
        if path.exists():
            raise InputError(f"{source} is a file: give the directory that holds it.")
        local = path.parent.is_dir()
    except OSError as error:
        raise InputError(f"cannot read {shown(str(source))}: {error.strerror}.") from error
    if not _HUB_ID.fullmatch(str(source)):
        near = near_directories(path)
        raise InputError(f"{source} is no directory, and no OWNER/NAME of the hub's: {near}")
    if local:  # A misspelt run is not looked up on the hub.
        raise InputError(f"{source} is no directory: {near_directories(path)}")
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            f"{source} is no directory; to download it from the hub, "
            "pip install 'gptjax[huggingface]'."
        ) from error
    beside = ["tokenizer_config.json", "special_tokens_map.json", GENERATION]
    wanted = [CONFIG, "model*.safetensors", INDEX, TOKENIZER, *beside]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(source), allow_patterns=wanted, etag_timeout=TIMEOUT_SECONDS
            )
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split("\n")[0].split()).rstrip(".")
        raise InputError(
            f"{source} is no directory, and the download from the hub failed: {reason}."
        ) from error


def check_unused(directory: Path) -> None:
    """Refuse a directory that is not new or empty.

    Raises:
      InputError: a directory with content, or a file.
    """
    try:
        there = directory.exists() or directory.is_symlink()
        used = there and not (directory.is_dir() and not any(directory.iterdir()))
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror}.") from error
    if used:
        raise InputError(f"{directory} is there already: choose another, or delete it.")


def write(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    generation: Mapping[str, Any],
) -> None:
    """Write a directory that transformers can load, the config last, so that a partial one is none.

    `generation`, if not empty, becomes generation_config.json.

    Raises:
      InputError: a directory that is in use, or cannot be written.
    """
    check_unused(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), directory / WEIGHTS, metadata={"format": "pt"})
        if generation:
            (directory / GENERATION).write_text(_json(generation), encoding="utf-8")
        (directory / CONFIG).write_text(_json(config), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {directory}: {error}.") from error


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
