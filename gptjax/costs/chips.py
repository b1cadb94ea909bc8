"""The accelerators that are known: what they can do, and how much they hold (`chips.toml`)."""

import functools
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator; figures are of a chip, at its data sheet's best."""

    name: str
    kinds: tuple[str, ...]
    """Parts of JAX's `device_kind` by which it is known."""
    platform: Literal["tpu", "cuda"]
    flops: float
    """Dense bfloat16 FLOP/s."""
    memory: int
    """Bytes of HBM."""
    bandwidth: float
    """Bytes a second between HBM and the processor."""
    interconnect: float
    """Bytes a second out of a chip to its neighbours, over all links, in one direction."""
    axes: int
    """Axes of the torus that the links are shared out among; 1 is a switch."""
    network: float
    """Bytes a second out of a chip to other slices or hosts, in one direction."""
    source: str
    """Where the figures are from."""
    devices: int = 1
    """JAX devices a chip."""
    available: int = 0
    """Bytes that a program may take on one device; 0 is a GPU, where it is a setting."""
    host: int = 0
    """GPUs that share a switch."""
    topologies: tuple[str, ...] = ()
    """Shapes that can be had."""
    options: dict[str, Any] = field(default_factory=dict)
    """What libtpu is told beside the topology."""
    gpu: dict[str, Any] = field(default_factory=dict)
    """The processor of a GPU, as XLA's compiler asks for it."""


@functools.cache
def known_chips() -> dict[str, Chip]:
    """Every chip of `chips.toml` by its name."""
    text = resources.files("gptjax.costs").joinpath("chips.toml").read_text(encoding="utf-8")
    return {name: _chip(name, values) for name, values in tomllib.loads(text).items()}


def _chip(name: str, values: dict[str, Any]) -> Chip:
    lists = {key: tuple(values[key]) for key in ("kinds", "topologies") if key in values}
    return Chip(name, **{**values, **lists})


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, if it is known."""
    fitting = [
        (len(kind), chip)
        for chip in known_chips().values()
        for kind in chip.kinds
        if kind in device_kind
    ]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None
