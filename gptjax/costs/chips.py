"""Accelerators and their peak figures (`chips.toml`)."""

import functools
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator; figures are per chip, the peaks of its data sheet."""

    name: str
    kinds: tuple[str, ...]
    """Substrings of JAX's `device_kind` that identify it."""
    platform: Literal["tpu", "cuda"]
    flops: float
    """Dense bfloat16 FLOP/s."""
    memory: int
    """Bytes of HBM."""
    bandwidth: float
    """HBM bandwidth, bytes per second."""
    interconnect: float
    """Bytes per second from a chip to its neighbours, over all links, in one direction."""
    axes: int
    """Axes of the torus over which the links are divided; 1 is a switch."""
    network: float
    """Bytes per second from a chip to other slices or hosts, in one direction."""
    source: str
    """The source of the figures."""
    devices: int = 1
    """JAX devices per chip."""
    available: int = 0
    """Bytes that a program may use on one device; 0 for GPUs, where it is a setting."""
    host: int = 0
    """GPUs connected by one switch."""
    topologies: tuple[str, ...] = ()
    """Available slice shapes."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of libtpu besides the topology."""
    gpu: dict[str, Any] = field(default_factory=dict)
    """The GPU's description for XLA's compiler."""


@functools.cache
def known_chips() -> dict[str, Chip]:
    """All chips of `chips.toml`, by name."""
    text = resources.files("gptjax.costs").joinpath("chips.toml").read_text(encoding="utf-8")
    return {name: _chip(name, values) for name, values in tomllib.loads(text).items()}


def _chip(name: str, values: dict[str, Any]) -> Chip:
    lists = {key: tuple(values[key]) for key in ("kinds", "topologies") if key in values}
    return Chip(name, **{**values, **lists})


def chip_of(device_kind: str) -> Chip | None:
    """The chip of JAX's `device_kind`, or None if it is unknown; the longest match wins."""
    matches = [
        (len(kind), chip)
        for chip in known_chips().values()
        for kind in chip.kinds
        if kind in device_kind
    ]
    return max(matches, key=lambda match: match[0])[1] if matches else None
