"""Model FLOPs utilisation, and the peaks of the devices, known or measured."""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from gptjax.costs.chips import chip_of

MFU_FORMULA = "MFU = tokens/s × training FLOPs per token / peak FLOP/s"
"""Model FLOPs utilisation, after PaLM (Chowdhery et al. 2022, appendix B)."""
BUSY = 0.1
"""Share of a machine's CPU time above which other programs spoil a measurement."""
CLOCK_TICK = 0.01
"""Resolution of the system's CPU times, seconds."""


class Peak(NamedTuple):
    """Peak arithmetic throughput."""

    flops: float
    """FLOP/s of all devices together."""
    source: str
    """Where the figure comes from, for the log."""


def peak_flops() -> Peak:
    """The peak of all devices: from the data sheet where it is known, else measured here."""
    device, count = jax.devices()[0], jax.device_count()
    chip = chip_of(device.device_kind)
    if chip is not None:
        flops = count * chip.flops / chip.devices
        return Peak(flops, f"{count} × {device.device_kind}, dense bfloat16 data sheet")
    if device.platform == "cpu":
        # Virtual CPU devices share the cores, all of which one matmul already uses.
        before, others_before = _cpu_seconds()
        measured = measured_matmul_flops()
        after, others_after = _cpu_seconds()
        source = "a 2048 × 2048 × 2048 float32 product, measured now"
        busy = (others_after - others_before) / max(after - before, CLOCK_TICK)
        if busy > BUSY:
            source += f" while other programs took {busy:.0%} of the CPU, so MFU reads too high"
        return Peak(measured, source)
    measured = count * measured_matmul_flops()
    return Peak(measured, f"{count} × {device.device_kind}, a 2048³ float32 product measured now")


def peak_bandwidth() -> float:
    """Bytes per second between memory and cores, of all devices: the data sheet's, or measured."""
    device, count = jax.devices()[0], jax.device_count()
    chip = chip_of(device.device_kind)
    if chip is not None:
        return count * chip.bandwidth / chip.devices
    return measured_bandwidth() * (1 if device.platform == "cpu" else count)


def _cpu_seconds() -> tuple[float, float]:
    """CPU seconds of this machine so far, idle included, and those taken by other programs."""
    times = psutil.cpu_times()
    guests = getattr(times, "guest", 0) + getattr(
        times, "guest_nice", 0
    )  # Counted in user and nice too.
    everything, idle = sum(times) - guests, times.idle + getattr(times, "iowait", 0)
    return everything, everything - idle - time.process_time()


def measured_matmul_flops(size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of the fastest of a few float32 matmuls of size × size matrices."""
    matrix = jax.device_put(np.ones((size, size), np.float32))
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def measured_bandwidth(size: int = 1 << 26, repeats: int = 5) -> float:
    """Bytes read and written per second by the fastest of a few negations of `size` float32 values.

    In place: pages that a program touches first take longer.
    """
    array = jax.device_put(np.ones(size, np.float32))
    negated = jax.jit(lambda x: -x, donate_argnums=0).lower(array).compile()
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        array = negated(array).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * array.nbytes / min(seconds[1:])
