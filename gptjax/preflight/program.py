"""Lower the exact step that `fit` or `generate` would run, from shapes alone.

A training step is assembled as in `gptjax.runs.run`; a decoding step reads one token per sequence
with a full KV cache, by the compiled function of `gptjax.generate`.
"""

import dataclasses
import functools
import importlib.util
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import ExperimentConfig, InputError, TransformerConfig
from gptjax.data.batch import Batch
from gptjax.decoding.programs import Weights, programs
from gptjax.layers.attention.kernels import resolve_kernel, target
from gptjax.models.build import abstract, build, parameter_axes, split
from gptjax.parallel.sharding import BATCH, build_mesh
from gptjax.training.losses import training_loss
from gptjax.training.optimizers import build_optimizer
from gptjax.training.step import State, lower_train_step, state_shapes


class Lowered(NamedTuple):
    """A lowered program, with the shapes of its arguments."""

    lowered: jax.stages.Lowered
    mesh: Mesh
    params: Any
    """Shapes of the parameters, with their shardings."""
    optimizer: Any
    """Shapes of the optimizer state; None in decoding."""
    cache: Any
    """Shapes of the KV cache; None in training."""
    kernel: str
    """The attention implementation, and why."""


def batch_shapes(config: ExperimentConfig) -> Batch:
    """Returns the shapes of a full training batch, as data/objectives/rows.py makes it."""
    rows, length = config.train.batch_size, config.model.context_length

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((rows, length), dtype)

    batch = Batch(array(jnp.int32), array(jnp.int32), array(jnp.float32))
    objective = config.data.objective
    if config.data.packing == "first_fit" or objective == "masked_lm":
        batch = batch._replace(segment_ids=array(jnp.int32), positions=array(jnp.int32))
    if objective == "next_sentence":
        labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
        batch = batch._replace(
            padding_mask=array(jnp.bool_), token_types=array(jnp.int32), next_sentence=labels
        )
    if objective in ("sequence_to_sequence", "prefix", "span_corruption"):
        batch = batch._replace(source=array(jnp.int32), source_mask=array(jnp.bool_))
    return batch


def lower_training(config: ExperimentConfig, devices: tuple[Any, ...]) -> Lowered:
    """Returns the lowered training step of `config` on `devices`.

    Raises:
      InputError: a mesh that does not match the devices, the batch or a parameter.
    """
    mesh = build_mesh(
        config.mesh, config.train.batch_size // config.train.grad_accumulation, devices
    )
    model, kernel = _with_kernel(config.model, mesh)
    graphdef, _ = abstract(model)
    optimizer = build_optimizer(config.optimizer, config.train.steps, dtype=config.model.dtype)
    state: State = state_shapes(_init(config.model), optimizer, mesh, parameter_axes(config.model))
    lowered = lower_train_step(
        training_loss(graphdef, config.train),
        optimizer,
        state,
        batch_shapes(config),
        mesh,
        seed=config.train.seed,
        grad_accumulation=config.train.grad_accumulation,
    )
    return Lowered(lowered, mesh, state.params, state.optimizer, None, kernel)


def _with_kernel(model: TransformerConfig, mesh: Mesh) -> tuple[TransformerConfig, str]:
    """Returns the config with the attention kernel that a run on these devices would choose.

    Without cuDNN, which XLA needs to compile its kernel, XLA's own attention is used instead.
    """
    chosen, lines = resolve_kernel(model, *target(mesh), sequence=mesh.shape["sequence"])
    lacking = importlib.util.find_spec("nvidia") is None and model.attention_kernel == "auto"
    if chosen.attention_kernel == "cudnn" and lacking:
        chosen = dataclasses.replace(chosen, attention_kernel="xla")
        lines = ["Attention: XLA, since cuDNN is not installed; a run with it needs less memory."]
    return chosen, " ".join(lines)


def _init(model: TransformerConfig) -> Any:
    return lambda: split(build(model, rngs=nnx.Rngs(0)))[1]


def lower_decoding(config: ExperimentConfig, devices: tuple[Any, ...]) -> Lowered:
    """Returns the lowered decoding step of `batch_size` sequences, one token each, cache full.

    Parameters and cache are sharded by the same rules as in training.

    Raises:
      InputError: a family that does not decode, layers that are not scanned, or a mesh as above.
    """
    model, rows = config.model, config.train.batch_size
    if model.family == "encoder":
        raise InputError("A model of the family encoder does not decode.")
    if not model.scan_layers:
        raise InputError("TransformerConfig.scan_layers is False: it must be True with --decode.")
    mesh = build_mesh(config.mesh, rows, devices)
    model, kernel = _with_kernel(model, mesh)
    graphdef, _ = abstract(model)
    # Parameters are sharded as in the training state, for any optimizer.
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    params = state_shapes(_init(model), optimizer, mesh, parameter_axes(model)).params

    def shaped(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return shaped(leaf.shape, leaf.dtype, _cache_spec(leaf.shape, mesh))

    source = None
    if model.family == "encoder_decoder":
        source = jax.ShapeDtypeStruct((rows, model.context_length), jnp.int32)
    cache = jax.tree.map(
        placed, jax.eval_shape(functools.partial(_empty_cache, graphdef, rows), params, source)
    )
    row = P(BATCH)
    source_mask: Any = None if source is None else shaped(source.shape, jnp.bool_, row)
    arguments = (
        Weights(params, None, source_mask),
        cache,
        shaped((rows, 1), jnp.int32, row),
        shaped((rows, 1), jnp.bool_, row),
        shaped((rows,), jnp.int32, row),
    )
    with jax.set_mesh(mesh):
        lowered = programs(graphdef).read.lower(*arguments)
    return Lowered(lowered, mesh, params, None, cache, kernel)


def _empty_cache(graphdef: nnx.GraphDef, rows: int, params: Any, source: Any) -> Any:
    model = nnx.merge(graphdef, params)
    return model.empty_cache(rows) if source is None else model.empty_cache(source)


def _cache_spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the spec of a cache leaf [L, B, K, S, H], or an LSTM's [L, B, D]: B and K sharded."""
    tensor = mesh.shape["tensor"]
    sharded = len(shape) == 5 and shape[2] % tensor == 0
    return P(None, BATCH, "tensor") if sharded else P(None, BATCH)


def bytes_held(tree: Any) -> int:
    """Returns bytes per device of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
