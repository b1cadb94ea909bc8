"""Devices: how many there are, and which part of a batch or of a parameter each one takes.

Axes of arrays have the letters of the legend ("LDNH" is the kernel of all layers' queries), and
one table says over which axes of the mesh each is parted.
"""

import contextlib
import ctypes
import functools
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import InputError, MeshConfig

AXES = ("pipeline", "data", "fsdp", "expert", "sequence", "tensor")
"""Of every mesh; the devices of the last talk most and lie closest together."""
DATA = "data"
BATCH = ("data", "fsdp", "expert")
"""The axes over which the rows of a batch are split."""
MOST_CPU_DEVICES = 8
"""Each device holds the whole training state, so a machine of 100 cores gets this many."""
MOST_SPLIT_PARAMETERS = 32_000_000
"""On 2 cores 10.7 million gain from two devices and 67 million lose
(experiments/benchmarks/steps_and_tokens.py)."""
LARGEST_RECYCLED_BLOCK = 32 * 2**20
"""Bytes; a larger block goes back to the system as soon as glibc's `free` has it (mallopt(3))."""
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


class Rule(NamedTuple):
    """The mesh axes over which an axis of an array is parted."""

    parameter: tuple[str, ...] = ()
    activation: tuple[str, ...] = ()


RULES = {
    "B": Rule(activation=BATCH),
    "T": Rule(activation=("sequence",)),
    "t": Rule(activation=("sequence", "tensor")),  # T between layers, where no head is parted.
    "b": Rule(activation=(*BATCH, "pipeline")),  # B behind the layers, where no layer is parted.
    "S": Rule(),
    "D": Rule(parameter=("fsdp",)),
    "N": Rule(("tensor",), ("tensor",)),
    "K": Rule(("tensor",), ("tensor",)),
    "H": Rule(),
    "F": Rule(("tensor",), ("tensor",)),
    "V": Rule(("tensor",), ("tensor",)),
    "L": Rule(("pipeline",), ("pipeline",)),
    "E": Rule(("expert",), ("expert",)),
    "-": Rule(),
}
"""Sources: FSDP, Zhao et al. 2023; heads and feed-forward width over `tensor`, Shoeybi et al. 2019;
the sequence between layers over `tensor` too, Korthikanti et al. 2022."""


def configure_cpu(parameters: int) -> None:
    """Fit JAX's CPU backend to a model of so many parameters, before anything else touches JAX.

    **Devices.** XLA runs a CPU program one operation at a time and splits each over the cores; for
    a small model the splitting costs more than the operation. As devices the cores each run their
    share of the batch from end to end and meet only to add gradients up: a step of the smallest
    model of experiments/benchmarks/steps_and_tokens.py takes about two thirds of the time. A large
    model gets one device on all cores: adding up its gradients would cost more. Where
    `JAX_NUM_CPU_DEVICES` is set, that number stands.

    **Memory.** A program's temporary memory, the gradients among it, is one block a run. Where it
    is large, glibc would return it after each step, and the next would fault it in again page by
    page: 0.15 million faults a step for 10.7 million parameters, a fifth of its time. There malloc
    is told to keep what is freed, in one arena; for small models that is slower and not done.
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        devices = min(cores or 1, MOST_CPU_DEVICES) if parameters <= MOST_SPLIT_PARAMETERS else 1
        with contextlib.suppress(RuntimeError):  # In a notebook JAX may run: its devices stay.
            jax.config.update("jax_num_cpu_devices", devices)
    gradient_bytes = 4 * parameters
    if sys.platform == "linux" and gradient_bytes > LARGEST_RECYCLED_BLOCK:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_TRIM_THRESHOLD, -1)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_ARENA_MAX, 1)


def build_mesh(config: MeshConfig, rows: int, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config`, with all of `AXES`.

    Args:
      config: devices along each axis. With all others at 1 and `data` at 0, as many devices are
        taken as share `rows` evenly; else all of them.
      rows: of a batch, or of the parts that it is computed in.
      devices: to choose from; None takes JAX's.

    Raises:
      InputError: axes whose product is not the number of devices, or that do not divide the rows;
        other slices than the devices have, or that do not share `data` evenly.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {name: getattr(config, name) for name in AXES}
    others = math.prod(size for name, size in sizes.items() if name != DATA)
    if others == 1 and not config.data and config.slices == 1:
        sizes[DATA] = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
        devices = devices[: sizes[DATA]]
    sizes[DATA] = sizes[DATA] or max(len(devices) // others, 1)
    product = math.prod(sizes.values())
    if product != len(devices):
        raise InputError(
            f"The mesh is {mesh_name(sizes)}, {product} devices: there are {len(devices)}."
        )
    parts = math.prod(sizes[name] for name in BATCH)
    if rows % parts:
        raise InputError(
            f"A batch (or part of it) has {rows} rows: it must be a multiple of the {parts} parts "
            f"that {' x '.join(BATCH)} make of it."
        )
    return Mesh(_arranged(list(sizes.values()), devices, config.slices), AXES, axis_types=_AUTO)


def mesh_name(sizes: Mapping[str, int]) -> str:
    """Devices along each axis, as `data 2 x tensor 4`."""
    told = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return told or "one device"


_AUTO = (AxisType.Auto,) * len(AXES)


def _arranged(shape: list[int], devices: Sequence[Any], slices: int) -> np.ndarray:
    """Devices so that neighbours in the mesh are neighbours in the machine."""
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if found != slices:
        raise InputError(
            f"MeshConfig.slices is {slices}: the {len(devices)} devices are of {found}."
        )
    data = shape[AXES.index(DATA)]
    if data % slices:
        raise InputError(f"The mesh has data {data}: it must be a multiple of the {slices} slices.")
    across = [slices if name == DATA else 1 for name in AXES]
    within = [size // over for size, over in zip(shape, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def partitioned(mesh: Mesh) -> bool:
    """Whether the compiler parts more than the rows of a batch."""
    return any(size > 1 for name, size in mesh.shape.items() if name != DATA)


def auto_mesh() -> AbstractMesh | None:
    """The mesh over which the compiler parts the program that is being traced, if it does."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(mesh.shape)
    return mesh if any(sizes[name] > 1 for name in mesh.auto_axes) else None


def parameter_sharding(
    name: str, axes: str, shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> NamedSharding:
    """Who holds which part of the parameter `name` with these axes.

    Raises:
      InputError: a mesh axis for two axes of the parameter, or one that does not divide an axis.
    """
    parts = [_used(RULES[letter].parameter, mesh) for letter in axes]
    used = [mesh_axis for names in parts for mesh_axis in names]
    for mesh_axis in used:
        if used.count(mesh_axis) > 1:
            raise InputError(f"The mesh axis {mesh_axis} would part two axes of {name} ({axes}).")
    for letter, size, names in zip(axes, shape, parts, strict=True):
        count = math.prod(mesh.shape[mesh_axis] for mesh_axis in names)
        if size % count:
            nearest = -(-size // count) * count
            raise InputError(
                f"{name} has {letter} = {size}, which {' x '.join(names)} = {count} does not "
                f"divide: {nearest} would."
            )
    return NamedSharding(mesh, P(*(names or None for names in parts)))


def spec(axes: str, shape: Sequence[int]) -> P:
    """How an activation with these axes is parted over `auto_mesh`.

    Of the mesh axes that an axis has, as many as divide it.
    """
    mesh = auto_mesh()
    assert mesh is not None
    parts = []
    for letter, size in zip(axes, shape, strict=True):
        names = _used(RULES[letter].activation, mesh)
        while names and size % math.prod(dict(mesh.shape)[name] for name in names):
            names = names[:-1]
        parts.append(names or None)
    return P(*parts)


def parameter_spec(axes: str) -> P:
    """How a parameter with these axes is parted over `auto_mesh`."""
    mesh = auto_mesh()
    assert mesh is not None
    return P(*(_used(RULES[letter].parameter, mesh) or None for letter in axes))


def mesh_axes(spec: P) -> tuple[str, ...]:
    """All mesh axes that a spec names."""
    parts = [(part,) if isinstance(part, str) else part or () for part in spec]
    return tuple(name for part in parts for name in part)


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """`x`, parted as the table says where the program is parted at all."""
    if auto_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape))


def gathered(parameter: jax.Array, axes: str) -> jax.Array:
    """A parameter as a product reads it, whole along D; its gradient is parted as it is itself.

    Without it the compiler may bring the tokens of all devices together instead.
    """
    return parameter if auto_mesh() is None else _gathered(parameter, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(parameter: jax.Array, axes: str) -> jax.Array:
    whole = parameter_spec(axes.replace("D", "-"))
    return jax.lax.with_sharding_constraint(parameter, whole)


def _gathered_forward(parameter, axes):
    return _gathered(parameter, axes), None


def _gathered_backward(axes, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, parameter_spec(axes)),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _used(names: tuple[str, ...], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Those of `names` over which something can be parted."""
    usable = mesh.auto_axes if isinstance(mesh, AbstractMesh) else mesh.axis_names
    sizes = dict(mesh.shape)
    return tuple(name for name in names if name in usable and sizes[name] > 1)


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Who takes which part of one of a batch's arrays [B] or [B, T]."""
    sequence = mesh.shape["sequence"]
    parted = "sequence" if len(shape) > 1 and shape[1] % sequence == 0 else None
    return NamedSharding(mesh, P(BATCH, parted) if len(shape) > 1 else P(BATCH))
