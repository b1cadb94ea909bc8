"""A parser of optimised HLO (`compiled.as_text()`): instructions, shapes, execution counts.

HLO has one line per instruction, except for kernels, whose metadata continues over lines that begin
at column 0; so a computation ends only at a line that is `}`. Source lines of instructions are in
tables before the first computation.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

CALLS = ("calls", "body", "condition", "to_apply", "true_computation", "false_computation")
"""Attributes that name a called computation."""
BITS = {"pred": 8, "token": 0, "s4": 4, "u4": 4, "bf16": 16}
"""Bits of types whose name does not end with the number."""
CONTAINERS = ("while", "conditional", "call")
"""Opcodes of instructions that only run other computations."""
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
"""Opcodes of collectives; asynchronous ones end with `-start` and `-done`."""
HOST_SPACE = 5
"""XLA's memory spaces: 0 is HBM, 5 host memory, the others are on-chip."""


class Array(NamedTuple):
    """An array of a shape, as `bf16[8,128]{1,0:T(8,128)S(1)}`."""

    type: str
    dimensions: tuple[int, ...]
    space: int
    """Its memory space."""

    @property
    def bytes(self) -> int:
        """Size in bytes, without padding."""
        return math.prod(self.dimensions) * _bits(self.type) // 8


def _bits(name: str) -> int:
    if name in BITS:
        return BITS[name]
    digits = re.match(r"[a-z]+(\d+)", name)
    return int(digits[1]) if digits else 0


def arrays(shape: str) -> list[Array]:
    """Returns the arrays of a shape; of a tuple, all of them in order."""
    return [
        Array(
            kind,
            tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size),
            int(space[1]) if (space := re.search(r"S\((\d+)\)", layout)) else 0,
        )
        for kind, sizes, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", shape)
    ]


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    """Everything after the operands."""
    root: bool = False

    @functools.cached_property
    def arrays(self) -> list[Array]:
        """The result's arrays."""
        return arrays(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """JAX's name of the operation: `jit(step)/jvp()/while/body/dot_general`."""
        return self._attribute(r'op_name="([^"]*)"')

    @property
    def channel(self) -> str:
        """The channel of a collective, shared by its asynchronous parts."""
        return self._attribute(r"channel_id=(\d+)")

    @property
    def called(self) -> list[str]:
        """The computations that it calls: a fusion's, a loop's, a conditional's."""
        names = re.findall(rf"\b(?:{'|'.join(CALLS)})=%?([\w.-]+)", self.attributes)
        several = re.search(r"\bbranch_computations=\{([^}]*)\}", self.attributes)
        return names + (re.findall(r"[\w.-]+", several[1]) if several else [])

    def _attribute(self, pattern: str) -> str:
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


@dataclass
class Program:
    """A compiled program."""

    computations: dict[str, dict[str, Instruction]]
    """Instructions by name, in order, by computation."""
    entry: str
    """The entry computation."""
    frames: dict[str, list[tuple[str, str, int]]] = field(default_factory=dict)
    """By `stack_frame_id`: file, function and line, innermost first."""

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Executions of each computation per step; each branch of a conditional counts once."""
        counts: dict[str, int] = {}

        def run(name: str, times: int) -> None:
            counts[name] = counts.get(name, 0) + times
            for instruction in self.computations[name].values():
                if instruction.opcode.endswith(("-update", "-done")):
                    continue  # Counted at its start.
                inner = times
                if instruction.opcode == "while":
                    inner *= self.trips(instruction)
                for called in instruction.called:
                    if called in self.computations and called != name:
                        run(called, inner)

        run(self.entry, 1)
        return counts

    def trips(self, loop: Instruction) -> int:
        """Returns the trip count of a `while`.

        If XLA does not annotate it, it is the constant that the condition compares a counter with,
        over the body's increment of that counter: XLA unrolls its own loops by two. 1 if there is
        no such constant.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition, body = (
            found[1] if (found := re.search(rf"{name}=%?([\w.-]+)", loop.attributes)) else ""
            for name in ("condition", "body")
        )
        limits = [
            number
            for name in self._reached(condition)
            for instruction in self.computations.get(name, {}).values()
            if (number := _number(instruction)) is not None
        ]
        return math.ceil(max([1, *limits]) / self._step(condition, body))

    def _step(self, condition: str, body: str) -> int:
        """Returns a loop body's increment of the counter that its condition reads."""
        inside = self.computations.get(body, {})
        root = next((one for one in inside.values() if one.root), None)
        for read in self.computations.get(condition, {}).values():
            index = re.search(r"index=(\d+)", read.attributes)
            if root is None or index is None or int(index[1]) >= len(root.operands):
                continue
            after = inside.get(root.operands[int(index[1])])
            while after is not None and after.opcode == "copy":
                after = inside.get(after.operands[0])
            if after is not None and after.opcode == "add":
                added = [_number(inside[name]) for name in after.operands if name in inside]
                return max([1, *(number for number in added if number is not None)])
        return 1

    def _reached(self, name: str) -> Iterator[str]:
        yield name
        for instruction in self.computations.get(name, {}).values():
            for called in instruction.called:
                if called in self.computations:
                    yield from self._reached(called)

    @functools.cached_property
    def instructions(self) -> dict[str, Instruction]:
        """Every instruction by name; names are unique in a program."""
        return {
            instruction.name: instruction
            for computation in self.computations.values()
            for instruction in computation.values()
        }

    def source(self, instruction: Instruction) -> list[tuple[str, str, int]]:
        """Returns file, function and line that traced it, innermost first."""
        frame = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        return self.frames.get(frame[1], []) if frame else []


def _number(instruction: Instruction) -> int | None:
    """Returns the value of an integer constant, else None."""
    scalar = [array.dimensions for array in instruction.arrays] == [()]
    whole = instruction.shape.startswith(("s", "u"))
    if instruction.opcode != "constant" or not (scalar and whole):
        return None
    return int(instruction.operands[0]) if instruction.operands else None


def read_program(text: str) -> Program:
    """Parses `compiled.as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$", line)
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line == "}":
            current = None
        elif line.startswith("  ") and (instruction := _instruction(line)):
            current[instruction.name] = instruction
    return Program(computations, entry, _frames(text))


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"  (ROOT )?%?([\w.-]+) = ", line)
    if head is None:
        return None
    tuple_shape = line[head.end()] == "("
    shape_end = _closing(line, head.end()) if tuple_shape else line.find(" ", head.end())
    opcode = re.match(r" *([\w-]+)\(", line[shape_end:])
    if opcode is None:
        return None
    opening = shape_end + opcode.end() - 1
    closing = _closing(line, opening)
    within = line[opening + 1 : closing - 1]
    operands = re.findall(r"%([\w.-]+)", within) or re.findall(r"^-?\d+$", within)
    return Instruction(
        head[2],
        line[head.end() : shape_end],
        opcode[1],
        tuple(operands),
        line[closing:],
        root=head[1] is not None,
    )


def _closing(line: str, opening: int) -> int:
    """Returns the index after the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(line)):
        depth += {"(": 1, ")": -1}.get(line[index], 0)
        if depth == 0:
            return index + 1
    return len(line)


def _frames(text: str) -> dict[str, list[tuple[str, str, int]]]:
    """Parses the tables of source lines, by stack frame id."""

    def rows(title: str) -> dict[str, str]:
        table = re.search(rf"^{title}\n((?:\d+ .*\n)+)", text, flags=re.MULTILINE)
        lines = table[1].splitlines() if table else []
        return {number: row for number, _, row in (line.partition(" ") for line in lines)}

    def numbers(row: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\d+)", row))

    files, functions = rows("FileNames"), rows("FunctionNames")
    locations = {number: numbers(row) for number, row in rows("FileLocations").items()}
    frames = {number: numbers(row) for number, row in rows("StackFrames").items()}

    def stack(number: str, seen: tuple[str, ...] = ()) -> list[tuple[str, str, int]]:
        frame = frames.get(number)
        if frame is None or number in seen:
            return []
        location = locations[frame["file_location_id"]]
        here = (
            files[location["file_name_id"]].strip('"'),
            functions[location["function_name_id"]].strip('"'),
            int(location["line"]),
        )
        # Parents are numbered from 1, and 1 is none.
        parent = str(int(frame.get("parent_frame_id", "0")) - 1)
        return [here, *stack(parent, (*seen, number))]

    return {number: stack(number) for number in frames}
