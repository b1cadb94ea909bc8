"""The training and evaluation steps: pure functions of state and batch, compiled for a mesh."""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptjax.config import InputError
from gptjax.data.batch import Batch
from gptjax.parallel.keys import random_key
from gptjax.parallel.platforms import by_platform
from gptjax.parallel.sharding import DATA, batch_sharding, parameter_sharding, partitioned
from gptjax.training.cross_entropy import LossSums
from gptjax.training.dispatch import several
from gptjax.training.loss_scale import after_skipped_step, loss_scale, overflowed
from gptjax.training.losses import LossFunction, Params


class State(NamedTuple):
    """The training state; a checkpoint holds it and the data iterator's state."""

    step: Int[Array, ""]
    """Steps done, int32."""
    params: Params
    """Nested dict of float32 arrays."""
    optimizer: optax.OptState
    """The optimizer's state."""


class Metrics(NamedTuple):
    """The metrics of a training step."""

    loss: Float[Array, ""]
    """Mean of the training objective, nats per token."""
    cross_entropy: Float[Array, ""]
    """Mean cross-entropy, nats per token."""
    grad_norm: Float[Array, ""]
    """Global norm of the gradient before clipping; 0 of a step that float16's scale skipped."""
    leaf_norms: Params
    """The norm of each leaf's gradient, in the tree of the parameters, to find the source of a
    NaN."""


TrainStep = Callable[[State, Batch], tuple[State, Metrics]]
EvalStep = Callable[[Params, Batch], LossSums]


def init_state(
    init: Callable[[], Params],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    axes: Params | None = None,
) -> State:
    """The state before the first step, each device initialising its own shard of it.

    Args:
      init: makes the parameters.
      optimizer: makes its state from them.
      mesh: the devices.
      axes: the letters of each parameter's axes, in the tree of the parameters; None
        replicates the state on every device.

    Raises:
      InputError: a parameter that the mesh cannot shard.
    """
    lowered = lower_first_state(init, optimizer, mesh, axes)
    return compile_for_once(lowered, mesh.devices.flat[0].platform)()


def lower_first_state(
    init: Callable[[], Params],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    axes: Params | None = None,
) -> jax.stages.Lowered:
    """The program of `init_state`, lowered."""
    shapes = state_shapes(init, optimizer, mesh, axes)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    first = functools.partial(_first_state, init, optimizer)
    return jax.jit(first, out_shardings=shardings).lower()


def compile_for_once(lowered: jax.stages.Lowered, platform: str) -> jax.stages.Compiled:
    """Compile a program that runs once: less optimised on a CPU, and 2 to 5 times as fast."""
    return lowered.compile({"xla_backend_optimization_level": "1"} if platform == "cpu" else {})


def state_shapes(
    init: Callable[[], Params],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    axes: Params | None = None,
) -> State:
    """The shapes, dtypes and shardings of what `init_state` returns."""
    shapes = jax.eval_shape(functools.partial(_first_state, init, optimizer))
    letters_of = {}
    if axes is not None:
        for path, letters in jax.tree_util.tree_leaves_with_path(axes):
            letters_of[path] = letters

    def sharded(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # The path of a moment in the optimizer's state ends with the path of its parameter.
        suffixes = (path[start:] for start in range(len(path)))
        own = next((suffix for suffix in suffixes if suffix in letters_of), None)
        sharding = NamedSharding(mesh, P())
        if own is not None and len(letters_of[own]) == leaf.ndim:
            name = jax.tree_util.keystr(own, simple=True, separator=".")
            sharding = parameter_sharding(name, letters_of[own], leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(sharded, shapes)


def _first_state(init: Callable[[], Params], optimizer: optax.GradientTransformation) -> State:
    params = init()
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    state: State,
    batch: Batch,
    *,
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    seed: int | Int[Array, ""] = 0,
    grad_accumulation: int = 1,
    axis: str | None = None,
) -> tuple[State, Metrics]:
    """One optimizer step: (state, batch) → (state, metrics).

    The dropout key is a function of `seed` and the step. With `axis`, the batch is one device's
    shard, and sums are taken over that mesh axis. The loss sums and gradients of the
    `grad_accumulation` microbatches are added before the division by their weight, so that they
    equal those of the whole batch. A step whose loss or gradient is not finite updates no
    parameter: the loop stops there, with the state that led to it. In float16 a gradient that is
    not finite may be that of a scale too large (`gptjax.training.loss_scale`): then the next step's
    is halved, and the norms are 0.
    """
    sums, gradients = mean_gradient(state, batch, loss, seed, grad_accumulation, axis)
    return _updated(state, sums, gradients, optimizer)


def mean_gradient(
    state: State,
    batch: Batch,
    loss: LossFunction,
    seed: int | Int[Array, ""],
    grad_accumulation: int,
    axis: str | None,
) -> tuple[LossSums, Params]:
    """The loss sums of a batch, and the gradient of its mean loss; arguments as of `train_step`."""
    key = jax.random.fold_in(random_key(seed), state.step)
    if axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    scale = loss_scale(state.optimizer)
    local = _summed_gradients(state.params, batch, key, loss, grad_accumulation, scale)
    sums, gradients = sum_over_devices(local, axis)
    divisor = sums.weight if scale is None else sums.weight * scale
    with jax.named_scope("optimizer"):
        return sums, jax.tree.map(lambda gradient: gradient / divisor, gradients)


@jax.named_scope("optimizer")
def _updated(
    state: State, sums: LossSums, gradients: Params, optimizer: optax.GradientTransformation
) -> tuple[State, Metrics]:
    """The state after the update by the mean gradient, and the metrics of the step."""
    leaf_norms = jax.tree.map(lambda leaf: jnp.sqrt(jnp.square(leaf).sum()), gradients)
    metrics = Metrics(
        loss=sums.loss / sums.weight,
        cross_entropy=sums.cross_entropy / sums.weight,
        grad_norm=optax.tree.norm(leaf_norms),
        leaf_norms=leaf_norms,
    )
    finite = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.grad_norm)

    def update(params: Params, optimizer_state: optax.OptState) -> tuple[Any, Any]:
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state

    def keep(params: Params, optimizer_state: optax.OptState) -> tuple[Any, Any]:
        return params, after_skipped_step(optimizer_state)

    def keep_or_update(*state: Any) -> tuple[Any, Any]:
        return jax.lax.cond(finite, update, keep, *state)

    def update_and_select(*state: Any) -> tuple[Any, Any]:
        return jax.tree.map(functools.partial(jnp.where, finite), update(*state), keep(*state))

    # On a CPU XLA copies every moment for a select, on a GPU for a condition.
    params, optimizer_state = by_platform(
        state.params, state.optimizer, gpu=update_and_select, other=keep_or_update
    )
    if loss_scale(state.optimizer) is not None:
        skipped = overflowed(state.optimizer, metrics.loss, metrics.grad_norm)
        norms = jax.tree.map(lambda norm: jnp.where(skipped, 0, norm), tuple(metrics[2:]))
        metrics = metrics._replace(grad_norm=norms[0], leaf_norms=norms[1])
    return State(state.step + 1, params, optimizer_state), metrics


def _summed_gradients(
    params: Params,
    batch: Batch,
    key: jax.Array,
    loss: LossFunction,
    grad_accumulation: int,
    scale: Float[Array, ""] | None,
) -> tuple[LossSums, Params]:
    """Loss sums and the gradient of the summed loss, scaled, over the microbatches of a batch."""

    def gradients_of(microbatch: Batch, key: jax.Array) -> tuple[LossSums, Params]:
        def summed(params: Params) -> tuple[jax.Array, LossSums]:
            sums = loss(params, microbatch, key)
            return sums.loss if scale is None else sums.loss * scale, sums

        (_, sums), gradients = jax.value_and_grad(summed, has_aux=True)(params)
        return sums, gradients

    if grad_accumulation == 1:
        return gradients_of(batch, key)

    def accumulate(total, indexed):
        index, microbatch = indexed
        gradients = gradients_of(microbatch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, gradients), None

    def split(array: jax.Array) -> jax.Array:
        # Every microbatch has rows of every device.
        return array.reshape(-1, grad_accumulation, *array.shape[1:]).swapaxes(0, 1)

    microbatches = jax.tree.map(split, batch)
    zero = jax.tree.map(jnp.zeros_like, params)
    start = LossSums(jnp.float32(0), jnp.float32(0), jnp.float32(0)), zero
    return jax.lax.scan(accumulate, start, (jnp.arange(grad_accumulation), microbatches))[0]


def sum_over_devices(tree: Any, axis: str | None) -> Any:
    """Each leaf summed over the devices of a mesh axis, by a single all-reduce.

    A single one, because XLA's CPU devices share a pool of as many threads, and each collective
    holds a thread until every device has joined it: several at a time can leave none for the last
    device, a deadlock. For the same reason at most two steps may be in flight: fetch the metrics of
    one before starting the one after next.
    """
    if axis is None:
        return tree
    flat, unravel = jax.flatten_util.ravel_pytree(tree)
    return unravel(jax.lax.psum(flat, axis))


def lower_train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    state: State,
    batch: Batch,
    mesh: Mesh,
    *,
    seed: int = 0,
    grad_accumulation: int = 1,
    pmap: bool = False,
    stacked: bool = False,
) -> jax.stages.Lowered:
    """`train_step` for `state` and `batch` (arrays or their shapes); the state is donated.

    With `stacked`, `batch` is a stack of batches and the program is `dispatch.several` of the step.

    With data parallelism alone, each device holds the whole state and its shard of the batch; with
    more mesh axes the compiler partitions the program, by the constraints of
    `gptjax.parallel.sharding`.
    """
    step = functools.partial(
        train_step, loss=loss, optimizer=optimizer, seed=seed, grad_accumulation=grad_accumulation
    )
    part = (jax.ShapeDtypeStruct((2,), jnp.int32),) if stacked else ()
    if partitioned(mesh):
        step = several(step) if stacked else step
        outputs = jax.tree.map(lambda leaf: leaf.sharding, state), None
        return _lower_partitioned(
            step, mesh, state, batch, *part, out_shardings=outputs, donate_argnums=0
        )
    step = functools.partial(step, axis=_axis(mesh))
    if pmap:
        return _lower_pmap(step, mesh, state, batch)
    step = several(step) if stacked else step
    return _lower_data_parallel(step, mesh, state, batch, *part, donate_argnums=0)


def compile_train_step(*arguments: Any, **options: Any) -> TrainStep:
    """The program of `lower_train_step`, compiled."""
    return lower_train_step(*arguments, **options).compile()


def lower_eval_step(
    loss: LossFunction, params: Params, batch: Batch, mesh: Mesh
) -> jax.stages.Lowered:
    """The evaluation step: (params, batch) → loss sums, without dropout."""

    def step(params: Params, batch: Batch, axis: str | None = None) -> LossSums:
        return sum_over_devices(loss(params, batch, None), axis)

    return lower(step, mesh, params, batch)


def lower(
    step: Callable[..., Any], mesh: Mesh, sharded: Any, batch: Batch, *part: Any
) -> jax.stages.Lowered:
    """`step(sharded, batch, *part, axis=…)`, which donates nothing, lowered for a mesh.

    With `part`, `batch` is a stack. The axis is the one to sum over, None if the compiler does.
    """
    if partitioned(mesh):
        # Whole on every device: a process can only fetch what it holds.
        return _lower_partitioned(
            step, mesh, sharded, batch, *part, out_shardings=NamedSharding(mesh, P())
        )
    step = functools.partial(step, axis=_axis(mesh))
    return _lower_data_parallel(step, mesh, sharded, batch, *part)


class CompiledByShape:
    """A step that is compiled once for each shape of batch, in a thread of its own."""

    def __init__(self, lower: Callable[..., jax.stages.Lowered]):
        """Take `lower(state, batch)`, which returns the lowered step."""
        self._lower = lower
        self._compiled: dict[Any, Future[jax.stages.Compiled]] = {}
        self._thread = ThreadPoolExecutor(1)

    def prepare(self, state: Any, batch: Batch) -> "Future[jax.stages.Compiled]":
        """Start compiling the step for batches of that shape; `state` is its first argument."""
        shapes = tuple(None if array is None else array.shape for array in batch)
        if shapes not in self._compiled:
            self._compiled[shapes] = self._thread.submit(self._lower(state, batch).compile)
        return self._compiled[shapes]

    def __call__(self, state: Any, batch: Batch, *part: Any) -> Any:
        """Run the step, compiled if its shape is new."""
        return self.prepare(state, batch).result()(state, batch, *part)


def _axis(mesh: Mesh) -> str | None:
    """The mesh axis to sum over; None on a single device, where the sum would only copy."""
    return DATA if mesh.size > 1 else None


def _lower_data_parallel(
    step: Callable, mesh: Mesh, replicated: Any, batch: Batch, *part: Any, **options: Any
) -> jax.stages.Lowered:
    """`step(replicated, batch)` by shard_map, each device with its shard of `batch`.

    With `part`, `batch` is a stack.
    """
    specs = (P(), P(None, DATA), P()) if part else (P(), P(DATA))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    return jax.jit(mapped, in_shardings=shardings, **options).lower(replicated, batch, *part)


def _lower_pmap(step: Callable, mesh: Mesh, replicated: Any, batch: Batch) -> jax.stages.Lowered:
    """The same by `jax.pmap`, which maps over a leading axis of devices.

    Raises:
      InputError: several processes, each of which would map over its own devices alone.
    """
    if jax.process_count() > 1:
        raise InputError(
            f"MeshConfig.pmap is True: it must be False in a run of {jax.process_count()} "
            "processes, over whose devices only jit runs one program."
        )
    count = mesh.size
    mapped = jax.pmap(
        step, axis_name=DATA, in_axes=(None, 0), out_axes=None, devices=list(mesh.devices.flat)
    )

    def on_rows(replicated: Any, batch: Batch) -> Any:
        return mapped(replicated, jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), batch))

    return jax.jit(on_rows, donate_argnums=0).lower(replicated, batch)


def _lower_partitioned(
    step: Callable, mesh: Mesh, sharded: Any, batch: Batch, *part: Any, **options: Any
) -> jax.stages.Lowered:
    """`step(sharded, batch)` as one program that the compiler partitions.

    With `part`, `batch` is a stack.
    """
    batches = jax.tree.map(
        lambda array: batch_sharding(mesh, array.shape, stacked=bool(part)), batch
    )
    shardings = (
        jax.tree.map(lambda leaf: leaf.sharding, sharded),
        batches,
        *(NamedSharding(mesh, P()) for _ in part),
    )
    with jax.set_mesh(mesh):
        return jax.jit(step, in_shardings=shardings, **options).lower(sharded, batch, *part)
