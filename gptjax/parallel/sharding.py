"""Device meshes, and the sharding of parameters and activations over them.

The axes of arrays are named by letters (gptjax/layers/README.md; "LDNH" are the query kernels of
all layers), and the table `RULES` maps each letter to mesh axes.
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
"""The axes of every mesh; devices along the last communicate most and are closest together."""
DATA = "data"
BATCH = ("data", "fsdp", "expert")
"""The axes over which the rows of a batch are split."""
MAX_CPU_DEVICES = 8
"""The limit on machines with more cores, since each device holds the whole training state."""
MAX_SPLIT_PARAMETERS = 32_000_000
"""The largest model that gets more than one CPU device. On 2 cores a model of 10.7 million
parameters gains from two devices, and one of 67 million loses
(experiments/benchmarks/steps_and_tokens.py)."""
MAX_RECYCLED_BLOCK = 32 * 2**20
"""Bytes; glibc's `free` returns larger blocks to the system at once (mallopt(3))."""
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


class Rule(NamedTuple):
    """The mesh axes over which an axis of an array is sharded."""

    parameter: tuple[str, ...] = ()
    activation: tuple[str, ...] = ()


RULES = {
    "B": Rule(activation=BATCH),
    "T": Rule(activation=("sequence",)),
    "t": Rule(activation=("sequence", "tensor")),  # T between layers, where no heads are sharded.
    "b": Rule(activation=(*BATCH, "pipeline")),  # B after the layers, where no layers are sharded.
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
"""Sources: FSDP, Zhao et al. 2023; tensor parallelism of heads and MLP dim, Shoeybi et al. 2019;
sequence parallelism between layers, over `tensor` too, Korthikanti et al. 2022."""


def configure_cpu(parameters: int) -> None:
    """Set JAX's CPU devices and malloc for a model of that size, before JAX's first use.

    **Devices.** XLA runs a CPU program one operation at a time and splits each over the cores; for
    a small model the splitting costs more than the operation. With one device per core, each core
    computes its shard of the batch, and only the gradient all-reduce is shared: a step of the
    smallest model of experiments/benchmarks/steps_and_tokens.py takes about two thirds of the time.
    A large model gets one device with all cores, since its all-reduce would cost more.
    `JAX_NUM_CPU_DEVICES`, if set, takes precedence.

    **Memory.** A program's temporary memory, gradients included, is one block per execution. glibc
    would return a large block after each step, and the next step would fault it in again page by
    page: 0.15 million faults per step for 10.7 million parameters, a fifth of its time. So malloc
    is set to keep freed memory, in one arena; for small models, where that is slower, it is not.
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        devices = min(cores or 1, MAX_CPU_DEVICES) if parameters <= MAX_SPLIT_PARAMETERS else 1
        with contextlib.suppress(RuntimeError):  # JAX is already in use, as in a notebook.
            jax.config.update("jax_num_cpu_devices", devices)
    gradient_bytes = 4 * parameters
    if sys.platform == "linux" and gradient_bytes > MAX_RECYCLED_BLOCK:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_TRIM_THRESHOLD, -1)
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_ARENA_MAX, 1)


def build_mesh(config: MeshConfig, rows: int, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config`, with all of `AXES`.

    Args:
      config: devices along each axis. If `data` is 0 and all other axes are 1, the mesh has as many
        devices as divide `rows` evenly; else it has all.
      rows: of a batch, or of one step of gradient accumulation.
      devices: the available devices; None is all of JAX's.

    Raises:
      InputError: axes whose product is not the number of devices, or that do not divide the rows;
        a number of slices that is not the devices', or that does not divide `data`.
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
            f"A batch (or step of gradient accumulation) has {rows} rows: it must be a multiple of "
            f"{' x '.join(BATCH)} = {parts}."
        )
    return Mesh(_arranged(list(sizes.values()), devices, config.slices), AXES, axis_types=_AUTO)


def mesh_name(sizes: Mapping[str, int]) -> str:
    """The mesh in words, such as `data 2 x tensor 4`."""
    words = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return words or "one device"


_AUTO = (AxisType.Auto,) * len(AXES)


def _arranged(shape: list[int], devices: Sequence[Any], slices: int) -> np.ndarray:
    """The devices, arranged so that neighbours in the mesh are neighbours in the hardware."""
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
    """Whether the compiler partitions more than the rows of a batch."""
    return any(size > 1 for name, size in mesh.shape.items() if name != DATA)


def auto_mesh() -> AbstractMesh | None:
    """The mesh over which the compiler partitions the program being traced, if it does."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(mesh.shape)
    return mesh if any(sizes[name] > 1 for name in mesh.auto_axes) else None


def parameter_sharding(
    name: str, axes: str, shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> NamedSharding:
    """The sharding of the parameter `name` with these axes.

    Raises:
      InputError: a mesh axis that would shard two axes of the parameter, or does not divide one.
    """
    parts = [_used(RULES[letter].parameter, mesh) for letter in axes]
    used = [mesh_axis for names in parts for mesh_axis in names]
    for mesh_axis in used:
        if used.count(mesh_axis) > 1:
            raise InputError(f"The mesh axis {mesh_axis} would shard two axes of {name} ({axes}).")
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
    """The sharding over `auto_mesh` of an activation with these axes.

    Mesh axes that do not divide the axis are left out, the last first.
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
    """The sharding over `auto_mesh` of a parameter with these axes."""
    mesh = auto_mesh()
    assert mesh is not None
    return P(*(_used(RULES[letter].parameter, mesh) or None for letter in axes))


def mesh_axes(spec: P) -> tuple[str, ...]:
    """All mesh axes in a spec."""
    parts = [(part,) if isinstance(part, str) else part or () for part in spec]
    return tuple(name for part in parts for name in part)


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """`x`, constrained to the sharding of `RULES` if the program is partitioned."""
    if auto_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape))


def gathered(parameter: jax.Array, axes: str) -> jax.Array:
    """The parameter all-gathered along D (FSDP); its gradient is sharded as the parameter is.

    Without it the compiler may all-gather the tokens instead.
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
    """Those of `names` over which the compiler shards: automatic axes of more than one device."""
    usable = mesh.auto_axes if isinstance(mesh, AbstractMesh) else mesh.axis_names
    sizes = dict(mesh.shape)
    return tuple(name for name in names if name in usable and sizes[name] > 1)


def batch_sharding(mesh: Mesh, shape: Sequence[int], *, stacked: bool = False) -> NamedSharding:
    """The sharding of one of a batch's arrays, [B] or [B, T]; of a stack's, [k, B] or [k, B, T]."""
    own = shape[int(stacked) :]
    tokens = "sequence" if len(own) > 1 and own[1] % mesh.shape["sequence"] == 0 else None
    axes = (BATCH, tokens) if len(own) > 1 else (BATCH,)
    return NamedSharding(mesh, P(None, *axes) if stacked else P(*axes))
