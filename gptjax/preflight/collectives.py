"""Collectives of a compiled step, compared with what theory predicts."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gptjax.costs.hlo import COLLECTIVES, HOST_SPACE, Instruction, Program

SUMS = ("all-reduce", "reduce-scatter", "collective-permute")
"""TPUs may sum a product's gradient by a ring of permutes between its parts."""
ALL_REDUCES = {"all-reduce": 1, "all-gather": 0.5, "reduce-scatter": 0.5, "collective-permute": 0.5}
"""All-reduces per collective: a gather, a scatter, or a ring of permutes is half of one."""
SCATTERS = "all-reduce-scatter"
"""Name prefix of a TPU's fusion of an all-reduce and a slice, which is a reduce-scatter."""


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str
    bytes: int
    """Bytes of the full array gathered, summed or exchanged, on one device, per execution."""
    count: int
    """Executions per step."""
    group: tuple[int, ...]
    """Devices of one of the concurrent groups, as flat indices into the mesh."""
    axes: tuple[str, ...]
    """The mesh axes that the group spans."""

    @property
    def sent(self) -> float:
        """Bytes per step that a device sends, by a ring algorithm."""
        others = (len(self.group) - 1) / max(len(self.group), 1)
        rounds = {"all-reduce": 2 * others, "collective-permute": 1.0}
        return self.count * self.bytes * rounds.get(self.kind, others)


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """Returns the collectives of a program compiled for this mesh; groups of one do not count.

    Parts of an asynchronous collective share a channel and count once; with several slices, a
    collective of another kind may have the same channel.
    """
    found: dict[tuple[str, str], Collective] = {}
    for name, computation in program.computations.items():
        times = program.counts.get(name, 0)
        for instruction in computation.values():
            read = _between_slices if instruction.opcode == "send" else _within_a_slice
            one = read(instruction, name, times, mesh) if times else None
            if one is None or len(one.group) < 2:
                continue
            key = (
                instruction.opcode.removesuffix("-start"),
                instruction.channel or instruction.name,
            )
            earlier = found.get(key)
            if earlier is None or earlier.count < times:
                found[key] = one
    return list(found.values())


def _within_a_slice(
    instruction: Instruction, computation: str, times: int, mesh: Mapping[str, int]
) -> Collective | None:
    """Returns a collective within a TPU slice, or among GPUs on any hosts; None for others."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    group = device_group(instruction.attributes, math.prod(mesh.values()))
    size = _whole(instruction, kind, len(group))
    if kind == "all-reduce" and computation.startswith(SCATTERS):
        kind = "reduce-scatter"
    return Collective(kind, size, times, group, _axes(group, mesh))


def _between_slices(
    instruction: Instruction, _: str, times: int, mesh: Mapping[str, int]
) -> Collective | None:
    """Returns a collective between TPU slices over their hosts; None for other instructions.

    The text has a `send` with `_xla_megascale_transfer_type="ALL_REDUCE"` and the slices that take
    part, `_xla_megascale_target="{1,2}x{0:3}"`. Slices lie along `data`.
    """
    said = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    slices = re.search(r'_xla_megascale_target="\{([^}]*)\}', instruction.attributes)
    if said is None or slices is None:
        return None
    count = 0
    for part in slices[1].split(","):
        first, _, last = part.partition(":")
        count += int(last or first) - int(first) + 1
    names = list(mesh)
    step = (
        mesh["data"] // count * math.prod(mesh[name] for name in names[names.index("data") + 1 :])
    )
    group = tuple(step * number for number in range(count))
    kind = said[1].lower().replace("_", "-")
    kind = kind if kind in COLLECTIVES else "collective-permute"
    return Collective(kind, instruction.arrays[0].bytes, times, group, _axes(group, mesh))


def _whole(instruction: Instruction, kind: str, devices: int) -> int:
    """Returns bytes of the full array; the result of `…-start` begins with its operands."""
    given = [array for array in instruction.arrays if array.space != HOST_SPACE]
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        given = given[1:2] if kind == "collective-permute" else given[len(given) // 2 :]
    size = sum(array.bytes for array in given)
    return size * devices if kind == "reduce-scatter" else size


def device_group(attributes: str, devices: int) -> tuple[int, ...]:
    """Returns the first group of devices in an instruction's attributes, in any XLA notation.

    They are `replica_groups={{0,1},{2,3}}`, `replica_groups=[2,2]<=[4]` (rows of an iota, with
    `T(1,0)` transposed), `replica_groups=mesh['a'=2,'b'=2] {'a'}`, `source_target_pairs={{0,1}}`;
    `replica_groups={}` is all of them.
    """
    if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", attributes):
        ids = np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
        return tuple(int(device) for device in _chain(ids))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, listed[1].split(",")))
    iota = r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if rows := re.search(iota, attributes):
        shape, source = _numbers(rows[1]), _numbers(rows[2])
        order = _numbers(rows[3]) if rows[3] else list(range(len(source)))
        ids = np.arange(math.prod(source)).reshape(source).transpose(order)
        return tuple(int(device) for device in ids.reshape(shape)[0])
    if named := re.search(r"replica_groups=@?\w*mesh\w*\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        return _named_group(named[1], named[2])
    return tuple(range(devices))


def _chain(pairs: np.ndarray) -> list[int]:
    """Returns the devices reached by following the pairs from the first pair's source."""
    following = dict(pairs.tolist())
    chain = [int(pairs[0, 0])]
    while (after := following.get(chain[-1])) is not None and after not in chain:
        chain.append(after)
    return chain


def _named_group(sizes: str, used: str) -> tuple[int, ...]:
    """Returns a group along axes of XLA's mesh; `'a':(2)4` is the sub-axis of size 4 after 2."""
    lengths = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    ids = np.arange(math.prod(lengths.values())).reshape(tuple(lengths.values()))
    taken: list[int | slice] = [0] * len(lengths)
    names = list(lengths)
    for name, before, count in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", used):
        step = lengths[name] // (int(before) * int(count)) if count else 1
        stop = int(count) * step if count else lengths[name]
        taken[names.index(name)] = slice(0, stop, step)
    return tuple(int(device) for device in np.ravel(ids[tuple(taken)]))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _axes(group: tuple[int, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    coordinates = np.unravel_index(np.array(group), tuple(mesh.values()))
    varies = (len(np.unique(along)) > 1 for along in coordinates)
    return tuple(name for name, differs in zip(mesh, varies, strict=True) if differs)


class Weight(NamedTuple):
    """A parameter with its sharding."""

    elements: int
    """Elements of the full array."""
    axes: tuple[str, ...]
    """The mesh axes over which it is sharded."""
    gathers: int = 2
    """All-gathers per training step."""
    sums: int = 1
    """Gradient reductions per training step."""


class Expected(NamedTuple):
    """The predicted traffic of one kind, beside the compiled one."""

    what: str
    axis: str
    kinds: tuple[str, ...]
    """The kinds of collectives compared with it."""
    bytes: float
    """Predicted bytes per step and device, as `Collective.bytes` times its count."""
    found: float
    """The same in the compiled program."""
    note: str
    """Choices of the compiler that theory does not predict."""


class Shapes(NamedTuple):
    """The sizes of a step from which its traffic is predicted."""

    weights: Iterable[Weight]
    element: int
    """Bytes per element in matrix products."""
    layers: int
    tokens: int
    """Tokens per step in one device's shard of the batch; not divided along `tensor`."""
    width: int
    parts: int
    """Gradient accumulation steps."""
    remat: bool
    """Whether the forward pass is recomputed."""
    training: bool


def expected(shapes: Shapes, mesh: Mapping[str, int], found: list[Collective]) -> list[Expected]:
    """Returns predicted and compiled traffic, by mesh axis.

    Sources: FSDP, Zhao et al. 2023, section 3; tensor parallelism, Shoeybi et al. 2019, section 3,
    where an all-gather and a reduce-scatter together are one all-reduce (Korthikanti et al. 2022).
    Other axes are not predicted. A program may send more: sums of losses and norms, masks.
    """
    rows = []
    weights = list(shapes.weights)
    layer = shapes.layers * shapes.tokens * shapes.width * shapes.element

    def add(what: str, axis: str, kinds: tuple[str, ...], amount: float) -> None:
        own = [one for one in found if axis in one.axes and one.kind in kinds]
        total = sum(one.count * one.bytes for one in own)
        rows.append(Expected(what, axis, kinds, amount, total, _note(own, total, axis)))

    if mesh.get("fsdp", 1) > 1:
        whole = [(one, _gathered(one, mesh)) for one in weights if "fsdp" in one.axes]
        size = shapes.element * shapes.parts
        gathers = sum((one.gathers if shapes.training else 1) * amount for one, amount in whole)
        times = ", layers' twice, others once" if shapes.training else ""
        add(f"weights gathered{times}", "fsdp", ("all-gather",), gathers * size)
        if shapes.training:
            sums = sum(one.sums * amount for one, amount in whole)
            add(_summed(weights), "fsdp", SUMS, sums * size)
    if mesh.get("data", 1) > 1 and shapes.training:
        if mesh["data"] == math.prod(mesh.values()):
            # Each device has full float32 gradients and sends them together.
            amount = 4 * sum(one.elements for one in weights)
            add("gradients summed once", "data", SUMS, amount)
        else:
            amount = sum(one.sums * one.elements / _parted(one, mesh) for one in weights)
            add(_summed(weights), "data", SUMS, amount * shapes.element)
    if mesh.get("tensor", 1) > 1:
        passes = (2 + shapes.remat) if shapes.training else 1
        what = f"activations, {2 * passes} all-reduces per layer"
        own = [one for one in found if one.axes == ("tensor",) and one.kind in ALL_REDUCES]
        total = sum(one.count * one.bytes * ALL_REDUCES[one.kind] for one in own)
        note = _note(own, sum(one.count * one.bytes for one in own), "tensor")
        row = Expected(what, "tensor", tuple(ALL_REDUCES), 2 * passes * layer, total, note)
        rows.append(row)
    return rows


def _note(own: list[Collective], total: float, axis: str) -> str:
    """Returns the unpredicted kinds that are a tenth of the compiled traffic or more."""
    said = []
    for kind, means in (
        ("all-reduce", "a plain all-reduce, which sends twice as much" if axis == "fsdp" else ""),
        ("collective-permute", "rings of permutes"),
    ):
        size = sum(one.count * one.bytes for one in own if one.kind == kind)
        if means and total and size >= total / 10:
            said.append(f"{size / total:.0%} of it by {means}")
    return ", ".join(said)


def _summed(weights: list[Weight]) -> str:
    tied = any(one.sums > 1 for one in weights)
    return "gradients summed once" + (", tied embeddings' once per use" if tied else "")


def _gathered(weight: Weight, mesh: Mapping[str, int]) -> float:
    """Returns elements per device of a weight after gathering it along `fsdp`."""
    return weight.elements / _parted(weight, mesh) * mesh["fsdp"]


def _parted(weight: Weight, mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[axis] for axis in weight.axes)
