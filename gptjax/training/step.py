"""The step: pure functions of state and batch, compiled with the state donated."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import InputError
from gptjax.data.batch import Batch
from gptjax.parallel.keys import random_key
from gptjax.parallel.sharding import DATA, batch_sharding, parameter_sharding, partitioned
from gptjax.training.cross_entropy import LossSums
from gptjax.training.losses import LossFunction


class State(NamedTuple):
    """All that training changes; a checkpoint holds this and the data's position."""

    step: jax.Array
    """Steps done, int32."""
    params: Any
    """Nested dict of float32 arrays."""
    optimizer: Any
    """Optax's state."""


class Metrics(NamedTuple):
    """What a step says of itself."""

    loss: jax.Array
    """Mean of what is minimised, nats per token."""
    cross_entropy: jax.Array
    """Mean cross-entropy, nats per token."""
    grad_norm: jax.Array
    """Global norm of the gradient before clipping."""
    leaf_norms: Any
    """The same a leaf: the tree of the parameters, to name a suspect when the loss is NaN."""


TrainStep = Callable[[State, Batch], tuple[State, Metrics]]
EvalStep = Callable[[Any, Batch], LossSums]


def init_state(
    init: Callable[[], Any], optimizer: optax.GradientTransformation, mesh: Mesh, axes: Any = None
) -> State:
    """The state before the first step, each device making its own part of it.

    Args:
      init: makes the parameters.
      optimizer: makes its state of them.
      mesh: the devices.
      axes: the letters of each parameter's axes, in the tree of the parameters; None gives every
        device all of the state.

    Raises:
      InputError: a parameter that the mesh cannot part.
    """
    lowered = lower_first_state(init, optimizer, mesh, axes)
    return compile_for_once(lowered, mesh.devices.flat[0].platform)()


def lower_first_state(
    init: Callable[[], Any], optimizer: optax.GradientTransformation, mesh: Mesh, axes: Any = None
) -> jax.stages.Lowered:
    """What `init_state` compiles."""
    shapes = state_shapes(init, optimizer, mesh, axes)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    first = functools.partial(_first_state, init, optimizer)
    return jax.jit(first, out_shardings=shardings).lower()


def compile_for_once(lowered: jax.stages.Lowered, platform: str) -> jax.stages.Compiled:
    """A program that runs once: on a CPU full effort takes 2 to 5 times as long to compile."""
    return lowered.compile({"xla_backend_optimization_level": "1"} if platform == "cpu" else {})


def state_shapes(
    init: Callable[[], Any], optimizer: optax.GradientTransformation, mesh: Mesh, axes: Any = None
) -> State:
    """What `init_state` would make: shapes, dtypes, and who holds which part."""
    shapes = jax.eval_shape(functools.partial(_first_state, init, optimizer))
    parts = {}
    if axes is not None:
        for path, letters in jax.tree_util.tree_leaves_with_path(axes):
            parts[path] = letters

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A moment stands in the optimizer's state under the path of its parameter.
        ends = (path[start:] for start in range(len(path)))
        own = next((end for end in ends if end in parts), None)
        sharding = NamedSharding(mesh, P())
        if own is not None and len(parts[own]) == leaf.ndim:
            name = jax.tree_util.keystr(own, simple=True, separator=".")
            sharding = parameter_sharding(name, parts[own], leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(placed, shapes)


def _first_state(init: Callable[[], Any], optimizer: optax.GradientTransformation) -> State:
    params = init()
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    state: State,
    batch: Batch,
    *,
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    seed: int | jax.Array = 0,
    grad_accumulation: int = 1,
    axis: str | None = None,
) -> tuple[State, Metrics]:
    """One optimizer step; its dropout key follows from `seed` and the step's number.

    With `axis`, the batch is one device's share, and sums are taken over that mesh axis.

    The batch is computed in `accumulate` parts whose sums are added before the division by their
    weight, so that the parts give the gradient of the whole. A step whose loss or gradient is not
    finite changes no parameter: the loop stops there with the state that led to it.
    """
    key = jax.random.fold_in(random_key(seed), state.step)
    if axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    local = _summed_gradients(state.params, batch, key, loss, grad_accumulation)
    sums, gradients = sum_over_devices(local, axis)
    gradients = jax.tree.map(lambda gradient: gradient / sums.weight, gradients)

    leaf_norms = jax.tree.map(lambda leaf: jnp.sqrt(jnp.square(leaf).sum()), gradients)
    metrics = Metrics(
        loss=sums.loss / sums.weight,
        cross_entropy=sums.cross_entropy / sums.weight,
        grad_norm=optax.tree.norm(leaf_norms),
        leaf_norms=leaf_norms,
    )
    finite = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.grad_norm)

    def update(params: Any, optimizer_state: Any) -> tuple[Any, Any]:
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state

    # A condition, not a select a leaf, which costs XLA a copy of every moment on a CPU.
    params, optimizer_state = jax.lax.cond(
        finite, update, lambda *unchanged: unchanged, state.params, state.optimizer
    )
    return State(state.step + 1, params, optimizer_state), metrics


def _summed_gradients(params, batch, key, loss, grad_accumulation) -> tuple[LossSums, Any]:
    """Loss sums and the gradient of the summed loss over the parts of a batch."""

    def part_gradients(part: Batch, key: jax.Array) -> tuple[LossSums, Any]:
        def summed(params: Any) -> tuple[jax.Array, LossSums]:
            sums = loss(params, part, key)
            return sums.loss, sums

        (_, sums), gradients = jax.value_and_grad(summed, has_aux=True)(params)
        return sums, gradients

    if grad_accumulation == 1:
        return part_gradients(batch, key)

    def add_part(total, part):
        index, tokens = part
        gradients = part_gradients(tokens, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, gradients), None

    def parted(array: jax.Array) -> jax.Array:
        # Every part has rows of every device.
        return array.reshape(-1, grad_accumulation, *array.shape[1:]).swapaxes(0, 1)

    parts = jax.tree.map(parted, batch)
    zero = jax.tree.map(jnp.zeros_like, params)
    start = LossSums(jnp.float32(0), jnp.float32(0), jnp.float32(0)), zero
    return jax.lax.scan(add_part, start, (jnp.arange(grad_accumulation), parts))[0]


def sum_over_devices(tree: Any, axis: str | None) -> Any:
    """Each leaf summed over the devices of a mesh axis, all in one collective operation.

    One, because XLA's CPU devices share a pool of as many threads, and each collective holds a
    thread until every device has joined it: several at a time can leave none for the device that
    is waited for, and the program then stands still. For the same reason at most two steps may be
    in flight: fetch the metrics of one before starting the one after next.
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
) -> jax.stages.Lowered:
    """`train_step` for `state` and `batch` (arrays or their shapes); the state is donated.

    Where rows alone are split, each device holds the state and takes its share of the batch; with
    more axes the compiler parts the one program, by the constraints of `gptjax.parallel.sharding`.
    """
    step = functools.partial(
        train_step, loss=loss, optimizer=optimizer, seed=seed, grad_accumulation=grad_accumulation
    )
    if partitioned(mesh):
        kept = jax.tree.map(lambda leaf: leaf.sharding, state), None
        return _lower_partitioned(step, mesh, state, batch, out_shardings=kept, donate_argnums=0)
    step = functools.partial(step, axis=_axis(mesh))
    if pmap:
        return _lower_pmap(step, mesh, state, batch)
    return _lower_on_shares(step, mesh, state, batch, donate_argnums=0)


def compile_train_step(*arguments: Any, **options: Any) -> TrainStep:
    """What `lower_train_step` gives, compiled."""
    return lower_train_step(*arguments, **options).compile()


def compile_eval_step(loss: LossFunction, params: Any, batch: Batch, mesh: Mesh) -> EvalStep:
    """(params, batch) → loss sums, without dropout."""

    def step(params: Any, batch: Batch, axis: str | None = None) -> LossSums:
        return sum_over_devices(loss(params, batch, None), axis)

    if partitioned(mesh):
        return _lower_partitioned(step, mesh, params, batch).compile()
    step = functools.partial(step, axis=_axis(mesh))
    return _lower_on_shares(step, mesh, params, batch).compile()


class CompiledByShape:
    """A step that is compiled anew for each shape of batch that it meets, and kept."""

    def __init__(self, compile: Callable[..., Callable]):
        """Take `compile(whole, batch)`, which gives the compiled step."""
        self._compile = compile
        self._compiled: dict[Any, Callable] = {}

    def prepare(self, whole: Any, batch: Batch) -> Callable:
        """The step for batches of that shape."""
        shapes = tuple(None if array is None else array.shape for array in batch)
        if shapes not in self._compiled:
            self._compiled[shapes] = self._compile(whole, batch)
        return self._compiled[shapes]

    def __call__(self, whole: Any, batch: Batch) -> Any:
        """Run it."""
        return self.prepare(whole, batch)(whole, batch)


def _axis(mesh: Mesh) -> str | None:
    """The axis to sum over; None on a single device, where the sum would only copy."""
    return DATA if mesh.size > 1 else None


def _lower_on_shares(
    step: Callable, mesh: Mesh, whole: Any, batch: Batch, **options: Any
) -> jax.stages.Lowered:
    """`step(whole, batch)`, each device of `mesh` with all of `whole` and its share of `batch`."""
    shared = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P(), check_vma=False)
    shardings = NamedSharding(mesh, P()), NamedSharding(mesh, P(DATA))
    return jax.jit(shared, in_shardings=shardings, **options).lower(whole, batch)


def _lower_pmap(step: Callable, mesh: Mesh, whole: Any, batch: Batch) -> jax.stages.Lowered:
    """The same by `jax.pmap`, which maps over a leading axis of devices.

    Raises:
      InputError: several processes, of which each would map over its own devices alone.
    """
    if jax.process_count() > 1:
        raise InputError(
            f"MeshConfig.pmap is True: it must be False in a run of {jax.process_count()} "
            "processes, whose devices jit takes together."
        )
    count = mesh.size
    mapped = jax.pmap(
        step, axis_name=DATA, in_axes=(None, 0), out_axes=None, devices=list(mesh.devices.flat)
    )

    def on_rows(whole: Any, batch: Batch) -> Any:
        return mapped(whole, jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), batch))

    return jax.jit(on_rows, donate_argnums=0).lower(whole, batch)


def _lower_partitioned(
    step: Callable, mesh: Mesh, whole: Any, batch: Batch, **options: Any
) -> jax.stages.Lowered:
    """`step(whole, batch)` as one program, parted by the compiler."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, whole)
    batches = jax.tree.map(lambda array: batch_sharding(mesh, array.shape), batch)
    with jax.set_mesh(mesh):
        return jax.jit(step, in_shardings=(shardings, batches), **options).lower(whole, batch)
