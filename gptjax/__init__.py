"""gptjax: a research codebase for the GPT family in JAX: train, look inside, compare."""

from gptjax.config import (
    DataConfig,
    ExperimentConfig,
    InputError,
    OptimizerConfig,
    TrainConfig,
    TransformerConfig,
)
from gptjax.costs.model import ledger
from gptjax.decoding.beam_search import Hypothesis, beam_search
from gptjax.decoding.generate import Sampling, generate
from gptjax.huggingface import from_gguf, from_huggingface, to_huggingface
from gptjax.models.build import Decoder, Encoder, EncoderDecoder, Recurrent, build, split
from gptjax.models.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "DataConfig",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "ExperimentConfig",
    "Hypothesis",
    "InputError",
    "OptimizerConfig",
    "Recurrent",
    "Sampling",
    "TrainConfig",
    "TransformerConfig",
    "beam_search",
    "build",
    "from_gguf",
    "from_huggingface",
    "generate",
    "ledger",
    "preset",
    "split",
    "to_huggingface",
]
