"""The time of a training step by part of the model, beside its FLOPs and its roofline.

The parts are the named scopes of the model's code (`jax.named_scope`), which a compiled program
keeps in the metadata of its instructions. A fusion belongs to the part of its result.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from gptjax.config import TransformerConfig
from gptjax.costs.hlo import COLLECTIVES, CONTAINERS, Instruction, Program
from gptjax.costs.model import model_cost
from gptjax.costs.traffic import memory_traffic
from gptjax.training.profile.timeline import OTHER_PROGRAMS, Timeline

SCOPES = {
    "embedding": "embedding",
    "attention": "attention",
    "mlp": "MLP",
    "lstm": "LSTM",
    "norm": "norms",
    "head": "head and loss",
    "loss": "head and loss",
    "optimizer": "optimizer",
}
"""Named scope → part."""
COLLECTIVE, OTHER, HOST, IDLE = "collectives", "other", "host", "idle"
PROGRAMS = "other programs"
PARTS = (*dict.fromkeys(SCOPES.values()), COLLECTIVE, OTHER, PROGRAMS)
MEANINGS = {
    OTHER: "residual additions, slices of stacked layers",
    PROGRAMS: "evaluation, what --train.watch measures, copies",
    HOST: "the device waits for the host: batches, starting programs",
    IDLE: "nothing runs on the device, and the host waits for it",
}
IN_PARTS = {
    "attention": r"(cross )?(query|key|value|output)|compression",
    "MLP": r"up|gate|down|router|expert (up|gate|down)",
    "LSTM": r"(input|recurrent) gates",
    "head and loss": r"masked-LM head",
}
"""Part → the products of `ModelCost.parts` that it computes."""


class Peaks(NamedTuple):
    """The peaks of one device."""

    flops: float
    """FLOP/s."""
    bandwidth: float
    """Bytes per second between memory and the cores."""
    source: str
    """Where the figures come from."""


class Row(NamedTuple):
    """A part of a step on one device."""

    part: str
    seconds: float
    flops: float
    """Of the cost model, the backward pass included, recomputation not."""
    bytes: float
    """To and from memory, by the compiled program."""
    bound: float
    """The least seconds that the peaks allow: the roofline's."""


class StepTimes(NamedTuple):
    """The parts of some profiled steps."""

    first: int
    last: int
    rows: tuple[Row, ...]
    """Per step."""
    peaks: Peaks

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(row.seconds for row in self.rows)

    @property
    def flops(self) -> float:
        """Of a step on one device."""
        return sum(row.flops for row in self.rows)


def step_times(
    timeline: Timeline,
    program: Program,
    config: TransformerConfig,
    tokens: float,
    steps: range,
    peaks: Peaks,
) -> StepTimes:
    """Returns the time of each part, per step.

    Args:
      timeline: of all steps.
      program: the step, compiled.
      config: of the model.
      tokens: of a step, on one device.
      steps: the profiled steps.
      peaks: of the device.
    """
    instructions = program.instructions
    parts = {name: part_of(program, one) for name, one in instructions.items()}
    seconds: defaultdict[str, float] = defaultdict(float)
    for name, taken in timeline.instructions.items():
        part = PROGRAMS if name == OTHER_PROGRAMS else parts.get(name, OTHER)
        seconds[part] += taken / len(steps)
    moved: Counter[str] = Counter()
    for name, size in memory_traffic(program).items():
        moved[parts[name]] += size
    flops = {part: 3 * tokens * each for part, each in forward_flops(config).items()}
    rows = []
    for part in PARTS:
        work = flops.get(part, 0.0)
        bound = max(work / peaks.flops, moved[part] / peaks.bandwidth)
        if seconds[part] or work:
            rows.append(Row(part, seconds[part], work, moved[part], bound))
    rows.append(Row(HOST, timeline.host / len(steps), 0.0, 0.0, 0.0))
    rows.append(Row(IDLE, timeline.idle / len(steps), 0.0, 0.0, 0.0))
    return StepTimes(steps[0], steps[-1], tuple(rows), peaks)


def forward_flops(config: TransformerConfig) -> dict[str, int]:
    """Forward FLOPs per token by part; they add up to those of the model."""
    cost = model_cost(config)
    flops = dict.fromkeys(IN_PARTS, 0)
    flops["attention"] += cost.attention_flops
    flops["head and loss"] += cost.unembedding_flops
    for part in cost.parts:
        if part.flops:
            (own,) = [name for name, of in IN_PARTS.items() if re.fullmatch(of, part.name)]
            flops[own] += part.flops
    return flops


def containers(program: Program) -> set[str]:
    """The instructions that only run others."""
    return {name for name, one in program.instructions.items() if one.opcode in CONTAINERS}


def part_of(program: Program, instruction: Instruction) -> str:
    """The part of the model that an instruction computes."""
    if instruction.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return COLLECTIVE
    if part := _scope(instruction.op_name):
        return part
    inside: Mapping[str, Instruction] = {}
    for called in instruction.called:
        inside = {**inside, **program.computations.get(called, {})}
    found = Counter(part for one in inside.values() if (part := _scope(one.op_name)))
    return found.most_common(1)[0][0] if found else OTHER


def _scope(op_name: str) -> str:
    """The part of the innermost named scope of `jit(step)/transpose(jvp(attention))/norm/mul`."""
    without_functions = re.sub(r"\bp?jit\([^()]*\)", "", op_name)
    found = re.findall(rf"\b(?:{'|'.join(SCOPES)})\b", without_functions)
    return SCOPES[found[-1]] if found else ""
