"""Several runs in one program: seeds and learning rates side by side, each as if it ran alone.

The runs share nothing but the compilation. They are parted over the devices, and within a step a
device takes its runs one after another: `jax.vmap` over them was slower than separate runs, since
XLA has no fast product of many small matrices on a CPU.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import ExperimentConfig, InputError, MeshConfig
from gptjax.data.batch import Batch
from gptjax.sharding import DATA, build_mesh
from gptjax.training.cross_entropy import LossSums
from gptjax.training.loop import Batches
from gptjax.training.losses import training_loss
from gptjax.training.optimizers import build_optimizer
from gptjax.training.step import Metrics, State, train_step
from gptjax.transformer import build, split
from gptjax.trial import Trial


class Knobs(NamedTuple):
    """What may differ between runs of one program; here and below R counts the runs."""

    seed: jax.Array
    """[R], uint32: `train.seed`."""
    learning_rate: jax.Array
    """[R], float32: `optimizer.learning_rate`."""


def train_together(
    configs: Sequence[ExperimentConfig],
    batches: Sequence[grain.DatasetIterator],
    validation: Sequence[Batches],
) -> list[Trial]:
    """What `trial.train` gives for each of `configs`, from one program that trains them all.

    Where `train` would raise `Diverged`, the run keeps the parameters that it had, its lines tell
    of a loss that is not finite, and the others go on. As many devices are used as share the runs
    evenly; with dropout, a run draws what it would draw on one device. A second call with the same
    shapes, and configs that differ in no more than these may, compiles nothing.

    Args:
      configs: alike in all but `train.seed` and `optimizer.learning_rate`; `data` and `mesh` are
        not asked.
      batches: of each run, all of the same shape.
      validation: of each run, the same number of batches for all.

    Raises:
      InputError: configs that differ in more, or not as many batches as configs.
    """
    counts = [len(configs), len(batches), len(validation)]
    if not configs or len(set(counts)) > 1 or len({len(each) for each in validation}) > 1:
        raise InputError(
            f"There are {counts[0]} configs, {counts[1]} iterators of batches and validations of "
            f"{[len(each) for each in validation]} batches: each config needs one of both, and "
            "all validations the same number of batches."
        )
    start = time.perf_counter()
    common = _common(configs)
    program = _program(common, build_mesh(MeshConfig(), len(configs)))
    knobs = Knobs(
        jnp.array([config.train.seed for config in configs], jnp.uint32),
        jnp.array([config.optimizer.learning_rate for config in configs], jnp.float32),
    )
    state = program.init(knobs)
    lines: list[list[dict[str, Any]]] = [[] for _ in configs]
    late = None
    for step in range(1, common.train.steps + 1):
        state, metrics = program.step(knobs, state, Batch.stack(list(map(next, batches))))
        if late is not None:
            jax.block_until_ready(late)  # As in fit, no more than two steps run.
        late = metrics.loss
        columns = {name: getattr(metrics, name) for name in ("loss", "cross_entropy", "grad_norm")}
        evaluates = step % common.train.eval_every == 0 or step == common.train.steps
        if evaluates:
            columns["validation_loss"] = _evaluated(program, state.params, validation)
        if evaluates or step % common.train.log_every == 0:
            for name, values in jax.device_get(columns).items():
                columns[name] = values.tolist()
            for run, each in enumerate(lines):
                each.append({"step": step} | {name: of[run] for name, of in columns.items()})
    params = jax.device_get(state.params)
    seconds = time.perf_counter() - start
    return [
        Trial(program.model(params, run), each, each[-1]["validation_loss"], seconds)
        for run, each in enumerate(lines)
    ]


class _Program(NamedTuple):
    """Compiled for each shape that it meets; every array has a leading axis of runs."""

    init: Callable[[Knobs], State]
    step: Callable[[Knobs, State, Batch], tuple[State, Metrics]]
    evaluate: Callable[[Any, Batch], LossSums]
    graphdef: nnx.GraphDef

    def model(self, params: Any, run: int) -> Any:
        """One run's."""
        return nnx.merge(self.graphdef, jax.tree.map(lambda leaf: jnp.asarray(leaf[run]), params))


@functools.lru_cache(maxsize=8)
def _program(config: ExperimentConfig, mesh: Mesh) -> _Program:
    """The program of all runs whose configs have this in common."""
    graphdef, _ = split(nnx.eval_shape(lambda: build(config.model, rngs=nnx.Rngs(0))))
    loss, train = training_loss(graphdef, config.train), config.train

    def optimizer(knobs: Knobs) -> optax.GradientTransformation:
        return build_optimizer(config.optimizer, train.steps, knobs.learning_rate)

    def init(knobs: Knobs) -> State:
        # Not compiled as one program, which would take as long as the step's: what draws one
        # matrix serves the next run, and the next variant, whose matrices are of that shape too.
        drawn = [split(build(config.model, rngs=nnx.Rngs(int(seed))))[1] for seed in knobs.seed]
        params = jax.tree.map(lambda *leaves: np.stack(leaves), *drawn)
        state = State(
            jnp.zeros(len(drawn), jnp.int32),
            params,
            jax.vmap(lambda knobs, params: optimizer(knobs).init(params))(knobs, params),
        )
        return jax.device_put(state, NamedSharding(mesh, P(DATA)))

    def step(knobs: Knobs, state: State, batch: Batch) -> tuple[State, Metrics]:
        return train_step(
            state,
            batch,
            loss=loss,
            optimizer=optimizer(knobs),
            seed=knobs.seed,
            accumulate=train.accumulate,
        )

    def evaluate(params: Any, batch: Batch) -> LossSums:
        return loss(params, batch, None)

    def each(function: Callable, **options: Any) -> Callable:
        def over_runs(*arguments: Any) -> Any:
            return jax.lax.map(lambda of_run: function(*of_run), arguments)

        shared = jax.shard_map(
            over_runs, mesh=mesh, in_specs=P(DATA), out_specs=P(DATA), check_vma=False
        )
        return jax.jit(shared, **options)

    return _Program(init, each(step, donate_argnums=1), each(evaluate), graphdef)


def _common(configs: Sequence[ExperimentConfig]) -> ExperimentConfig:
    """What the configs have in common, the knobs at their defaults."""
    default = ExperimentConfig()
    common = {
        dataclasses.replace(
            config,
            data=default.data,
            mesh=default.mesh,
            train=dataclasses.replace(config.train, seed=default.train.seed),
            optimizer=dataclasses.replace(
                config.optimizer, learning_rate=default.optimizer.learning_rate
            ),
        )
        for config in configs
    }
    if len(common) > 1:
        raise InputError(
            "Configs that train together may differ in train.seed and optimizer.learning_rate "
            f"alone: these {len(configs)} differ in more."
        )
    return common.pop()


def _evaluated(program: _Program, params: Any, validation: Sequence[Batches]) -> np.ndarray:
    """[R]: mean cross-entropy over all of each run's batches, nats a token."""
    total, weight = np.zeros(len(validation)), np.zeros(len(validation))
    for number in range(len(validation[0])):
        sums = program.evaluate(params, Batch.stack([each[number] for each in validation]))
        total, weight = total + np.asarray(sums.cross_entropy), weight + np.asarray(sums.weight)
    return total / weight
