"""What is in a device's memory at the step's peak, read from XLA's own plan of it.

XLA's plan (`…-buffer-assignment.txt` among its dumps) gives each value of the program a place and
a size, padding included; when the values live follows from the order of the instructions in the
compiled text. The parameters and the optimizer's state are exact. The other kinds are told apart
by rule (`_kind`), and what no rule names is temporary.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gptjax.preflight.hlo import Instruction, Program

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
"""Instructions that give a value another name and copy nothing."""
CONTROL = ("while", "conditional", "call")
PLUMBING = ("sharding.py", "linear.py")
"""Modules that every layer goes through: a value is named by who called them."""
LISTED = 12
LEAST_LISTED = 0.001
"""Of the peak; a smaller buffer says nothing."""
SMALLEST = 1 / 4096
"""Values below this share of all are left out of the search for the peak."""


class Buffer(NamedTuple):
    """A piece of memory that is in use at the peak."""

    bytes: int
    """With padding."""
    kind: str
    shape: str
    source: str
    """The function of ours that it comes from, or the name of a parameter."""


@dataclass(frozen=True)
class Memory:
    """One device's memory at the peak."""

    peak: int
    """Bytes, by XLA's `peak_memory_in_bytes`."""
    kinds: dict[str, int]
    """Bytes a kind, all of which add up to the peak."""
    padding: int
    """Of the arguments: what their tiles hold beside numbers, counted with the temporaries."""
    largest: tuple[Buffer, ...] = ()
    """Largest first, arguments left out; none where XLA wrote no plan."""


class Model(NamedTuple):
    """What the rules know of the program's sizes, on one device."""

    vocabulary: frozenset[int]
    """Lengths of an axis of tokens' scores."""
    width: frozenset[int]
    """Of the residual stream."""
    layers: frozenset[int]
    """Of a stack that a scan makes."""
    gradients: frozenset[tuple[int, ...]]
    """Shapes of parameters, sorted and without axes of 1."""


@dataclass
class _Value:
    """One value of the plan."""

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
    """Bytes a parameter of the program."""
    values: list[_Value] = field(default_factory=list)
    """Of the memory that is given out and back during the step."""


def read_plan(directory: Path) -> _Plan:
    """XLA's plan of HBM in a directory of its dumps; empty where there is none."""
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
            index = tuple(int(place) for place in (value[2] or "").split(",") if place)
            plan.values.append(_Value(value[1], index, int(value[3]), int(value[4]), value[5]))
    return plan


def memory_at_peak(
    program: Program, plan: _Plan, peak: int, held: dict[str, int], model: Model
) -> Memory:
    """Split the peak into kinds.

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
            continue  # A tuple is a list of places.
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
    """The values that are in use when most is, one a place."""
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
    """When the instructions of a program run, loops once, and until when their values are read."""

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
        """From when to when a value is needed: an instruction's, or a part of its tuple."""
        instruction = self._program.instructions.get(name)
        if instruction is None or name not in self._starts:
            return 0, -1
        begins = (self._stops if instruction.opcode in CONTROL else self._starts)[name]
        return begins, max(begins, self._last_read(name, index))

    def _last_read(self, name: str, index: tuple[int, ...]) -> int:
        last = self._starts[name]
        for user in self._users.get(name, ()):
            if user.opcode == "get-tuple-element" and index:
                place = re.search(r"index=(\d+)", user.attributes)
                if place and int(place[1]) != index[0]:
                    continue
            last = max(last, self._starts[user.name])
            if user.opcode in CONTROL:  # What a loop carries stays in its place all the while.
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
    """What a value is, by its shape and by where in the program it is made.

    Logits have the vocabulary as an outer axis and none of the width. Gradients have the shape of a
    parameter and are made in the backward pass, or by a product. Saved activations are made in the
    forward pass and are a stack of layers, or are there when the backward pass is at the peak.
    """
    found = re.match(r"[a-z]\w*\[([\d,]*)\]", value.shape)
    sizes = [int(size) for size in found[1].split(",") if size] if found else []
    if set(sizes[:1] + sizes[-1:]) & model.vocabulary and not set(sizes) & model.width:
        return "logits"
    name = instruction.op_name if instruction else ""
    shape = tuple(sorted(size for size in sizes if size > 1))
    if shape in model.gradients:
        # Products that give a parameter's shape; in the forward pass that is the head's gradient.
        made = not name or "transpose(" in name or name.endswith(("dot_general", "while"))
        return "gradients" if made else "temporaries"
    forward = "jvp(" in name and "transpose(" not in name
    if forward and len(sizes) > 1 and (backward or sizes[0] in model.layers):
        return "saved activations"
    return "temporaries"


def _is_backward(instruction: Instruction | None) -> bool:
    return instruction is not None and "transpose(" in instruction.op_name


def _source(program: Program, instruction: Instruction | None) -> str:
    """The function of ours that a value comes from, with its line, and in which pass."""
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
    """Shapes as the rules compare them: also those of one layer of a stack."""
    found = set()
    for shape in shapes:
        for part in (tuple(shape), tuple(shape)[1:]):
            sizes = tuple(sorted(size for size in part if size > 1))
            if len(sizes) > 1:
                found.add(sizes)
    return frozenset(found)
