"""gptjax: a research codebase for the GPT family in JAX: train, look inside, compare.

Its names are imported from their modules when they are first used, so that neither the command
line nor a notebook's first cell waits for JAX.
"""

from typing import TYPE_CHECKING

MODULES = {
    "PRESETS": "gptjax.models.presets",
    "DataConfig": "gptjax.config",
    "Decoder": "gptjax.models.build",
    "Encoder": "gptjax.models.build",
    "EncoderDecoder": "gptjax.models.build",
    "ExperimentConfig": "gptjax.config",
    "Hypothesis": "gptjax.decoding.beam_search",
    "InputError": "gptjax.config",
    "OptimizerConfig": "gptjax.config",
    "Recurrent": "gptjax.models.build",
    "Sampling": "gptjax.decoding.sampling",
    "TrainConfig": "gptjax.config",
    "TransformerConfig": "gptjax.config",
    "Run": "gptjax.runs.loading",
    "attention_view": "gptjax.notebook.attention",
    "beam_search": "gptjax.decoding.beam_search",
    "build": "gptjax.models.build",
    "certify": "gptjax.certify",
    "compare": "gptjax.compare",
    "from_gguf": "gptjax.huggingface",
    "from_huggingface": "gptjax.huggingface",
    "generate": "gptjax.decoding.generate",
    "model_cost": "gptjax.costs.model",
    "load_run": "gptjax.runs.loading",
    "plots": "gptjax.plots",
    "preset": "gptjax.models.presets",
    "probe": "gptjax.probe",
    "split": "gptjax.models.build",
    "to_huggingface": "gptjax.huggingface",
    "train": "gptjax.notebook.training",
}
"""Every public name → its module, or itself if it is one of ours (`"probe": "gptjax.probe"`)."""

if TYPE_CHECKING:  # The same names again, since type checkers and editors read no table.
    from gptjax import certify as certify
    from gptjax import compare as compare
    from gptjax import plots as plots
    from gptjax import probe as probe
    from gptjax.config import DataConfig as DataConfig
    from gptjax.config import ExperimentConfig as ExperimentConfig
    from gptjax.config import InputError as InputError
    from gptjax.config import OptimizerConfig as OptimizerConfig
    from gptjax.config import TrainConfig as TrainConfig
    from gptjax.config import TransformerConfig as TransformerConfig
    from gptjax.costs.model import model_cost as model_cost
    from gptjax.decoding.beam_search import Hypothesis as Hypothesis
    from gptjax.decoding.beam_search import beam_search as beam_search
    from gptjax.decoding.generate import generate as generate
    from gptjax.decoding.sampling import Sampling as Sampling
    from gptjax.huggingface import from_gguf as from_gguf
    from gptjax.huggingface import from_huggingface as from_huggingface
    from gptjax.huggingface import to_huggingface as to_huggingface
    from gptjax.models.build import Decoder as Decoder
    from gptjax.models.build import Encoder as Encoder
    from gptjax.models.build import EncoderDecoder as EncoderDecoder
    from gptjax.models.build import Recurrent as Recurrent
    from gptjax.models.build import build as build
    from gptjax.models.build import split as split
    from gptjax.models.presets import PRESETS as PRESETS
    from gptjax.models.presets import preset as preset
    from gptjax.notebook.attention import attention_view as attention_view
    from gptjax.notebook.training import train as train
    from gptjax.runs.loading import Run as Run
    from gptjax.runs.loading import load_run as load_run
else:  # Type checkers do not look here: with `__getattr__` they would accept any name.
    __all__ = [*MODULES]

    def __getattr__(name):
        if name not in MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        module = importlib.import_module(MODULES[name])
        found = module if MODULES[name] == f"{__name__}.{name}" else getattr(module, name)
        globals()[name] = found  # From then on Python finds it without asking here.
        return found

    def __dir__():
        return sorted({*globals(), *MODULES})
