"""Ensembles of runs in one program: seeds and learning rates, each trained as if alone.

The runs share nothing but the compilation. They are sharded over the devices, and vectorised by
`jax.vmap` within a device. A CPU core trains one run at a time: batched products of many small
matrices are slower there than one product after another.
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
from jaxtyping import Array, Float, UInt32

from gptjax.config import ExperimentConfig, InputError, MeshConfig, TrainConfig, TransformerConfig
from gptjax.costs.model import model_cost
from gptjax.data.batch import Batch
from gptjax.models.build import LanguageModel, Params
from gptjax.parallel.keys import random_key
from gptjax.parallel.sharding import DATA, build_mesh
from gptjax.runs.assembly import assemble
from gptjax.runs.trial import Trial
from gptjax.system.programs import keep_programs
from gptjax.training.cross_entropy import LossSums
from gptjax.training.dispatch import Pace, logged_steps, several, stack_size
from gptjax.training.loop import SCALARS, Batches
from gptjax.training.step import Metrics, State, compile_for_once, train_step

MOST_PARAMETERS = 500_000
"""The size up to which a CPU trains one run per core; for larger models, all cores on one run are
faster (experiments/README.md)."""
BYTES_PER_PARAMETER = 64
"""Accelerator memory allotted to a run: 16 for its state, the rest for a step's temporaries."""


class Hyperparameters(NamedTuple):
    """What may differ between the R runs of a program."""

    seed: UInt32[Array, " R"]
    """`train.seed`."""
    learning_rate: Float[Array, " R"]
    """`optimizer.learning_rate`."""


def most_at_once(parameters: int) -> int:
    """How many runs of a model of that many parameters to train in parallel here, at least 1."""
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
    """The trial of each of `configs`, as by `trial.train`, from one program that trains them all.

    Where `train` would raise `Diverged`, the run keeps its last finite parameters, its `Trial` has
    the step, and the others continue. Dropout is that of a run on one device. A second call with
    the same shapes, and configs that differ only in seed and learning rate, compiles nothing.

    Args:
      configs: equal but for `train.seed` and `optimizer.learning_rate`; `data`, `mesh` and
        `train.profile` are ignored.
      batches: of each run, all of the same shape.
      validation: of each run, the same number of batches for all.
      at_once: runs trained in parallel, in rounds of that many; 0 takes `most_at_once`.
      mup_base: as in `trial.train`.
      progress: called after each dispatch with the number of steps that the runs made together.

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
    parameters = model_cost(common.model).parameters
    size = min(at_once or most_at_once(parameters), len(configs))
    mesh = build_mesh(MeshConfig(), size)
    keep_programs()
    tokens = common.train.batch_size * common.model.context_length
    platform = mesh.devices.flat[0].platform
    stack = stack_size(common.train, size // mesh.size * parameters, tokens, platform)
    program = _program(common, mup_base, mesh, stack)
    trials = []
    for first in range(0, len(configs), size):
        chosen = [min(first + index, len(configs) - 1) for index in range(size)]
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
    """Train one run per element of `batches`; spare slots of a last round repeat its last run."""
    start = time.perf_counter()
    runs, spare = len(batches), len(configs) - len(batches)
    hyperparameters = Hyperparameters(
        jnp.asarray(np.array([config.train.seed for config in configs], np.uint32)),
        jnp.asarray(np.array([c.optimizer.learning_rate for c in configs], np.float32)),
    )
    state = program.init(hyperparameters)
    lines: list[list[dict[str, Any]]] = [[] for _ in range(runs)]
    diverged = np.zeros(len(configs), int)
    pending = None  # The last step of a group whose metrics are not fetched yet.

    def check(step: int, count: int, metrics: Metrics) -> None:
        # As in fit, at most two groups are in flight.
        finite = np.isfinite(metrics.loss) & np.isfinite(metrics.grad_norm)
        bad = ~finite.reshape(len(configs), -1)[:, :count]
        first = step - count + 1 + bad.argmax(axis=1)
        diverged[:] = np.where(bad.any(axis=1) & (diverged == 0), first, diverged)

    step, pace = 0, Pace(train, program.stack)
    while step < train.steps:
        count = pace.steps(step)
        rows = [program.stacked([next(own) for _ in range(count)]) for own in batches]
        batch = Batch.stack(rows + rows[-1:] * spare)
        part = () if program.stack == 1 else (np.array([0, count], np.int32),)
        state, metrics = program.step(hyperparameters, state, batch, *part)
        step += count
        if pending is not None:
            check(*pending)
        pending = step, count, metrics
        evaluates = step % train.eval_every == 0 or step == train.steps
        logged = logged_steps(train, step, count, evaluated=evaluates)
        if logged:
            columns = {
                name: values.reshape(len(configs), -1)
                for name, values in zip(
                    SCALARS,
                    jax.device_get([getattr(metrics, name) for name in SCALARS]),
                    strict=True,
                )
            }
            for run, own in enumerate(lines):
                for number in logged:
                    index = number - step + count - 1
                    line = {name: float(values[run, index]) for name, values in columns.items()}
                    own.append({"step": number} | line)
        if evaluates:
            losses = _evaluated(program, state.params, validation).tolist()
            for loss, own in zip(losses, lines, strict=False):
                own[-1]["validation_loss"] = loss
        progress(runs * count)
    if pending is not None:
        check(*pending)
    params = jax.device_get(state.params)
    seconds = time.perf_counter() - start
    return [
        Trial(
            program.model(params, run),
            own,
            own[-1]["validation_loss"],
            seconds,
            int(diverged[run]),
        )
        for run, own in enumerate(lines)
    ]


class _Program(NamedTuple):
    """The functions of an ensemble, compiled once per shape; arrays have a leading axis R."""

    init: Callable[[Hyperparameters], State]
    step: Callable[..., tuple[State, Metrics]]
    """(hyperparameters, state, batch), or (…, stacks of batches, part) as of `several`."""
    evaluate: Callable[[Params, Batch], LossSums]
    graphdef: nnx.GraphDef
    stack: int
    """The most steps of a dispatch."""

    def stacked(self, batches: list[Batch]) -> Batch:
        """What a run's next steps take: a batch, or a stack, filled up with its last one."""
        if self.stack == 1:
            return batches[0]
        return Batch.stack(batches + batches[-1:] * (self.stack - len(batches)))

    def model(self, params: Params, run: int) -> LanguageModel:
        """The model of one run."""
        return nnx.merge(self.graphdef, jax.tree.map(lambda leaf: jnp.asarray(leaf[run]), params))


@functools.lru_cache(maxsize=8)
def _program(
    config: ExperimentConfig, mup_base: TransformerConfig | None, mesh: Mesh, stack: int
) -> _Program:
    """The program of all runs whose configs have `config` in common."""
    assembly = assemble(config, mup_base=mup_base)
    config, loss, train = assembly.config, assembly.loss, config.train

    def optimizer(hyperparameters: Hyperparameters) -> optax.GradientTransformation:
        return assembly.optimizer(hyperparameters.learning_rate)

    @functools.cache
    def init_one() -> Callable[[Hyperparameters], State]:
        """The compiled function hyperparameters → the state of one run before its first step."""

        def first(own: Hyperparameters) -> State:
            params = assembly.init(random_key(own.seed))
            return State(jnp.zeros((), jnp.int32), params, optimizer(own).init(params))

        scalars = (jnp.asarray(zero) for zero in (np.uint32(0), np.float32(0)))
        lowered = jax.jit(first).lower(Hyperparameters(*scalars))
        return compile_for_once(lowered, mesh.devices.flat[0].platform)

    def init(hyperparameters: Hyperparameters) -> State:
        each_run = zip(*map(np.asarray, hyperparameters), strict=True)
        initial = [jax.device_get(init_one()(Hyperparameters(*own))) for own in each_run]
        state = jax.tree.map(lambda *leaves: np.stack(leaves), *initial)
        return jax.device_put(state, NamedSharding(mesh, P(DATA)))

    def step(
        hyperparameters: Hyperparameters, state: State, batch: Batch, *part: Any
    ) -> tuple[State, Metrics]:
        one = functools.partial(
            train_step,
            loss=loss,
            optimizer=optimizer(hyperparameters),
            seed=hyperparameters.seed,
            grad_accumulation=train.grad_accumulation,
        )
        return several(one)(state, batch, *part) if part else one(state, batch)

    def evaluate(params: Params, batch: Batch) -> LossSums:
        return loss(params, batch, None)

    def each(function: Callable, own: int, shared: int = 0, **options: Any) -> Callable:
        def over_runs(*arguments: Any) -> Any:
            of_runs, common = arguments[:own], arguments[own:]
            if len(jax.tree.leaves(of_runs)[0]) > 1:
                return jax.vmap(lambda *of_run: function(*of_run, *common))(*of_runs)
            # A single run loses its axis, with which XLA would not use its fast matmuls.
            only = function(*jax.tree.map(lambda leaf: leaf[0], of_runs), *common)
            return jax.tree.map(lambda leaf: leaf[None], only)

        specs = (P(DATA),) * own + (P(),) * shared
        mapped = jax.shard_map(
            over_runs, mesh=mesh, in_specs=specs, out_specs=P(DATA), check_vma=False
        )
        return jax.jit(mapped, **options)

    steps = each(step, 3, int(stack > 1), donate_argnums=1)
    return _Program(init, steps, each(evaluate, 2), assembly.graphdef, stack)


def _common(configs: Sequence[ExperimentConfig]) -> ExperimentConfig:
    """What the configs have in common, with default seed and learning rate."""
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
            "Configs that train together may differ only in train.seed and "
            f"optimizer.learning_rate: these {len(configs)} differ in more."
        )
    return common.pop()


def _evaluated(
    program: _Program, params: Params, validation: Sequence[Batches]
) -> Float[np.ndarray, " R"]:
    """Mean cross-entropy over all of each run's batches, nats per token."""
    total, weight = np.zeros(len(validation)), np.zeros(len(validation))
    pending = None  # As in training, fetched while the next batch runs.
    for number in range(len(validation[0]) + 1):
        sums = None
        if number < len(validation[0]):
            # Runs may share a validation, whose batches are made when they are indexed.
            made = {id(each): each[number] for each in validation}
            sums = program.evaluate(params, Batch.stack([made[id(each)] for each in validation]))
        if pending is not None:
            total = total + np.asarray(pending.cross_entropy)
            weight = weight + np.asarray(pending.weight)
        pending = sums
    return total / weight
