"""gptjax: a laboratory for the GPT family in JAX: train, look inside, compare."""

from gptjax.config import (
    DataConfig,
    ExperimentConfig,
    InputError,
    OptimizerConfig,
    TrainConfig,
    TransformerConfig,
)
from gptjax.generate import Sampling, generate
from gptjax.ledger import ledger
from gptjax.presets import PRESETS, preset
from gptjax.transformer import Decoder, split

__all__ = [
    "PRESETS",
    "DataConfig",
    "Decoder",
    "ExperimentConfig",
    "InputError",
    "OptimizerConfig",
    "Sampling",
    "TrainConfig",
    "TransformerConfig",
    "generate",
    "ledger",
    "preset",
    "split",
]
