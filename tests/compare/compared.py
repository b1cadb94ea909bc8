"""A comparison small enough for tests: one block of width 16 on a text of squares."""

import dataclasses
from pathlib import Path
from typing import Any

from gptjax.compare.question import Comparison
from gptjax.compare.results import Costs
from gptjax.config import DataConfig, OptimizerConfig

COSTS = Costs(1000.0, 2000, 3.0, None, None)
"""In the place of what a clock would say."""
TINY = "quickstart:depth=1,width=16,heads=2"


def text(directory: Path) -> Path:
    path = directory / "text.txt"
    path.write_text("".join(f"{n} and {n * n} are a number and its square.\n" for n in range(90)))
    return path


def tiny(directory: Path, *variants: str, **fields: Any) -> Comparison:
    """40 steps of 4 rows of 16 characters, two seeds, one learning rate, unless told otherwise."""
    comparison = Comparison(
        variants=variants or (TINY,),
        match="none",
        budget="tokens=2560",
        seeds=2,
        rates=(1e-2,),
        evaluations=4,
        context_length=16,
        batch_size=4,
        data=DataConfig(source=(str(text(directory)),), tokenizer="characters"),
        optimizer=OptimizerConfig(warmup_steps=2),
    )
    return dataclasses.replace(comparison, **fields)
