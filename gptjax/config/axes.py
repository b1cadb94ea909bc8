"""The axes along which variants differ, and the values of each.

They are read from the annotations of `TransformerConfig`, so that a new value of an axis is
certified and can be compared without another line.
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
"""Values of the axes whose annotation does not list them; those that suit any size."""

OUTSIDE = {
    "vocab_size": "a size",
    "context_length": "a size",
    "depth": "a size",
    "width": "a size",
    "heads": "a size",
    "norm_epsilon": "a constant of a formula",
    "rope_theta": "a constant of a formula",
    "window": "comes with local attention",
    "attention_kernel": "the platform's own are no CPU's: tests/layers/attention/test_flash.py",
    "compression": "comes with compressed attention",
    "experts_per_token": "comes with experts",
    "dropout": "0: what is dropped depends on how a batch is divided",
    "capacity_factor": "0: which tokens a full expert drops depends on the others of the batch, so "
    "that parts of a batch, devices and cached decoding rightly differ from the whole",
    "dtype": "a column: every variant runs in both types",
    "scan_layers": "a column: every variant runs both ways",
    "remat": "a column: every variant runs both ways",
    "remat_layers": "of scanned layers: tests/layers/test_stack.py",
    "microbatches": "of a pipeline: tests/training/test_partitioned_step.py",
}
"""Fields that are no axis of the grid of `gptjax.certify`, and why."""

Companion = Callable[[TransformerConfig], Any]
"""A config → what another of its fields must hold: what it holds already, where that will do."""


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
"""What an axis, or one value of it, is refused or has no effect without."""


def listed(hint: Any) -> tuple[Any, ...]:
    """The values that an annotation lists: a Literal's, both of a bool; none of another type's."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    union = isinstance(hint, types.UnionType) and bool in typing.get_args(hint)
    return (False, True) if hint is bool or union else ()


AXES: dict[str, tuple[Any, ...]] = {
    name: SETTINGS.get(name) or listed(hint)
    for name, hint in typing.get_type_hints(TransformerConfig).items()
    if name not in OUTSIDE and (name in SETTINGS or listed(hint))
}
"""Every axis that can be varied in any size, with its values."""


def companions(axis: str, value: Any, config: TransformerConfig) -> dict[str, Any]:
    """What other fields of `config` are to hold for `axis` to mean something with `value`."""
    needed = COMPANIONS.get(axis, {}) | COMPANIONS.get(f"{axis}={value}", {})
    return {name: companion(config) for name, companion in needed.items()}
