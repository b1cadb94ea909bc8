"""A step compiled for a topology, with its HLO text and XLA's buffer assignment."""

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from gptjax.config import ExperimentConfig, InputError
from gptjax.costs.hlo import Program, read_program
from gptjax.preflight.collectives import Collective, collectives
from gptjax.preflight.memory import Memory, Model, memory_at_peak, parameter_shapes, read_plan
from gptjax.preflight.program import Lowered, bytes_held, lower_decoding, lower_training
from gptjax.preflight.topology import Topology

TEXTS = "*after_optimizations.txt"
"""The compiled program among XLA's dumps, which exists even if it does not fit."""


@dataclass(frozen=True)
class Compilation:
    """A compiled step."""

    lowered: Lowered
    program: Program
    memory: Memory
    collectives: list[Collective]
    exhausted: bool
    """Whether XLA ran out of memory, as the program does not fit."""
    seconds: float
    """Wall time of compilation, seconds."""
    cpu_seconds: float
    """CPU time of compilation over all cores, seconds."""


def compile_step(config: ExperimentConfig, topology: Topology, *, decode: bool) -> Compilation:
    """Compile the step that `fit` (or, with `decode`, `generate`) would run on `topology`.

    Raises:
      InputError: a mesh that does not match the devices, the batch or a parameter; a family that
        does not decode; a program that XLA refuses for a reason other than its size.
    """
    lower = lower_decoding if decode else lower_training
    lowered = lower(config, topology.devices)
    with tempfile.TemporaryDirectory(prefix="preflight-") as directory:
        dumps = Path(directory)
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        start, cpu_start = time.perf_counter(), time.process_time()
        compiled = _compile(lowered, options)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        plan = read_plan(dumps)
        if compiled is None:
            texts = sorted(dumps.glob(TEXTS))
            text = texts[-1].read_text() if texts else ""
            given_out = max((value.offset + value.size for value in plan.values), default=0)
            peak = sum(plan.arguments.values()) + given_out
        else:
            text = compiled.as_text() or ""
            peak = compiled.memory_analysis().peak_memory_in_bytes
    program = read_program(text)
    held = {
        "parameters": bytes_held(lowered.params),
        "optimizer": bytes_held(lowered.optimizer),
        "cache": bytes_held(lowered.cache),
    }
    memory = memory_at_peak(program, plan, peak, held, _sizes(config, lowered))
    found = collectives(program, dict(lowered.mesh.shape))
    return Compilation(lowered, program, memory, found, compiled is None, seconds, cpu_seconds)


def _compile(lowered: Lowered, options: dict[str, Any]) -> Any:
    """Returns the compiled program; None if it takes more memory than the device has."""
    try:
        return lowered.lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" in message:
            return None
        if "cudnn" in message.lower():
            raise InputError(
                "XLA needs cuDNN to compile attention's kernel for GPUs: pip install "
                "nvidia-cudnn-cu12, or --model.attention-kernel xla."
            ) from error
        reason = re.sub(r"\s+", " ", message)[:400].rstrip(".")
        raise InputError(f"XLA does not compile the step: {reason}.") from error


def _sizes(config: ExperimentConfig, lowered: Lowered) -> Model:
    """Returns the sizes by which `gptjax.preflight.memory` classifies buffers."""
    model, mesh = config.model, lowered.mesh.shape
    turns = {
        depth // len(model.attention_pattern)
        for depth in (model.depth, model.encoder_depth)
        if depth
    }
    leaves = jax.tree.leaves(lowered.params)
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    # Before the reduction, gradients are not sharded along the batch axes.
    shapes += [leaf.shape for leaf in leaves]
    return Model(
        vocabulary=frozenset({model.vocab_size, model.vocab_size // mesh["tensor"]}),
        width=frozenset({model.width, model.width // mesh["fsdp"]}),
        layers=frozenset(turns | {turn // mesh["pipeline"] for turn in turns}),
        gradients=parameter_shapes(shapes),
    )
