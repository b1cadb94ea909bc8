"""Every choice of an experiment, as frozen dataclasses validated on construction.

A wrong value is an `InputError` of one sentence: the field, the value and what is accepted. These
classes define the command line (`--model.depth 6`); a field's docstring is its `--help`.
"""

from gptjax.config.checks import (
    InputError,
    near_directories,
    near_names,
    shown,
    whole_number,
)
from gptjax.config.dictionaries import differences, from_dict, to_dict
from gptjax.config.experiment import (
    DataConfig,
    ExperimentConfig,
    OptimizerConfig,
    TrainConfig,
    with_vocabulary,
)
from gptjax.config.json_files import (
    SEAL,
    parse_json,
    read_json,
    read_json_object,
    read_limited,
    read_sealed,
    sealed,
    unsealed,
)
from gptjax.config.mesh import MeshConfig
from gptjax.config.model import TransformerConfig

__all__ = [
    "SEAL",
    "DataConfig",
    "ExperimentConfig",
    "InputError",
    "MeshConfig",
    "OptimizerConfig",
    "TrainConfig",
    "TransformerConfig",
    "differences",
    "from_dict",
    "near_directories",
    "near_names",
    "parse_json",
    "read_json",
    "read_json_object",
    "read_limited",
    "read_sealed",
    "sealed",
    "shown",
    "to_dict",
    "unsealed",
    "whole_number",
    "with_vocabulary",
]
