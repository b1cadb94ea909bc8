"""The commands of `python -m gptjax`: one function per command, thin over the modules.

Parameters are flags, and docstrings their help.
"""

from collections.abc import Callable, Sequence

from gptjax.commands.attention import attention
from gptjax.commands.hosts import doctor, launch
from gptjax.commands.models import certify, convert, params, sample
from gptjax.commands.preflight import preflight_for
from gptjax.commands.texts import build_dataset, data
from gptjax.commands.training import compare, goodput, train

__all__ = [
    "attention",
    "build_dataset",
    "certify",
    "commands",
    "compare",
    "convert",
    "data",
    "doctor",
    "goodput",
    "launch",
    "params",
    "sample",
    "train",
]


def commands(arguments: Sequence[str]) -> dict[str, Callable[..., None]]:
    """Returns the commands by name; a preset in `arguments` sets preflight's defaults."""
    return {
        "train": train,
        "compare": compare,
        "sample": sample,
        "params": params,
        "certify": certify,
        "convert": convert,
        "attention": attention,
        "goodput": goodput,
        "data": data,
        "build-dataset": build_dataset,
        "preflight": preflight_for(arguments),
        "doctor": doctor,
        "launch": launch,
    }
