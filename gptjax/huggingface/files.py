"""The directories of Hugging Face models: `config.json` and safetensors, read without executing.

Weights are mapped into memory, and a tensor is read when it is asked for. A pickle (`.bin`, `.pt`)
can run any code when it is read, so none is.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gptjax.config import InputError, read_json_object

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TIMEOUT_SECONDS = 5
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Weights:
    """The tensors of a directory, in one file or in several with an index."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._files: dict[str, Any] = {}
        if (directory / INDEX).exists():
            shards = set(_shards(directory / INDEX).values())
        elif (directory / WEIGHTS).exists():
            shards = {WEIGHTS}
        else:
            raise InputError(_no_weights(directory))
        for shard in sorted(shards):
            opened = self._open(directory / shard)
            self._files |= dict.fromkeys(opened.keys(), opened)
        if (directory / INDEX).exists():
            self._check_index()

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """A tensor.

        Raises:
          InputError: numbers that are not floating-point, or a NaN among them.
        """
        try:
            tensor = self._files[name].get_tensor(name)
        except (SafetensorError, TypeError) as error:
            raise InputError(f"{self.directory}: {name} cannot be read: {error}.") from error
        return checked(tensor, f"{self.directory}: {name}")

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="np")
        except (SafetensorError, OSError) as error:
            if not path.exists():
                raise InputError(f"{path} is missing, though {INDEX} names it.") from error
            raise InputError(
                f"{path} is damaged or cut short ({error}): copy or download it again."
            ) from error

    def _check_index(self) -> None:
        """Every tensor lies where the index says."""
        indexed = _shards(self.directory / INDEX)
        lost = sorted(set(indexed) - set(self._files))
        if lost:
            where = "; ".join(f"{indexed[name]} lacks {name}" for name in lost)
            raise InputError(f"{self.directory / INDEX} names tensors that are missing: {where}.")


def checked(tensor: np.ndarray, what: str) -> np.ndarray:
    """The tensor itself, called `what`.

    Raises:
      InputError: numbers that are not floating-point, or a NaN among them.
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(f"{what} is of {tensor.dtype}: gptjax reads floating-point weights alone.")
    if np.isnan(tensor).any():
        raise InputError(f"{what} holds a NaN, so no output would be right.")
    return tensor


def _shards(path: Path) -> dict[str, str]:
    """The file of each tensor."""
    shards = read_json_object(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{path} has no weight_map, which names the file of each tensor.")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{path} names {shard!r}: a file must lie in the same directory.")
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
    """The directory of a model: `source` itself, or what the hub has under this name.

    Raises:
      InputError: neither; or a download that fails.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{source} is a file: give the directory that holds it.")
    if not _HUB_ID.fullmatch(str(source)):
        raise InputError(f"{source} is no directory, and no name of a model on the hub either.")
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            f"{source} is no directory; to download it from the hub, "
            "pip install 'gptjax[huggingface]'."
        ) from error
    wanted = [CONFIG, "model*.safetensors", INDEX, TOKENIZER]
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
    """Nothing is overwritten.

    Raises:
      InputError: a directory that holds something, or a file.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise InputError(f"{directory} is there already: choose another, or delete it.")


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """A directory that transformers loads; the config last, so that it is whole or no model.

    Raises:
      InputError: a directory that is in use, or cannot be written.
    """
    check_unused(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), directory / WEIGHTS, metadata={"format": "pt"})
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {directory}: {error}.") from error
