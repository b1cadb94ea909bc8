"""What is compiled when nothing else is said, and the flags that say it shortly."""

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
"""Tokens whose scores are there at once. For GPT-2, 8 sequences of 1,024 have 1.5 GiB of them."""


def default_config(name: str) -> ExperimentConfig:
    """A preset as it is trained at scale: bfloat16 products, layers scanned and recomputed, the
    loss in chunks. All else, dropout too, is the preset's.

    Raises:
      InputError: an unknown preset.
    """
    model = dataclasses.replace(preset(name), dtype="bfloat16", scan_layers=True, remat="full")
    train = TrainConfig(batch_size=8, loss_chunk=LOSS_CHUNK)
    return ExperimentConfig(model=model, data=_data(model), train=train)


def _data(model: TransformerConfig) -> DataConfig:
    """What a model of the family is trained to predict."""
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
    """The config with what the short flags say; 0 and "" leave it as it is.

    Raises:
      InputError: a mesh that cannot be read, or a batch that is not whole.
    """
    axes = dataclasses.replace(config.mesh, **{**parse_mesh(mesh), "slices": slices})
    model, train = config.model, config.train
    if sequence:
        model = dataclasses.replace(model, context_length=sequence)
    if batch_per_device:
        batch = batch_per_device * devices
        if not batch >= 1 or math.isinf(batch) or batch != int(batch):
            raise InputError(
                f"--batch-per-device is {batch_per_device:g}: on {devices} devices that is no "
                "whole number of sequences."
            )
        train = dataclasses.replace(train, batch_size=int(batch))
    return dataclasses.replace(config, mesh=axes, model=model, train=train)


def parse_mesh(text: str) -> dict[str, int]:
    """The axes of `data=1,fsdp=16`.

    Raises:
      InputError: an unknown axis, or what is no number.
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
