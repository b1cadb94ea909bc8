"""The compilation target: absent accelerators as JAX devices.

`v5e:4x4` is a TPU slice of that shape, `h100:64` 64 GPUs on hosts of 8. libtpu and the CUDA plugin
(the extra `preflight`) describe them without any accelerator.
"""

import importlib.metadata
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from gptjax.config import InputError, near_names, whole_number
from gptjax.costs.chips import Chip, known_chips

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # Else libtpu queries a TPU VM's metadata server.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Else it locks the machine's TPUs, which are not used.
    # Else it would query these and warn on standard error.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
MEMORY_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
MOST_DEVICES = 1 << 20
"""Limit of described devices: each is a Python object, and no cluster has as many."""
DEFAULT_MEMORY_FRACTION = 0.75
"""Share of a GPU's memory that JAX preallocates (its documentation, GPU memory allocation)."""


@dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    name: str
    chip: Chip
    slices: int
    devices: tuple[Any, ...]

    @property
    def available(self) -> int:
        """Bytes available to a program on one device."""
        if self.chip.available:
            return self.chip.available
        fraction = float(os.environ.get(MEMORY_FRACTION, DEFAULT_MEMORY_FRACTION))
        return int(fraction * self.chip.memory)


def prepare_environment() -> None:
    """Keep JAX on the CPU and libtpu off the hardware; call it before either starts.

    The user's settings take precedence. JAX's compilation cache is disabled, as cached programs
    lack XLA's dumps.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)


def open_topology(name: str, slices: int = 1) -> Topology:
    """Returns the devices of `v5e:4x4` or `h100:8`.

    Raises:
      InputError: an unknown chip or shape; libtpu or the CUDA plugin missing, or not of the
      version that JAX needs; a libtpu that another process has locked.
    """
    kind, _, shape = name.partition(":")
    chips = known_chips()
    if kind not in chips:
        names = ", ".join(sorted(map(_example, chips.values())))
        near = near_names(kind, chips)
        hint = near if near.startswith("did") else f"accepted are {names}."
        raise InputError(f"Unknown topology {name!r}: {hint}")
    chip = chips[kind]
    _check_shape(name, chip, shape)
    if slices < 1 or (slices > 1 and chip.platform != "tpu"):
        accepted = "at least 1" if slices < 1 else "1 for GPUs, which have no slices"
        raise InputError(f"--slices is {slices}: it must be {accepted}.")
    devices = slices * math.prod(map(int, shape.split("x")))
    if devices > MOST_DEVICES:
        raise InputError(f"{name} in {slices} slices has {devices} devices, above {MOST_DEVICES}.")
    check_packages(chip)
    if chip.platform == "tpu":
        return Topology(name, chip, slices, _tpu_devices(chip, shape, slices))
    return Topology(name, chip, 1, _gpu_devices(chip, int(shape)))


def _example(chip: Chip) -> str:
    return f"{chip.name}:{chip.topologies[-1] if chip.topologies else 'COUNT'}"


def _check_shape(name: str, chip: Chip, shape: str) -> None:
    if chip.platform == "tpu":
        # libtpu itself accepts shapes that do not exist, as v5e:4x4x4.
        known = shape in chip.topologies
        accepted = ", ".join(f"{chip.name}:{shape}" for shape in chip.topologies)
    else:
        count = whole_number(shape) or 0
        known = 1 <= count <= chip.host or (count > 0 and count % chip.host == 0)
        accepted = f"{chip.name}:1 to {chip.name}:{chip.host}, and multiples of {chip.host}"
    if not known:
        raise InputError(f"Unknown topology {name!r}: accepted are {accepted}.")


def check_packages(chip: Chip) -> None:
    """Check that the compiler for `chip` is installed, in the version that this JAX needs.

    Raises:
      InputError: it is not; the message ends with the command to install it.
    """
    tpu = chip.platform == "tpu"
    version = importlib.metadata.version("jax")
    command = f'pip install "jax[{"tpu" if tpu else "cuda12-local"}]=={version}"'
    packages = ("libtpu",) if tpu else ("jax-cuda12-plugin", "jax-cuda12-pjrt")
    for package in packages:
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise InputError(
                f"Compiling for {chip.name} needs {package}, which is not installed: {command}."
            ) from None
        wanted = _libtpu_of_jax() if tpu else version
        if wanted and not f"{found}.".startswith(f"{wanted}."):
            raise InputError(f"{package} is {found}, but jax {version} needs {wanted}: {command}.")


def _libtpu_of_jax() -> str:
    """Returns the version of libtpu that `jax[tpu]` requires, "" if it states none."""
    for requirement in importlib.metadata.requires("jax") or []:
        if wanted := re.match(r"libtpu==([\d.]+?)(?:\.\*)?\s*;", requirement):
            return wanted[1]
    return ""


def _tpu_devices(chip: Chip, shape: str, slices: int) -> tuple[Any, ...]:
    options: dict[str, Any] = dict(chip.options)
    if slices > 1:
        options["num_slices"] = slices
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)  # The default is 4 chips per host.
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.name}:{shape}", **options
        )
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" in str(error) or "already in use" in str(error):
            raise InputError(
                "Another process holds libtpu: unset ALLOW_MULTIPLE_LIBTPU_LOAD, or wait for it."
            ) from error
        raise
    return tuple(described.devices)


def _gpu_devices(chip: Chip, count: int) -> tuple[Any, ...]:
    hosts = math.ceil(count / chip.host)
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x{hosts}x{count // hosts}",
        target_config=gpu_target(chip),
    )
    return tuple(described.devices)


def gpu_target(chip: Chip) -> str:
    """Returns XLA's `GpuTargetConfigProto` of a chip, in text form.

    The common limits are from the CUDA C++ programming guide (compute capabilities 8.0 to 10.0).
    """
    gpu = chip.gpu
    major, minor = gpu["capability"]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu["shared"]}
  shared_memory_per_block_optin: {gpu["shared_block"]}
  core_count: {gpu["cores"]}
  fpus_per_core: {gpu["lanes"]}
  clock_rate_ghz: {gpu["clock"]}
  l2_cache_size: {gpu["cache"]}
  memory_bandwidth: {int(chip.bandwidth)}
  device_memory_size: {chip.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{gpu["name"]}"
"""
