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
from gptjax.preflight.hlo import Instruction, Program

SHARES = {"compute": 0.5, "memory": 0.6, "interconnect": 0.6}
"""Shares of the peaks in the longest step: even well-tuned programs stay below the peaks."""
FREE = (
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "iota",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
)
"""Instructions that move no data themselves."""
HBM = 0


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


def memory_traffic(program: Program) -> int:
    """Returns bytes per step between HBM and the cores, if every instruction reads and writes HBM.

    A slice reads only its result and an in-place update writes only its update, inside fusions
    too. On-chip memory is free. Collectives count as reads and writes of their arrays.
    """
    inside = {
        called
        for computation in program.computations.values()
        for instruction in computation.values()
        if instruction.opcode not in ("while", "conditional", "call")
        for called in instruction.called
    }
    total = 0
    for name, computation in program.computations.items():
        times = program.counts.get(name, 0)
        if not times or name in inside:
            continue
        for instruction in computation.values():
            if instruction.opcode in FREE or instruction.opcode.endswith(("-done", "-update")):
                continue
            total += times * _moved(program, computation, instruction)
    return total


def _moved(program: Program, computation: dict[str, Instruction], one: Instruction) -> int:
    operands = [computation[name] for name in one.operands if name in computation]
    fused = None
    if one.opcode == "fusion" and one.called:
        fused = program.computations.get(one.called[0])
    if fused is not None:
        return _read_by(fused, operands) + _written_by(fused, one)
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _in_hbm(one)
    if one.opcode in ("dynamic-update-slice", "scatter") and len(operands) > 1:
        return 2 * _in_hbm(operands[1] if one.opcode != "scatter" else operands[-1])
    written = _in_hbm(one)
    read = sum(_in_hbm(operand) for operand in operands)
    # The result of `…-start` begins with its operands.
    return max(read, written) if one.opcode.endswith("-start") else read + written


def _read_by(fused: dict[str, Instruction], operands: list[Instruction]) -> int:
    total = 0
    for inner in fused.values():
        number = inner.operands[0] if inner.opcode == "parameter" and inner.operands else ""
        if not number.isdecimal() or int(number) >= len(operands):
            continue
        operand = operands[int(number)]
        if not _in_hbm(operand):
            continue
        users = [user for user in fused.values() if inner.name in user.operands]
        sliced = all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users)
        updated = all(
            user.opcode == "dynamic-update-slice" and user.operands[0] == inner.name
            for user in users
        )
        if users and updated:
            continue
        whole = _in_hbm(operand)
        total += min(whole, sum(user.bytes for user in users)) if users and sliced else whole
    return total


def _written_by(fused: dict[str, Instruction], fusion: Instruction) -> int:
    root = next((inner for inner in fused.values() if inner.root), None)
    if root is None:
        return _in_hbm(fusion)
    given = [fused.get(name) for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for inner, array in zip(given, fusion.arrays, strict=False):
        if array.space != HBM:
            continue
        update = None
        if inner is not None and inner.opcode == "dynamic-update-slice":
            update = fused.get(inner.operands[1])
        total += array.bytes if update is None else update.bytes
    return total


def _in_hbm(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays if array.space == HBM)
