"""Lower and upper bounds of a step's time, by a roofline (Williams et al. 2009).

Three things take time: matrix products, HBM traffic, communication. In the shortest step they run
at the data sheet's peaks, fully overlapped; in the longest without overlap, at the shares of the
peaks in `SHARES`, with each collective on the links of a single axis of the torus. Neither is a
measurement.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gptjax.costs.chips import Chip
from gptjax.preflight.collectives import Collective

SHARES = {"compute": 0.5, "memory": 0.6, "interconnect": 0.6}
"""Shares of the peaks in the longest step: even well-tuned programs stay below the peaks."""


@dataclass(frozen=True)
class Roofline:
    """The cost of a step per device."""

    flops: float
    """FLOPs, recomputation included."""
    memory_bytes: float
    """Bytes read from and written to HBM, by `memory_traffic`."""
    sent_bytes: float
    """Bytes sent within the slice or host, by ring algorithms."""
    network_bytes: float
    """Bytes sent to other slices or hosts."""
    shortest: dict[str, float]
    """Seconds of each of the three, in the shortest and in the longest step."""
    longest: dict[str, float]

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds of the shortest and of the longest step."""
        return max(self.shortest.values()), sum(self.longest.values())

    @property
    def bound(self) -> str:
        """What bounds the shortest step."""
        return max(self.shortest, key=lambda name: self.shortest[name])

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: FLOPs per byte of HBM traffic."""
        return self.flops / max(self.memory_bytes, 1.0)


def roofline(
    flops: float,
    memory_bytes: float,
    found: Iterable[Collective],
    chip: Chip,
    crosses: Callable[[Collective], bool],
) -> Roofline:
    """Returns the times of a step.

    Args:
      flops: per device and step, with recomputation.
      memory_bytes: HBM traffic per device and step.
      found: the collectives.
      chip: the peaks, divided among the chip's devices.
      crosses: whether a collective leaves the slice or the host.
    """
    found = list(found)
    network = sum(one.sent for one in found if crosses(one))
    sent = sum(one.sent for one in found) - network
    parts = {
        "compute": flops / (chip.flops / chip.devices),
        "memory": memory_bytes / (chip.bandwidth / chip.devices),
    }
    links, slow = chip.interconnect / chip.devices, chip.network / chip.devices
    shortest = {**parts, "interconnect": sent / links + network / slow}
    single = {**parts, "interconnect": sent / (links / chip.axes) + network / slow}
    longest = {name: seconds / SHARES[name] for name, seconds in single.items()}
    return Roofline(flops, memory_bytes, sent, network, shortest, longest)
