"""Versions, code and devices, which must be the same on all hosts of a run."""

import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from gptjax.config import InputError, differences

PACKAGES = ("gptjax", "jax", "jaxlib", "flax", "optax", "numpy")
CODE = Path(__file__).parents[1]


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def code_hash(directory: Path = CODE) -> str:
    """The SHA-256 of the names and contents of gptjax's modules."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(directory).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def devices() -> str:
    """This process's devices, such as `4 × TPU v5 lite`."""
    import jax

    local = jax.local_devices()
    return f"{len(local)} × {local[0].device_kind}"


def check_same(what: str, hosts: list[str], reports: list[dict[str, Any]]) -> None:
    """Compare the reports of all processes with that of process 0.

    Raises:
      InputError: reports that differ, by process, host and field.
    """
    differing = [
        f"process {index} on {host} has {'; '.join(found)}"
        for index, (host, report) in enumerate(zip(hosts, reports, strict=True))
        if (found := differences(reports[0], report))
    ]
    if differing:
        raise InputError(
            f"All processes need {what} of process 0 on {hosts[0]}, but {', and '.join(differing)}."
        )
