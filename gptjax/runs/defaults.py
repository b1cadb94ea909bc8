"""The default config of each preset: data, learning rate, length."""

import dataclasses
from typing import Any

from gptjax.config import (
    DataConfig,
    ExperimentConfig,
    InputError,
    OptimizerConfig,
    TrainConfig,
    near_names,
)
from gptjax.config.values import Objective
from gptjax.models.presets import preset

OBJECTIVES: dict[str, Objective] = {
    "encoder": "masked_lm",
    "encoder_decoder": "sequence_to_sequence",
}
"""The default objective of each family; all others predict the next token (causal)."""


def defaults(name: str) -> ExperimentConfig:
    """The default config of the preset `name`, its vocabulary size left to the tokenizer.

    Raises:
      InputError: no such preset.
    """
    model = dataclasses.replace(preset(name), vocab_size=0)
    objective = OBJECTIVES.get(model.family, "causal")
    if objective == "masked_lm":
        # Without the next-sentence head, which only the objective `next_sentence` needs.
        model = dataclasses.replace(model, token_types=0, encoder_heads="masked_lm")
    if objective == "causal":
        data = DataConfig()
    elif objective == "masked_lm":
        data = DataConfig(objective=objective, tokenizer="bpe:1000")
    else:
        source, target = ("source.txt#documents=line",), ("target.txt#documents=line",)
        data = DataConfig(objective=objective, tokenizer="bpe:4000", source=source, target=target)
    return ExperimentConfig(
        model=model,
        data=data,
        optimizer=OptimizerConfig(learning_rate=3e-3 if model.width < 512 else 6e-4),
        train=TrainConfig(steps=1000, batch_size=16),
    )


def with_fields(config: ExperimentConfig, **fields: Any) -> ExperimentConfig:
    """`config` with fields of any of its sections replaced, as flags do.

    No two sections have a field of the same name.

    Raises:
      InputError: a field that no section has, or a value that it does not take.
    """
    sections = {
        field.name: section.name
        for section in dataclasses.fields(config)
        for field in dataclasses.fields(getattr(config, section.name))
    }
    changes: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        if name not in sections:
            raise InputError(f"{name} is no field of a run's config: {near_names(name, sections)}")
        changes.setdefault(sections[name], {})[name] = value
    changed = {
        section: dataclasses.replace(getattr(config, section), **values)
        for section, values in changes.items()
    }
    return dataclasses.replace(config, **changed)
