"""The config of a comparison: variants, what they are matched by, and the budget."""

import math
from dataclasses import dataclass, field

from gptjax.config import DataConfig, InputError, OptimizerConfig, near_names
from gptjax.config.checks import check, check_minimum, check_types

MEASURES = ("params", "flops", "seconds")
"""What variants can be matched by: parameters, training FLOPs per token, seconds per token."""
BUDGETS = ("tokens", "flops", "seconds")
"""Units of a run's budget."""
SUFFIXES = {"k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
"""Suffixes of a number, as written; read case-insensitively."""


@dataclass(frozen=True)
class Comparison:
    """Is B better than A? Each variant is trained on the same batches, seed by seed."""

    variants: tuple[str, ...]
    """Presets, presets with overrides (gpt2:norm=rmsnorm,activation=swiglu), or with all values of
    an axis (gpt2:position_embedding=*). The first is the baseline."""
    match: str = "params"
    """What all variants have in common, by their width: params, flops (of training, per token) or
    seconds (measured, per token) of the baseline; params=1M sets it for all; none changes no
    width."""
    tolerance: float = 0.01
    """Relative deviation allowed from the matched value."""
    budget: str = "tokens=1M"
    """Budget of each run: tokens=20M, tokens=100k, flops=1e15, seconds=60."""
    seeds: int = 5
    """Runs of each variant that are compared."""
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Peak learning rates, of which each variant takes its best; a single one is taken by all."""
    search_seeds: int = 2
    """Runs of each variant and rate that choose the rate; their seeds are not compared."""
    mup_width: int = 0
    """Rates are chosen at this width and transferred to the real one by muP; 0 chooses at the
    real width."""
    confidence: float = 0.95
    """Family-wise confidence level of all verdicts."""
    evaluations: int = 10
    """Points of each curve."""
    context_length: int = 0
    """Tokens per row, for all; 0 takes the baseline's."""
    batch_size: int = 16
    """Rows per step."""
    dropout: float = 0.0
    """Dropout of all variants that set none themselves."""
    scale: str = ""
    """Sizes to compare at, instead of match: params=0.3M,1M,3M."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer of all variants; rates replace its learning_rate."""

    def __post_init__(self) -> None:
        check_types(self)
        check_minimum(self, 1, "seeds", "search_seeds", "evaluations", "batch_size")
        check_minimum(self, 0, "mup_width", "context_length")
        for name in ("tolerance", "confidence"):
            check(self, name, 0 < getattr(self, name) < 1, "between 0 and 1")
        check(self, "dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        check(self, "variants", bool(self.variants), "at least one variant")
        check(self, "rates", bool(self.rates), "at least one learning rate")
        check(self, "rates", all(0 < rate < math.inf for rate in self.rates), "above 0")


def parse_quantity(flag: str, text: str, known: tuple[str, ...]) -> tuple[str, tuple[float, ...]]:
    """Returns the measure and the amounts of `params=0.3M,1M`; no amounts for a name alone.

    Raises:
      InputError: an unknown name, or an invalid number.
    """
    name, equals, values = text.partition("=")
    if name not in known:
        raise InputError(f"--{flag} has an unknown measure {name!r}: {near_names(name, known)}")
    return name, tuple(_number(flag, text, word) for word in values.split(",")) if equals else ()


def quantity(number: float) -> str:
    """Returns a number as `parse_quantity` reads it: 1500000 as 1.5M."""
    for suffix, factor in reversed(SUFFIXES.items()):
        if suffix != "G" and number >= factor:
            return f"{number / factor:g}{suffix}"
    return f"{number:g}"


def _number(flag: str, text: str, word: str) -> float:
    factors = {suffix.lower(): factor for suffix, factor in SUFFIXES.items()}
    factor = factors.get(word[-1:].lower(), 1.0)
    try:
        value = float(word if factor == 1.0 else word[:-1]) * factor
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(
            f"--{flag} is {text!r}: {word!r} must be a number above 0, as 300000, 0.3M or 3e5."
        )
    return value
