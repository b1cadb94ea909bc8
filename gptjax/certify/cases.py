"""A tiny model with random parameters and a batch, on which the properties are checked.

An error is the largest absolute difference relative to the largest value of what is compared.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from gptjax.config import MeshConfig, TransformerConfig
from gptjax.data.batch import Batch
from gptjax.models.build import abstract, build, split
from gptjax.parallel.sharding import build_mesh
from gptjax.training.losses import LossFunction, token_loss
from gptjax.training.step import compile_train_step, init_state

ROWS = 16
"""Sequences per batch (B): two accumulation steps on each of eight devices."""
ROUNDING = 1e-5
"""Tolerance for the order of float32 sums; a wrong program errs by far more."""
COMPILED_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""XLA's options for tiny programs that run a few times: less is optimised, and sums are as good.

The training step and decoding are compiled as in a run. `compile_for_once` of a run's first state
is for large arrays, which code of the lowest level would draw too slowly.
"""


class Case:
    """A model with parameters and a batch, with results that several checks share."""

    def __init__(self, config: TransformerConfig, real: TransformerConfig):
        """`config` is run; `real`, the variant in its own size, is only traced for shapes."""
        self.config = config
        self.real = real
        draw = np.random.default_rng(0)
        drawn = jax.jit(
            lambda: split(build(self.config, rngs=nnx.Rngs(0)))[1], compiler_options=COMPILED_FAST
        )
        # Larger than an initialisation, so that biases, attention weights and soft caps matter.
        self.params = jax.tree.map(
            lambda leaf: leaf + 0.2 * draw.standard_normal(leaf.shape, np.float32), drawn()
        )
        self.batch = _batch(self.config, draw)

    def model(self, **changes: Any) -> Any:
        """Returns the model with these parameters and `changes` of its config."""
        return nnx.merge(self.graphdef(**changes), self.params)

    def graphdef(self, **changes: Any) -> nnx.GraphDef:
        """Returns the graphdef of the model with `changes` of its config."""
        config = dataclasses.replace(self.config, **changes)
        return abstract(config)[0]

    def loss(self, *, chunk: int = 0, **changes: Any) -> LossFunction:
        """Returns the loss with all its terms, of the model with `changes` of its config."""
        weights = {"label_smoothing": 0.1, "z_loss": 0.01, "balance_loss": 0.1}
        return token_loss(self.graphdef(**changes), chunk=chunk, router_z_loss=0.01, **weights)

    def gradients(self, **how: Any) -> Any:
        """Returns the mean loss and its gradient; `how` are arguments of `loss`."""
        loss, weight = self.loss(**how), self.batch.loss_weights.sum()

        def mean_loss(params: Any) -> jax.Array:
            return loss(params, self.batch, None).loss / weight

        return jax.jit(jax.value_and_grad(mean_loss), compiler_options=COMPILED_FAST)(self.params)

    @functools.cached_property
    def plain(self) -> Any:
        """The reference `gradients`: unrolled, no remat, all logits at once, one device."""
        return self.gradients()

    def step(
        self, *, devices: int = 1, grad_accumulation: int = 1, chunk: int = 0, **changes: Any
    ) -> Any:
        """Returns loss and gradient of the compiled train step, with `changes` of the config."""
        mesh = build_mesh(MeshConfig(), devices)
        keep_gradient = optax.trace(decay=0.0)
        state = init_state(lambda: self.params, keep_gradient, mesh)
        step = compile_train_step(
            self.loss(chunk=chunk, **changes),
            keep_gradient,
            state,
            self.batch,
            mesh,
            grad_accumulation=grad_accumulation,
        )
        state, metrics = jax.block_until_ready(step(state, self.batch))
        return metrics.loss, state.optimizer.trace

    @functools.cached_property
    def together(self) -> float:
        """Error of a step that is scanned, recomputed, chunked, accumulated and sharded.

        Five properties at once: compiling a program for each would take most of the grid's time.
        """
        step = self.step(
            devices=ROWS,
            grad_accumulation=2,
            chunk=self.config.context_length // 3 + 1,
            scan_layers=True,
            remat="full",
        )
        return difference(step, self.plain)

    def together_or(self, alone: Callable[[], Any]) -> float:
        """Returns the error of `together`; if it is too large, that of one property alone."""
        if self.together <= ROUNDING:
            return self.together
        return difference(alone(), self.plain)

    def logits(self, batch: Batch) -> np.ndarray:
        """Returns logits [B, T, V]."""
        return np.asarray(self._logits(self.params, batch.tokens, batch.inputs()))

    @functools.cached_property
    def _logits(self) -> Callable[..., jax.Array]:
        """The compiled forward pass: parameters, tokens, other inputs → logits."""
        graphdef = self.graphdef()
        return jax.jit(
            lambda params, tokens, inputs: nnx.merge(graphdef, params)(tokens, **inputs),
            compiler_options=COMPILED_FAST,
        )


def _batch(config: TransformerConfig, draw: np.random.Generator) -> Batch:
    """Returns random tokens; if the family takes padding, each row ends with at least one."""
    shape = (ROWS, config.context_length)

    def tokens() -> np.ndarray:
        return draw.integers(config.vocab_size, size=shape, dtype=np.int32)

    valid = (
        np.arange(config.context_length) < config.context_length - 1 - np.arange(ROWS)[:, None] % 3
    )
    batch = Batch(tokens(), tokens(), draw.uniform(size=shape).astype(np.float32))
    if config.family == "encoder":
        batch = batch._replace(padding_mask=valid, loss_weights=batch.loss_weights * valid)
    if config.token_types:
        batch = batch._replace(token_types=tokens() % config.token_types)
    if config.family == "encoder_decoder":
        batch = batch._replace(source=tokens(), source_mask=valid)
    return batch


def difference(found: Any, expected: Any) -> float:
    """Returns the largest difference of two trees over the largest expected value.

    Infinite if a value is not finite. The loss, a tree's scalar, is relative to itself.
    """
    largest = [0.0, 0.0]
    scale = [0.0, 0.0]
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if not (np.isfinite(one).all() and np.isfinite(other).all()):
            return math.inf
        kind = int(other.ndim > 0)
        largest[kind] = max(largest[kind], np.abs(one - other).max())
        scale[kind] = max(scale[kind], np.abs(other).max())
    return max(error / (size or 1.0) for error, size in zip(largest, scale, strict=True))
