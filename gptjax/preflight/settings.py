"""The default config of a preflight, and its short flags."""

import dataclasses
import math

from gptjax.config import (
    DataConfig,
    ExperimentConfig,
    InputError,
    MeshConfig,
    TrainConfig,
    TransformerConfig,
    near_names,
    whole_number,
)
from gptjax.models.presets import preset

LOSS_CHUNK = 1024
"""Tokens whose logits are computed at once: GPT-2's of 8 sequences of 1,024 take 1.5 GiB."""


def default_config(name: str) -> ExperimentConfig:
    """Returns a preset as trained at scale: bfloat16, scanned layers, full remat, chunked loss.

    All else, dropout too, is the preset's.

    Raises:
      InputError: an unknown preset.
    """
    model = dataclasses.replace(preset(name), dtype="bfloat16", scan_layers=True, remat="full")
    train = TrainConfig(batch_size=8, loss_chunk=LOSS_CHUNK)
    return ExperimentConfig(model=model, data=_data(model), train=train)


def _data(model: TransformerConfig) -> DataConfig:
    """Returns the data config with the family's objective."""
    if model.family == "encoder":
        pairs = model.encoder_heads == "pretraining"
        return DataConfig(objective="next_sentence" if pairs else "masked_lm")
    if model.family == "encoder_decoder":
        return DataConfig(objective="sequence_to_sequence", target=("embedded",))
    return DataConfig()


def with_sizes(
    config: ExperimentConfig,
    devices: int,
    *,
    mesh: str = "",
    slices: int = 1,
    batch_per_device: float = 0,
    sequence: int = 0,
) -> ExperimentConfig:
    """Returns the config with the short flags applied; 0 and "" leave it as it is.

    Raises:
      InputError: a mesh that cannot be read, or a batch that is not a whole number.
    """
    axes = dataclasses.replace(config.mesh, **{**parse_mesh(mesh), "slices": slices})
    model, train = config.model, config.train
    if sequence:
        model = dataclasses.replace(model, context_length=sequence)
    if batch_per_device:
        batch = batch_per_device * devices
        if not batch >= 1 or math.isinf(batch) or batch != int(batch):
            raise InputError(
                f"--batch-per-device is {batch_per_device:g}: on {devices} devices that is not a "
                "whole number of sequences."
            )
        train = dataclasses.replace(train, batch_size=int(batch))
    return dataclasses.replace(config, mesh=axes, model=model, train=train)


def parse_mesh(text: str) -> dict[str, int]:
    """Parses `data=1,fsdp=16` into sizes by axis.

    Raises:
      InputError: an unknown axis, or an invalid number.
    """
    known = [item.name for item in dataclasses.fields(MeshConfig) if item.name != "pmap"]
    axes = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        number = whole_number(size)
        if number is None:
            raise InputError(f"--mesh is {text!r}: it must be axes and numbers, as data=1,fsdp=16.")
        if name not in known:
            raise InputError(f"--mesh has an unknown axis {name!r}: {near_names(name, known)}")
        axes[name] = number
    return axes
