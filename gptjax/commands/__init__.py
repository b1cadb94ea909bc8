"""What `python -m gptjax` can do: one function a command, thin over the modules.

The parameters are the flags, and the docstring is their help.
"""

from gptjax.commands.hosts import doctor, launch
from gptjax.commands.models import certify, convert, params, sample
from gptjax.commands.texts import build_dataset, data

__all__ = [
    "COMMANDS",
    "build_dataset",
    "certify",
    "convert",
    "data",
    "doctor",
    "launch",
    "params",
    "sample",
]

COMMANDS = {
    "sample": sample,
    "params": params,
    "certify": certify,
    "convert": convert,
    "data": data,
    "build-dataset": build_dataset,
    "doctor": doctor,
    "launch": launch,
}
