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

from gptjax.data.batch import Batch
from gptjax.sharding import DATA
from gptjax.training.losses import LossFunction, LossSums


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
    """Mean of what is minimised, nats a token."""
    cross_entropy: jax.Array
    """Mean cross-entropy, nats a token."""
    grad_norm: jax.Array
    """Global norm of the gradient before clipping."""
    leaf_norms: Any
    """The same a leaf: the tree of the parameters, to name a suspect when the loss is NaN."""


TrainStep = Callable[[State, Batch], tuple[State, Metrics]]
EvalStep = Callable[[Any, Batch], LossSums]


def init_state(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state before the first step, on every device of `mesh`."""
    state = State(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    return jax.device_put(state, NamedSharding(mesh, P()))


def train_step(
    state: State,
    batch: Batch,
    *,
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    seed: int = 0,
    accumulate: int = 1,
    axis: str | None = None,
) -> tuple[State, Metrics]:
    """One optimizer step; its dropout key follows from `seed` and the step's number.

    With `axis`, the batch is one device's share, and sums are taken over that mesh axis.

    The batch is computed in `accumulate` parts whose sums are added before the division by their
    weight, so that the parts give the gradient of the whole. A step whose loss or gradient is not
    finite changes no parameter: the loop stops there with the state that led to it.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    if axis is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    local = _summed_gradients(state.params, batch, key, loss, accumulate)
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


def _summed_gradients(params, batch, key, loss, accumulate) -> tuple[LossSums, Any]:
    """Loss sums and the gradient of the summed loss over the parts of a batch."""

    def part_gradients(part: Batch, key: jax.Array) -> tuple[LossSums, Any]:
        def summed(params: Any) -> tuple[jax.Array, LossSums]:
            sums = loss(params, part, key)
            return sums.loss, sums

        (_, sums), gradients = jax.value_and_grad(summed, has_aux=True)(params)
        return sums, gradients

    if accumulate == 1:
        return part_gradients(batch, key)

    def add_part(total, part):
        index, tokens = part
        gradients = part_gradients(tokens, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, gradients), None

    parts = jax.tree.map(lambda array: array.reshape(accumulate, -1, *array.shape[1:]), batch)
    zero = jax.tree.map(jnp.zeros_like, params)
    start = LossSums(jnp.zeros(()), jnp.zeros(()), jnp.zeros(())), zero
    return jax.lax.scan(add_part, start, (jnp.arange(accumulate), parts))[0]


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


def compile_train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    state: State,
    batch: Batch,
    mesh: Mesh,
    *,
    seed: int = 0,
    accumulate: int = 1,
) -> TrainStep:
    """`train_step`, compiled for the shapes of `state` and `batch`; the state is donated.

    Each device of `mesh` holds the state and takes its share of the batch.
    """
    step = functools.partial(
        train_step,
        loss=loss,
        optimizer=optimizer,
        seed=seed,
        accumulate=accumulate,
        axis=_axis(mesh),
    )
    return _compile_on_shares(step, mesh, state, batch, donate_argnums=0)


def compile_eval_step(loss: LossFunction, params: Any, batch: Batch, mesh: Mesh) -> EvalStep:
    """(params, batch) → loss sums, without dropout."""

    def step(params: Any, batch: Batch) -> LossSums:
        return sum_over_devices(loss(params, batch, None), _axis(mesh))

    return _compile_on_shares(step, mesh, params, batch)


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


def _compile_on_shares(step: Callable, mesh: Mesh, whole: Any, batch: Batch, **options: Any) -> Any:
    """`step(whole, batch)`, each device of `mesh` with all of `whole` and its share of `batch`."""
    shared = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P(), check_vma=False)
    shardings = NamedSharding(mesh, P()), NamedSharding(mesh, P(DATA))
    return jax.jit(shared, in_shardings=shardings, **options).lower(whole, batch).compile()
