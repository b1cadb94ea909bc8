"""HBM traffic of a compiled program, by its optimised HLO."""

from gptjax.costs.hlo import CONTAINERS, Instruction, Program

FREE = (
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "iota",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    *CONTAINERS,
)
"""Instructions that move no data themselves."""
HBM = 0


def memory_traffic(program: Program) -> dict[str, int]:
    """Returns bytes per step between HBM and the cores, by instruction.

    Every instruction reads and writes HBM; a slice reads only its result and an in-place update
    writes only its update, inside fusions too. On-chip memory is free. Collectives count as reads
    and writes of their arrays.
    """
    inside = {
        called
        for computation in program.computations.values()
        for instruction in computation.values()
        if instruction.opcode not in CONTAINERS
        for called in instruction.called
    }
    by_instruction = {}
    for name, computation in program.computations.items():
        times = program.counts.get(name, 0)
        if not times or name in inside:
            continue
        for instruction in computation.values():
            if instruction.opcode in FREE or instruction.opcode.endswith(("-done", "-update")):
                continue
            by_instruction[instruction.name] = times * _moved(program, computation, instruction)
    return by_instruction


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
