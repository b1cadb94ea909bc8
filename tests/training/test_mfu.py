from typing import NamedTuple

import pytest

from gptjax.training import mfu


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (0.05, "float32 product, measured now"),
        (0.8, "measured now while other programs took 40% of the CPU, so MFU reads too high"),
    ],
)
def test_a_peak_that_a_busy_cpu_measured_is_said_to_be_low(others, said, monkeypatch):
    # Of 2 CPU seconds of the machine this process takes 1.
    times = iter([CpuTimes(5.0, 3.0), CpuTimes(6.0 + others, 4.0 - others)])
    monkeypatch.setattr(mfu, "measured_matmul_flops", lambda: 1e11)
    monkeypatch.setattr(mfu.time, "process_time", iter([0.0, 1.0]).__next__)
    monkeypatch.setattr(mfu.psutil, "cpu_times", times.__next__)
    peak = mfu.peak_flops()
    assert peak.flops == 1e11
    assert peak.source.endswith(said)


class CpuTimes(NamedTuple):
    """A part of psutil's."""

    user: float
    idle: float
