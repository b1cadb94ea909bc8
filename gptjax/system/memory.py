"""Checks that a run fits into memory, before any is allocated.

Every estimate is a lower bound, so that nothing is refused which might fit.
"""

import os
from collections.abc import Sequence
from typing import Any

from gptjax.config import ExperimentConfig, InputError
from gptjax.config.values import Dtype, exhaustive

BATCH_BYTES = 12
"""Bytes per token of a batch: the token, its target and its loss weight, 32 bits each."""
ACTIVATION_BYTES = exhaustive(Dtype, {"float32": 4, "bfloat16": 2, "float16": 2})


def machine_bytes() -> int:
    """The memory of this machine, bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def devices_bytes(devices: Sequence[Any]) -> int:
    """The memory of all these JAX devices, bytes; CPU devices share that of their machine."""
    import jax  # Here, since commands that do not start JAX check sizes too.

    # A process can query only its own devices.
    own = [device for device in devices if device.process_index == jax.process_index()]
    limit = (own[0].memory_stats() or {}).get("bytes_limit", 0)
    machines = len({device.process_index for device in devices})
    return limit * len(devices) if limit else machine_bytes() * machines


def check_fits(what: str, needed: int, available: int | None = None) -> None:
    """Refuse `what` if it needs more bytes than are available; None takes this machine's.

    Raises:
      InputError: it does.
    """
    available = machine_bytes() if available is None else available
    if needed > available:
        sizes = f"{needed / 2**30:.3g} GiB: there are {available / 2**30:.3g}"
        raise InputError(f"{what} takes at least {sizes}.")


def ran_out(error: BaseException) -> bool:
    """Whether an error means out of memory: Python's, NumPy's, XLA's or CUDA's."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "resource_exhausted" in said or "out of memory" in said


def check_batch_fits(rows: int, context_length: int) -> None:
    """Refuse a batch that does not fit into this machine's memory.

    Raises:
      InputError: it is too large.
    """
    check_fits(
        f"A batch of {rows} rows of {context_length} tokens", BATCH_BYTES * rows * context_length
    )


def check_training_fits(config: ExperimentConfig, state: int, devices: Sequence[Any]) -> None:
    """Refuse a run whose state, or one layer's activations, do not fit into device memory.

    Args:
      config: of the run.
      state: bytes of its parameters, gradients and moments (`ModelCost.state_bytes`).
      devices: over which they are sharded.

    Raises:
      InputError: it is too large.
    """
    model, train = config.model, config.train
    available = devices_bytes(devices)
    check_fits("The training state", state, available)
    hosts = len({device.process_index for device in devices})
    check_batch_fits(train.batch_size // hosts, model.context_length)
    tokens = train.batch_size // train.grad_accumulation * model.context_length
    activations = ACTIVATION_BYTES[model.dtype] * tokens * model.width
    check_fits(f"The input of a layer, {tokens} tokens,", activations, available)
