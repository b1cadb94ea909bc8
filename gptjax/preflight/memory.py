"""A device's memory at the step's peak by kind, from XLA's buffer assignment.

The buffer assignment (`…-buffer-assignment.txt` among XLA's dumps) gives each value of the program
an offset and a size, padding included; live ranges follow from the order of instructions in the
compiled text. Parameters and optimizer state are exact. Other kinds are classified by rule
(`_kind`); whatever no rule names is temporary.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gptjax.costs.hlo import Instruction, Program

KINDS = (
    "parameters",
    "optimizer",
    "cache",
    "gradients",
    "saved activations",
    "logits",
    "temporaries",
)
ALIASES = ("get-tuple-element", "bitcast", "tuple", "copy-done", "opt-barrier")
"""Instructions that alias a value without copying it."""
CONTROL = ("while", "conditional", "call")
PLUMBING = ("sharding.py", "linear.py")
"""Modules that every layer calls: a value is named by their caller."""
LISTED = 12
LEAST_LISTED = 0.001
"""Smallest share of the peak of a listed buffer."""
SMALLEST = 1 / 4096
"""Values below this share of all bytes are left out of the search for the peak."""


class Buffer(NamedTuple):
    """A buffer that is live at the peak."""

    bytes: int
    """Size with padding."""
    kind: str
    shape: str
    source: str
    """The gptjax function that it comes from, or the name of a parameter."""


@dataclass(frozen=True)
class Memory:
    """One device's memory at the peak."""

    peak: int
    """Bytes, by XLA's `peak_memory_in_bytes`."""
    kinds: dict[str, int]
    """Bytes by kind, adding up to the peak."""
    padding: int
    """Tile padding of the arguments, counted with the temporaries."""
    largest: tuple[Buffer, ...] = ()
    """Largest first, without arguments; empty if XLA wrote no buffer assignment."""


class Model(NamedTuple):
    """Sizes of the program on one device, for the classification rules."""

    vocabulary: frozenset[int]
    """Possible lengths of the vocabulary axis of logits."""
    width: frozenset[int]
    """Width of the residual stream."""
    layers: frozenset[int]
    """Layers of a scanned stack."""
    gradients: frozenset[tuple[int, ...]]
    """Shapes of parameters, sorted and without axes of length 1."""


@dataclass
class _Value:
    """One value of the buffer assignment."""

    name: str
    index: tuple[int, ...]
    size: int
    offset: int
    shape: str
    begins: int = 0
    ends: int = 0


@dataclass
class _Plan:
    arguments: dict[int, int] = field(default_factory=dict)
    """Bytes per parameter of the program."""
    values: list[_Value] = field(default_factory=list)
    """Values in memory allocated and freed during the step."""


def read_plan(directory: Path) -> _Plan:
    """Parses XLA's buffer assignment of HBM in a dump directory; empty if there is none."""
    plan = _Plan()
    paths = sorted(directory.glob("*buffer-assignment.txt"))
    inside = False
    for line in paths[-1].read_text().splitlines() if paths else ():
        if line.startswith("allocation"):
            inside = "preallocated-temp" in line and "color" not in line
            if given := re.search(r"size (\d+), parameter (\d+),", line):
                number = int(given[2])
                plan.arguments[number] = plan.arguments.get(number, 0) + int(given[1])
        elif inside and (
            value := re.match(
                r" value: <\d+ (\S+?)(?:\{([\d,]*)\})? (?:\(phi\) )?@\d+> "
                r"\(size=(\d+),offset=(\d+)\): (.*)",
                line,
            )
        ):
            index = tuple(int(number) for number in (value[2] or "").split(",") if number)
            plan.values.append(_Value(value[1], index, int(value[3]), int(value[4]), value[5]))
    return plan


def memory_at_peak(
    program: Program, plan: _Plan, peak: int, held: dict[str, int], model: Model
) -> Memory:
    """Returns the peak split into kinds.

    Args:
      program: the compiled program.
      plan: from `read_plan`.
      peak: bytes, XLA's.
      held: exact bytes of parameters, optimizer and cache, by their shapes and shardings.
      model: sizes for the rules.
    """
    kinds = dict.fromkeys(KINDS, 0) | held
    alive = _alive_at_peak(program, plan)
    backward = any(_is_backward(program.instructions.get(value.name)) for value in alive)
    buffers = []
    for value in alive:
        if value.shape.startswith("("):
            continue  # A tuple is a list of pointers.
        instruction = program.instructions.get(value.name)
        kind = _kind(value, instruction, model, backward)
        buffers.append(Buffer(value.size, kind, _bare(value.shape), _source(program, instruction)))
    room = max(0, peak - sum(held.values()))
    for buffer in sorted(buffers, key=lambda buffer: -buffer.bytes):
        if buffer.kind != "temporaries":
            taken = min(buffer.bytes, room)
            kinds[buffer.kind] += taken
            room -= taken
    kinds["temporaries"] += room
    padding = sum(plan.arguments.values()) - sum(held.values()) if plan.arguments else 0
    listed = sorted((one for one in buffers if one.bytes > LEAST_LISTED * peak), reverse=True)
    return Memory(peak, kinds, max(0, padding), tuple(listed[:LISTED]))


def _alive_at_peak(program: Program, plan: _Plan) -> list[_Value]:
    """Returns the values live at the peak, one per offset."""
    least = SMALLEST * max((value.size + value.offset for value in plan.values), default=0)
    values = [value for value in plan.values if value.size >= least]
    times = _Times(program)
    for value in values:
        value.begins, value.ends = times.lives(value.name, value.index)

    def alive(time: int) -> dict[tuple[int, int], _Value]:
        return {
            (value.offset, value.size): value
            for value in values
            if value.begins <= time <= value.ends
        }

    moments = {value.begins for value in values}
    fullest = max(moments, key=lambda time: sum(size for _, size in alive(time)), default=0)
    return list(alive(fullest).values())


class _Times:
    """Live ranges: the time at which each instruction runs (loops once) and its last read."""

    def __init__(self, program: Program):
        self._starts: dict[str, int] = {}
        self._stops: dict[str, int] = {}
        self._users: dict[str, list[Instruction]] = {}
        self._clock = 0
        self._program = program
        self._run(program.entry)

    def _run(self, computation: str) -> None:
        for instruction in self._program.computations[computation].values():
            self._clock += 1
            self._starts[instruction.name] = self._clock
            for operand in instruction.operands:
                self._users.setdefault(operand, []).append(instruction)
            if instruction.opcode in CONTROL:
                for called in instruction.called:
                    if called in self._program.computations:
                        self._run(called)
            self._clock += 1
            self._stops[instruction.name] = self._clock

    def lives(self, name: str, index: tuple[int, ...]) -> tuple[int, int]:
        """Returns the live range of an instruction's value, or of an element of its tuple."""
        instruction = self._program.instructions.get(name)
        if instruction is None or name not in self._starts:
            return 0, -1
        begins = (self._stops if instruction.opcode in CONTROL else self._starts)[name]
        return begins, max(begins, self._last_read(name, index))

    def _last_read(self, name: str, index: tuple[int, ...]) -> int:
        last = self._starts[name]
        for user in self._users.get(name, ()):
            if user.opcode == "get-tuple-element" and index:
                read = re.search(r"index=(\d+)", user.attributes)
                if read and int(read[1]) != index[0]:
                    continue
            last = max(last, self._starts[user.name])
            if user.opcode in CONTROL:  # A loop's carry is live throughout.
                last = max(last, self._stops[user.name])
            if user.opcode == "while":
                last = max(last, self._last_read(user.name, index))
            if user.opcode in ALIASES:
                within = index[1:] if user.opcode == "get-tuple-element" else index
                if user.opcode == "tuple":
                    within = (user.operands.index(name), *index)
                last = max(last, self._last_read(user.name, within))
        return last


def _kind(value: _Value, instruction: Instruction | None, model: Model, backward: bool) -> str:
    """Returns the kind of a value, by its shape and where it is computed.

    Logits have the vocabulary as an outer axis and no axis of the width. Gradients have the shape
    of a parameter and are computed in the backward pass, or by a product. Saved activations are
    computed in the forward pass and are a stack of layers, or live at a peak in the backward pass.
    """
    found = re.match(r"[a-z]\w*\[([\d,]*)\]", value.shape)
    sizes = [int(size) for size in found[1].split(",") if size] if found else []
    if set(sizes[:1] + sizes[-1:]) & model.vocabulary and not set(sizes) & model.width:
        return "logits"
    name = instruction.op_name if instruction else ""
    shape = tuple(sorted(size for size in sizes if size > 1))
    if shape in model.gradients:
        # Products of a parameter's shape; in the forward pass that is the head's gradient.
        made = not name or "transpose(" in name or name.endswith(("dot_general", "while"))
        return "gradients" if made else "temporaries"
    forward = "jvp(" in name and "transpose(" not in name
    if forward and len(sizes) > 1 and (backward or sizes[0] in model.layers):
        return "saved activations"
    return "temporaries"


def _is_backward(instruction: Instruction | None) -> bool:
    return instruction is not None and "transpose(" in instruction.op_name


def _source(program: Program, instruction: Instruction | None) -> str:
    """Returns the gptjax function that a value comes from, with its line and pass."""
    if instruction is None:
        return "unknown"
    ours = [frame for frame in program.source(instruction) if "gptjax/" in frame[0]]
    named = [frame for frame in ours if not frame[0].endswith(PLUMBING)] or ours
    pieces = instruction.op_name.split("/")
    where = pieces[-1] if instruction.op_name else instruction.opcode
    if where == "parameter":
        where = "carried by a loop"
    if named:
        file, function, line = named[0]
        called = function.replace(".<locals>", "")
        where = f"{called} ({file.rpartition('gptjax/')[2]}:{line}), {where}"
    if "rematted" in instruction.op_name:
        return f"{where}, computed again"
    return f"{where}, backward" if "transpose(" in instruction.op_name else where


def _bare(shape: str) -> str:
    return re.sub(r"\{[^}]*\}", "", shape)


def parameter_shapes(shapes: Iterable[Sequence[int]]) -> frozenset[tuple[int, ...]]:
    """Returns the shapes that the rules compare, with those of single layers of a stack."""
    found = set()
    for shape in shapes:
        for part in (tuple(shape), tuple(shape)[1:]):
            sizes = tuple(sorted(size for size in part if size > 1))
            if len(sizes) > 1:
                found.add(sizes)
    return frozenset(found)
