"""Compiled programs are kept on disk, so that a resumed run and a second one start at once.

JAX does it (its persistent compilation cache); here it gets a directory by default, per user:

| variable | effect |
|---|---|
| `JAX_COMPILATION_CACHE_DIR=DIR` | JAX's own: programs are kept in DIR, without a limit |
| `JAX_COMPILATION_CACHE_DIR=` | empty: none are kept |
| `XDG_CACHE_HOME=DIR` | the default directory is `DIR/gptjax/jax` (`~/.cache/gptjax/jax`) |

A kept program is the one that would be compiled: JAX's key has the program, the versions, the flags
and the device. It lacks the kind of a CPU, so that each kind has a directory of its own.
"""

import contextlib
import functools
import hashlib
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

MOST_BYTES = 1 << 30
"""The size that the directory is kept to; what was used longest ago is deleted. The programs of a
quickstart take less than a megabyte on a CPU."""
LEAST_SECONDS = 0.1
"""The compilation time from which a program is kept."""
LOCK_SECONDS = 10
DIRECTORY, LEAST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
VALUE, USED = "-cache", "-atime"
"""Endings of JAX's two files of a program, which it writes in this order."""


@contextlib.contextmanager
def with_own_names(wanted: bool) -> Iterator[None]:
    """Inside, a kept program is taken only if the names of its instructions are the present ones.

    They are no part of JAX's key otherwise: a program kept by an older version of this code has
    its names, by which a profile would sort its instructions.
    """
    import jax

    name = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, name)
    jax.config.update(name, wanted or before)
    try:
        yield
    finally:
        jax.config.update(name, before)


@functools.cache
def keep_programs() -> None:
    """Keep compiled programs from now on; to be called when JAX's devices may be used.

    A directory that cannot be written is a line on standard error, and nothing is kept.
    """
    import jax  # Here, since commands that do not start JAX must not wait for it.

    settings: Any = jax.config  # Its attributes are made as JAX is imported.
    directory, own = settings.jax_compilation_cache_dir, False
    if directory is None and DIRECTORY not in os.environ:
        own, directory = True, default_directory(jax.default_backend(), _cpuinfo())
    if not directory or "://" in str(directory) or not settings.jax_enable_compilation_cache:
        return
    try:
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        if own:
            _delete_unfinished(Path(directory))
    except OSError as error:
        print(
            f"Compiled programs are not kept: {directory} cannot be written ({error.strerror}).",
            file=sys.stderr,
        )
        settings.update("jax_enable_compilation_cache", False)
        return
    if own:
        settings.update("jax_compilation_cache_dir", str(directory))
        settings.update("jax_compilation_cache_max_size", MOST_BYTES)
        if LEAST not in os.environ:
            settings.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def default_directory(backend: str, cpuinfo: str) -> Path | None:
    """The user's directory for programs of a backend; None if they could not be read again.

    That is so on CPUs for which LLVM prefers no gather instructions, those with the `bugs` entry
    gds: XLA takes the preference for a feature that the CPU lacks, and refuses what it compiled
    itself with an error for every program (github.com/jax-ml/jax/issues/38445).
    """
    try:
        directory = user_caches() / "gptjax" / "jax"
    except RuntimeError:  # The user has no home.
        return None
    if backend != "cpu":
        return directory
    fields = dict(re.findall(r"^([^:\n]*?)\s*:(.*)$", cpuinfo, flags=re.MULTILINE))
    if "gds" in fields.get("bugs", "").split():
        return None
    kind = [platform.machine(), platform.processor()]
    kind += [fields.get(name, "") for name in ("model name", "flags", "Features")]
    digest = hashlib.sha256("\n".join(kind).encode()).hexdigest()[:8]
    return directory.with_name(f"jax-cpu-{digest}")


def user_caches() -> Path:
    """The directory for caches of this user, by the platform's convention."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    match sys.platform:
        case "darwin":
            return Path.home() / "Library" / "Caches"
        case "win32":
            return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        case _:
            return Path.home() / ".cache"


def _cpuinfo() -> str:
    """Linux's description of the CPU; empty elsewhere."""
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text()
    return ""


def _delete_unfinished(directory: Path) -> None:
    """Delete programs whose writer was killed, over which JAX would stumble at every start."""
    with (
        contextlib.suppress(filelock.Timeout),
        filelock.FileLock(directory / ".lockfile", timeout=LOCK_SECONDS),  # JAX's own.
    ):
        for value in directory.glob(f"*{VALUE}"):
            if not value.with_name(value.name.removesuffix(VALUE) + USED).exists():
                value.unlink(missing_ok=True)
