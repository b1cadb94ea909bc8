"""gptjax: a laboratory for the GPT family in JAX: train, look inside, compare."""

from gptjax.beam_search import Hypothesis, beam_search
from gptjax.config import (
    DataConfig,
    ExperimentConfig,
    InputError,
    OptimizerConfig,
    TrainConfig,
    TransformerConfig,
)
from gptjax.generate import Sampling, generate
from gptjax.huggingface import from_gguf, from_huggingface, to_huggingface
from gptjax.ledger import ledger
from gptjax.presets import PRESETS, preset
from gptjax.transformer import Decoder, Encoder, EncoderDecoder, Recurrent, build, split

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
