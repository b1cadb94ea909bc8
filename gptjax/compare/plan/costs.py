"""Costs of each variant (speed, memory, compilation, decoding), all variants timed in turn."""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptjax.compare.results import Costs
from gptjax.config import ExperimentConfig, TransformerConfig
from gptjax.costs.model import model_cost
from gptjax.data.batch import Batch
from gptjax.decoding.generate import generate
from gptjax.decoding.sampling import Sampling
from gptjax.models.build import abstract, build, split
from gptjax.parallel.sharding import build_mesh
from gptjax.training.losses import training_loss
from gptjax.training.optimizers import build_optimizer
from gptjax.training.step import lower_train_step, state_shapes

ROUNDS = 5
"""Timing rounds, each of which times every variant once; the median counts."""
LEAST_SECONDS = 0.2
"""The least length of a timing, so that start-up does not count."""
DECODED = 64
"""Tokens decoded, or as many as fit the context."""
TOPOLOGY = "v5e:1x1"
TPU_SECONDS = 600
"""Timeout of compiling for a TPU."""


class Step(NamedTuple):
    """A training step compiled as in `fit`."""

    run: Callable[[], None]
    """Runs one step and waits for it."""
    peak_bytes: int
    compile_seconds: float


def compiled_step(config: ExperimentConfig, batch: Batch) -> Step:
    """Returns the compiled step of one run of `config` on all devices, with zero parameters."""
    mesh = build_mesh(config.mesh, config.train.batch_size)
    graphdef, _ = abstract(config.model)
    optimizer = build_optimizer(config.optimizer, config.train.steps, dtype=config.model.dtype)

    def init() -> Any:
        return split(build(config.model, rngs=nnx.Rngs(0)))[1]

    shapes = state_shapes(init, optimizer, mesh)
    start = time.perf_counter()
    loss = training_loss(graphdef, config.train)
    step = lower_train_step(loss, optimizer, shapes, batch, mesh).compile()
    seconds = time.perf_counter() - start
    plan = step.memory_analysis()
    assert plan is not None
    # Not XLA's own peak, which on a CPU leaves out temporaries.
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    state = jax.tree.map(
        lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding), shapes
    )

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    return Step(run, held + plan.temp_size_in_bytes, seconds)


def seconds_in_turn(runs: Sequence[Callable[[], None]], rounds: int = ROUNDS) -> list[float]:
    """Returns seconds per call of each, timed in turn, the median over rounds.

    The first call of each does not count: it may compile.
    """
    repeats, seconds = [], [[] for _ in runs]
    for run in runs:
        run()
        start = time.perf_counter()
        run()
        repeats.append(max(1, round(LEAST_SECONDS / (time.perf_counter() - start))))
    for _ in range(rounds):
        for run, count, measured in zip(runs, repeats, seconds, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                run()
            measured.append((time.perf_counter() - start) / count)
    return [statistics.median(measured) for measured in seconds]


def seconds_per_step(configs: Sequence[ExperimentConfig], batch: Batch) -> list[float]:
    """Returns the step time of one run of each config on all devices."""
    return seconds_in_turn([compiled_step(config, batch).run for config in configs])


def measure(configs: Mapping[str, ExperimentConfig], batch: Batch) -> dict[str, Costs]:
    """Returns the costs of each variant."""
    steps = {name: compiled_step(config, batch) for name, config in configs.items()}
    training = seconds_in_turn([step.run for step in steps.values()])
    decoding = {
        name: run
        for name, config in configs.items()
        if (run := _decoding(config.model)) is not None
    }
    decoded = dict(zip(decoding, seconds_in_turn(list(decoding.values())), strict=True))
    tokens = batch.tokens.size
    return {
        name: Costs(
            tokens_per_second=tokens / seconds,
            peak_bytes=step.peak_bytes,
            compile_seconds=step.compile_seconds,
            decode_tokens_per_second=_decoded(configs[name].model) / decoded[name]
            if name in decoded
            else None,
            tpu_peak_bytes=tpu_peak(configs[name]),
        )
        for (name, step), seconds in zip(steps.items(), training, strict=True)
    }


def _decoded(model: TransformerConfig) -> int:
    return min(DECODED, model.context_length - 1)


def _decoding(config: TransformerConfig) -> Callable[[], None] | None:
    """Returns greedy decoding of one sequence; None for a family that does not decode."""
    if config.family == "encoder":
        return None
    model = build(config, rngs=nnx.Rngs(0))
    source = (
        np.zeros((1, config.context_length), int) if config.family == "encoder_decoder" else None
    )

    def run() -> None:
        for _ in generate(
            model,
            np.zeros((1, 1), int),
            max_new_tokens=_decoded(config),
            sampling=Sampling(temperature=0.0),
            source=source,
        ):
            pass

    return run


def tpu_peak(config: ExperimentConfig) -> int | None:
    """Returns peak bytes of the training step on one TPU v5e, by its compiler; None without libtpu.

    It runs in a subprocess, since libtpu needs environment variables of its own.
    """
    if importlib.util.find_spec("libtpu") is None:
        return None
    command = [sys.executable, "-m", "gptjax", "preflight", "quickstart", "--topology", TOPOLOGY]
    flags = [f"--batch-per-device={config.train.batch_size}", "--train.loss-chunk=0", "--json"]
    try:
        ended = subprocess.run(
            [*command, *flags, *_flags(config.model)],
            capture_output=True,
            text=True,
            timeout=TPU_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    # Exit code 1: the step does not fit, but its peak is known.
    return json.loads(ended.stdout)["peak_bytes"] if ended.returncode in (0, 1) else None


def _flags(model: TransformerConfig) -> list[str]:
    """Returns the model as flags of `python -m gptjax preflight`."""
    flags = []
    for name, hint in typing.get_type_hints(TransformerConfig).items():
        value, word = getattr(model, name), name.replace("_", "-")
        if hint is bool:
            flags.append(f"--model.{word}" if value else f"--model.no-{word}")
        else:
            flags.append(f"--model.{word}={value}")
    return flags


def estimated_seconds(configs: Sequence[ExperimentConfig], batch: Batch) -> list[float]:
    """Returns the step time of each, estimated from that of the first and the FLOPs of each."""
    (seconds,) = seconds_in_turn([compiled_step(configs[0], batch).run], rounds=2)
    first = model_cost(configs[0].model).training_flops
    return [seconds * model_cost(config.model).training_flops / first for config in configs]
