"""Cost of `--train.watch`, relative to the steps between two measurements.

    python experiments/benchmarks/watch_cost.py --presets quickstart gpt2 --batch-size 16

Steps and measurements of random tokens in turn, each round timed as a whole; medians of rounds.
"""

import dataclasses
import statistics
import time

import jax
import tyro
from steps_and_tokens import random_batch

from gptjax import preset
from gptjax.config import ExperimentConfig, MeshConfig, TrainConfig
from gptjax.costs.model import model_cost
from gptjax.parallel.sharding import build_mesh, configure_cpu
from gptjax.runs.assembly import assemble
from gptjax.training.step import compile_train_step, init_state
from gptjax.training.watch import lower_watch_step


def watch_cost(
    presets: tuple[str, ...] = ("quickstart",),
    batch_size: int = 16,
    depth: int = 4,
    rounds: int = 7,
    steps: int = 4,
) -> None:
    """Print the time of a step, of a measurement, and what the default interval costs.

    Args:
      presets: Models, with `depth` layers.
      batch_size: Rows per step.
      depth: Layers.
      rounds: Rounds of each, in turn.
      steps: Steps, and measurements, of a round.
    """
    train = TrainConfig(batch_size=batch_size)
    models = [dataclasses.replace(preset(name), depth=depth, vocab_size=256) for name in presets]
    configure_cpu(max(model_cost(model).parameters for model in models))
    for name, model in zip(presets, models, strict=True):
        mesh = build_mesh(MeshConfig(), batch_size)
        assembly = assemble(ExperimentConfig(model=model, train=train), mesh)
        optimizer, batch = assembly.optimizer(), jax.device_put(random_batch(model, batch_size))
        state = init_state(assembly.init, optimizer, mesh, assembly.axes)
        how = {"loss": assembly.loss, "optimizer": optimizer, "activations": assembly.activations}
        watch = lower_watch_step(state, batch, mesh=mesh, stacked=False, **how).compile()
        step = compile_train_step(assembly.loss, optimizer, state, batch, mesh)
        seconds: dict[str, list[float]] = {"step": [], "watch": []}
        for _ in range(rounds + 1):
            for kind, spent in seconds.items():
                start = time.perf_counter()
                for _ in range(steps):
                    if kind == "step":
                        state, metrics = step(state, batch)
                        jax.block_until_ready(metrics)
                    else:
                        jax.block_until_ready(watch(state, batch))
                spent.append((time.perf_counter() - start) / steps)
        own, measured = (statistics.median(spent[1:]) for spent in seconds.values())
        share = measured / own / train.watch_every
        print(
            f"{name}, {depth} layers: {1000 * own:.1f} ms per step, {1000 * measured:.1f} ms per "
            f"measurement ({measured / own:.2f} steps); per {train.watch_every} {share:.2%}."
        )


if __name__ == "__main__":
    tyro.cli(watch_cost)
