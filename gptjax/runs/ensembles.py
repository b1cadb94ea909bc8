"""Several runs in one program: seeds and learning rates side by side, each as if it ran alone.

The runs share nothing but the compilation. They are parted over the devices, and those of one
device are one by `jax.vmap`. A CPU's core takes one run at a time, and the next when that has
ended: many small matrices in one product are slower there than one after another.
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

from gptjax.config import ExperimentConfig, InputError, MeshConfig, TrainConfig, TransformerConfig
from gptjax.costs.model import model_cost
from gptjax.data.batch import Batch
from gptjax.parallel.keys import random_key
from gptjax.parallel.sharding import DATA, build_mesh
from gptjax.runs.assembly import assemble
from gptjax.runs.trial import Trial
from gptjax.training.cross_entropy import LossSums
from gptjax.training.loop import Batches
from gptjax.training.step import Metrics, State, compile_for_once, train_step

MOST_PARAMETERS = 500_000
"""Of models that are trained side by side on a CPU's cores; all cores on one run of a larger one
are faster (experiments/README.md)."""
BYTES_PER_PARAMETER = 64
"""That a run may take of an accelerator: 16 are its state, the rest is for what a step computes."""


class Knobs(NamedTuple):
    """What may differ between runs of one program; here and below R counts the runs."""

    seed: jax.Array
    """[R], uint32: `train.seed`."""
    learning_rate: jax.Array
    """[R], float32: `optimizer.learning_rate`."""


def most_at_once(parameters: int) -> int:
    """How many runs of a model of so many parameters to train side by side here; 1 is alone."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return len(devices) if parameters <= MOST_PARAMETERS else 1
    memory = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    return len(devices) * int(memory // (BYTES_PER_PARAMETER * parameters)) or 1


def train_ensemble(
    configs: Sequence[ExperimentConfig],
    batches: Sequence[grain.DatasetIterator],
    validation: Sequence[Batches],
    *,
    at_once: int = 0,
    mup_base: TransformerConfig | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> list[Trial]:
    """What `trial.train` gives for each of `configs`, from one program that trains them all.

    Where `train` would raise `Diverged`, the run keeps the parameters that it had, its `Trial`
    says at which step, and the others go on. With dropout, a run draws what it would draw on one
    device. A second call with the same shapes, and configs that differ in no more than these may,
    compiles nothing.

    Args:
      configs: alike in all but `train.seed` and `optimizer.learning_rate`; `data` and `mesh` are
        not asked.
      batches: of each run, all of the same shape.
      validation: of each run, the same number of batches for all.
      at_once: runs side by side, in rounds of so many; 0 takes `most_at_once`.
      mup_base: as of `trial.train`.
      progress: told after each step how many runs made one.

    Raises:
      InputError: configs that differ in more, not as many batches as configs, or a base that
        `trial.train` refuses.
    """
    counts = [len(configs), len(batches), len(validation)]
    if not configs or len(set(counts)) > 1 or len({len(each) for each in validation}) > 1:
        raise InputError(
            f"There are {counts[0]} configs, {counts[1]} iterators of batches and validations of "
            f"{[len(each) for each in validation]} batches: each config needs one of both, and "
            "all validations the same number of batches."
        )
    common = _common(configs)
    at_once = at_once or most_at_once(model_cost(common.model).parameters)
    size = min(at_once, len(configs))
    program = _program(common, mup_base, build_mesh(MeshConfig(), size))
    trials = []
    for first in range(0, len(configs), size):
        chosen = [min(first + place, len(configs) - 1) for place in range(size)]
        trained = _train_round(
            program,
            common.train,
            [configs[run] for run in chosen],
            [batches[run] for run in sorted(set(chosen))],
            [validation[run] for run in chosen],
            progress,
        )
        trials += trained
    return trials


def _train_round(
    program: "_Program",
    train: TrainConfig,
    configs: Sequence[ExperimentConfig],
    batches: Sequence[grain.DatasetIterator],
    validation: Sequence[Batches],
    progress: Callable[[int], None],
) -> list[Trial]:
    """As many runs as there are `batches`; what a last round has more repeats its last run."""
    start = time.perf_counter()
    runs, spare = len(batches), len(configs) - len(batches)
    knobs = Knobs(
        jnp.array([config.train.seed for config in configs], jnp.uint32),
        jnp.array([config.optimizer.learning_rate for config in configs], jnp.float32),
    )
    state = program.init(knobs)
    lines: list[list[dict[str, Any]]] = [[] for _ in range(runs)]
    diverged = np.zeros(len(configs), int)
    late = None

    def check(step: int, metrics: Metrics) -> None:
        # As in fit, no more than two steps run.
        finite = np.isfinite(metrics.loss) & np.isfinite(metrics.grad_norm)
        diverged[~finite & (diverged == 0)] = step

    for step in range(1, train.steps + 1):
        rows = list(map(next, batches))
        state, metrics = program.step(knobs, state, Batch.stack(rows + rows[-1:] * spare))
        if late is not None:
            check(*late)
        late = step, metrics
        columns = {name: getattr(metrics, name) for name in ("loss", "cross_entropy", "grad_norm")}
        evaluates = step % train.eval_every == 0 or step == train.steps
        if evaluates:
            columns["validation_loss"] = _evaluated(program, state.params, validation)
        if evaluates or step % train.log_every == 0:
            for name, values in jax.device_get(columns).items():
                columns[name] = values.tolist()
            for run, each in enumerate(lines):
                each.append({"step": step} | {name: of[run] for name, of in columns.items()})
        progress(runs)
    if late is not None:
        check(*late)
    params = jax.device_get(state.params)
    seconds = time.perf_counter() - start
    return [
        Trial(
            program.model(params, run),
            each,
            each[-1]["validation_loss"],
            seconds,
            int(diverged[run]),
        )
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
def _program(config: ExperimentConfig, mup_base: TransformerConfig | None, mesh: Mesh) -> _Program:
    """The program of all runs whose configs have this in common."""
    assembly = assemble(config, mup_base=mup_base)
    config, loss, train = assembly.config, assembly.loss, config.train

    def optimizer(knobs: Knobs) -> optax.GradientTransformation:
        return assembly.optimizer(knobs.learning_rate)

    @functools.cache
    def draw() -> Callable[[jax.Array], Any]:
        """Key → one run's parameters."""
        lowered = jax.jit(assembly.init).lower(random_key(0))
        return compile_for_once(lowered, mesh.devices.flat[0].platform)

    def init(knobs: Knobs) -> State:
        drawn = [jax.device_get(draw()(random_key(int(seed)))) for seed in knobs.seed]
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
            grad_accumulation=train.grad_accumulation,
        )

    def evaluate(params: Any, batch: Batch) -> LossSums:
        return loss(params, batch, None)

    def each(function: Callable, **options: Any) -> Callable:
        def over_runs(*arguments: Any) -> Any:
            if len(jax.tree.leaves(arguments)[0]) > 1:
                return jax.vmap(function)(*arguments)
            # Of a single run no axis stays, behind which XLA would find its fast products no more.
            only = function(*jax.tree.map(lambda leaf: leaf[0], arguments))
            return jax.tree.map(lambda leaf: leaf[None], only)

        shared = jax.shard_map(
            over_runs, mesh=mesh, in_specs=P(DATA), out_specs=P(DATA), check_vma=False
        )
        return jax.jit(shared, **options)

    return _Program(init, each(step, donate_argnums=1), each(evaluate), assembly.graphdef)


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
    """[R]: mean cross-entropy over all of each run's batches, nats per token."""
    total, weight = np.zeros(len(validation)), np.zeros(len(validation))
    for number in range(len(validation[0])):
        sums = program.evaluate(params, Batch.stack([each[number] for each in validation]))
        total, weight = total + np.asarray(sums.cross_entropy), weight + np.asarray(sums.weight)
    return total / weight
