"""The axes along which variants differ, and the values of each.

They are read from the annotations of `TransformerConfig`: a new value of an axis is certified and
can be compared without further code.
"""

import types
import typing
from collections.abc import Callable
from typing import Any, Literal

from gptjax.config import TransformerConfig

SETTINGS: dict[str, tuple[Any, ...]] = {
    "attention": ("full", "local", "compressed", "local,full"),
    "kv_heads": (1, 2),
    "rotary_fraction": (0.5,),
    "num_experts": (4,),
    "token_types": (2,),
}
"""Values for axes whose annotation lists none; they are valid at any model size."""

OUTSIDE = {
    "vocab_size": "a size",
    "context_length": "a size",
    "depth": "a size",
    "width": "a size",
    "heads": "a size",
    "norm_epsilon": "a constant of a formula",
    "rope_theta": "a constant of a formula",
    "window": "set together with local attention",
    "attention_kernel": "the others do not run on CPUs: tests/layers/attention/test_flash.py",
    "compression": "set together with compressed attention",
    "experts_per_token": "set together with experts",
    "dropout": "0: what is dropped depends on how a batch is split",
    "capacity_factor": "0: which tokens a full expert drops depends on the others of the batch, so "
    "that parts of a batch, devices and cached decoding rightly differ from the whole",
    "dtype": "a column: every variant runs in both types",
    "scan_layers": "a column: every variant runs both ways",
    "remat": "a column: every variant runs both ways",
    "remat_layers": "for scanned layers: tests/layers/test_stack.py",
    "microbatches": "for pipelines: tests/training/test_partitioned_step.py",
}
"""Fields that are not axes of the grid of `gptjax.certify`, and why."""

Companion = Callable[[TransformerConfig], Any]
"""A config → the value another of its fields needs: its present value where that is valid."""


def _only(value: Any) -> Companion:
    return lambda config: value


def _rotary(config: TransformerConfig) -> str:
    return config.position_embedding if config.position_embedding == "sinusoidal" else "rotary"


def _added(config: TransformerConfig) -> str:
    return (
        config.position_embedding
        if config.position_embedding in ("sinusoidal", "none")
        else "learned"
    )


def _window(config: TransformerConfig) -> int:
    return config.window or config.context_length // 2


COMPANIONS: dict[str, dict[str, Companion]] = {
    "family=recurrent": {
        "position_embedding": _only("none"),
        "attention": _only("full"),
        "window": _only(0),
        "num_experts": _only(0),
    },
    "pairing": {"position_embedding": _rotary},
    "rotary_fraction": {"position_embedding": _only("rotary")},
    "attention=full": {"window": _only(0)},
    "attention=local": {"window": _window},
    "attention=local,full": {"window": _window},
    "attention=compressed": {"window": _only(0), "position_embedding": _added},
    "query_bias=True": {"bias": _only(False)},
    "output_bias=True": {"bias": _only(False)},
    "token_types": {"family": _only("encoder")},
    "encoder_heads": {"family": _only("encoder")},
    "encoder_depth": {"family": _only("encoder_decoder")},
}
"""Fields that an axis, or one value of it, needs to be valid and to have an effect."""


def listed(hint: Any) -> tuple[Any, ...]:
    """The values that an annotation lists: a Literal's, both of a bool, else none."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    union = isinstance(hint, types.UnionType) and bool in typing.get_args(hint)
    return (False, True) if hint is bool or union else ()


AXES: dict[str, tuple[Any, ...]] = {
    name: SETTINGS.get(name) or listed(hint)
    for name, hint in typing.get_type_hints(TransformerConfig).items()
    if name not in OUTSIDE and (name in SETTINGS or listed(hint))
}
"""Every axis that can be varied at any model size, with its values."""


def companions(axis: str, value: Any, config: TransformerConfig) -> dict[str, Any]:
    """Values that other fields of `config` need for `axis` to take effect at `value`."""
    needed = COMPANIONS.get(axis, {}) | COMPANIONS.get(f"{axis}={value}", {})
    return {name: companion(config) for name, companion in needed.items()}
