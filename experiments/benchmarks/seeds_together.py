"""Time of training seeds as one ensemble, against one run after another.

    python experiments/benchmarks/seeds_together.py --seeds 5 --steps 300 --width 64

Runs of `gptjax.runs.ensembles` share a program, each core training one at a time; those of
`gptjax.runs.trial` use all cores, and each compiles. Every timing is a process of its own,
alternating A B A B; seconds are those of all runs, with compilation, without imports. The losses
must be equal.
"""

import argparse
import dataclasses
import functools
import multiprocessing
import statistics
import time

import numpy as np

from gptjax.config import ExperimentConfig, OptimizerConfig, TrainConfig, TransformerConfig
from gptjax.costs.model import model_cost
from gptjax.data.batch import Batch
from gptjax.data.pipeline import made_batches
from gptjax.parallel.sharding import configure_cpu
from gptjax.runs.result import environment

BATCH, CONTEXT, VOCABULARY = 16, 64, 256


def made(generator: np.random.Generator) -> Batch:
    """Returns rows that count up from a random token, in steps of 1 to 8."""
    first, stride = generator.integers(VOCABULARY, size=(BATCH, 1)), 1 + generator.integers(8)
    return Batch.causal((first + stride * np.arange(CONTEXT + 1)) % VOCABULARY)


def config(width: int, steps: int) -> ExperimentConfig:
    """Returns the config of a decoder of four layers."""
    return ExperimentConfig(
        model=TransformerConfig(
            vocab_size=VOCABULARY, context_length=CONTEXT, depth=4, width=width, heads=4
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
        train=TrainConfig(steps=steps, batch_size=BATCH, log_every=100, eval_every=100),
    )


def run(width: int, steps: int, seeds: int, together: bool) -> tuple[float, list[float]]:
    """Returns seconds of all runs, and their losses."""
    from gptjax.runs.ensembles import train_ensemble
    from gptjax.runs.trial import train

    common = config(width, steps)
    configure_cpu(model_cost(common.model).parameters)
    configs = [
        dataclasses.replace(common, train=dataclasses.replace(common.train, seed=seed))
        for seed in range(seeds)
    ]
    validation = [made(np.random.default_rng(0))]
    batches = [made_batches(made, seed=seed) for seed in range(seeds)]
    start = time.perf_counter()
    if together:
        trials = train_ensemble(configs, batches, [validation] * seeds)
    else:
        trials = [
            train(each, of_seed, validation) for each, of_seed in zip(configs, batches, strict=True)
        ]
    return time.perf_counter() - start, [trial.validation_loss for trial in trials]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, what in (
        ("seeds", 5, "runs"),
        ("steps", 300, "steps of each"),
        ("width", 64, "of the model"),
        ("rounds", 3, "timings of each"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default})")
    asked = parser.parse_args()
    for name, value in vars(asked).items():
        if value < 1:
            parser.error(f"--{name} is {value}: it must be at least 1.")
    spawn = multiprocessing.get_context("spawn")
    seconds, losses = {True: [], False: []}, {}
    for _ in range(asked.rounds):
        for together in (True, False):
            with spawn.Pool(1) as pool:
                measure = functools.partial(run, asked.width, asked.steps, asked.seeds, together)
                taken, losses[together] = pool.apply(measure)
            seconds[together].append(taken)
    apart = max(abs(a / b - 1) for a, b in zip(losses[True], losses[False], strict=True))
    parameters = model_cost(config(asked.width, asked.steps).model).parameters
    print(f"{asked.seeds} runs of {asked.steps} steps, {parameters:,} parameters")
    for together, name in ((True, "together"), (False, "one after another")):
        each = ", ".join(f"{taken:.1f}" for taken in seconds[together])
        print(f"{name:<18}{statistics.median(seconds[together]):8.1f} s, the median of {each}")
    ratio = statistics.median(seconds[True]) / statistics.median(seconds[False])
    print(f"ratio {ratio:.2f}; losses differ by at most {apart:.1e}, relatively")
    print(environment()["versions"])


if __name__ == "__main__":
    main()
