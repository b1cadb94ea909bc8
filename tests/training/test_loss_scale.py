"""Training in float16, whose loss is scaled."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import Decoder, OptimizerConfig, TransformerConfig, split
from gptjax.config.values import Dtype
from gptjax.data.batch import Batch
from gptjax.layers.mlp import gelu_tanh
from gptjax.training import loss_scale
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.loss_scale import INITIAL_SCALE, LEAST_SCALE, with_loss_scale
from gptjax.training.losses import token_loss
from gptjax.training.optimizers import build_optimizer
from gptjax.training.step import State, train_step

CONFIG = TransformerConfig(
    vocab_size=17, context_length=8, depth=2, width=16, heads=2, activation="gelu_tanh"
)
TOKENS = np.random.default_rng(0).integers(17, size=(4, 9), dtype=np.int32)
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:], np.ones((4, 8), np.float32))
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=0)


@functools.cache
def program(dtype: Dtype) -> tuple[Any, Any]:
    """The compiled step, and the state before the first."""
    config = dataclasses.replace(CONFIG, dtype=dtype)
    graphdef, params = split(Decoder(config, rngs=nnx.Rngs(0)))
    optimizer = build_optimizer(OPTIMIZER, steps=9, dtype=dtype)
    step = jax.jit(functools.partial(train_step, loss=token_loss(graphdef), optimizer=optimizer))
    return step, State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def trained(state: Any, steps: int, dtype: Dtype = "float16", batch: Batch = BATCH) -> Any:
    step, metrics = program(dtype)[0], []
    for _ in range(steps):
        state, more = step(state, batch)
        metrics.append(more)
    return state, metrics


def scaled(state: Any, scale: float) -> Any:
    return state._replace(optimizer=state.optimizer._replace(scale=jnp.float32(scale)))


@pytest.mark.slow
def test_float16_learns_as_float32_does():
    _, expected = trained(program("float32")[1], 8, "float32")
    _, found = trained(program("float16")[1], 8)
    for ours, theirs in zip(found, expected, strict=True):
        # 11 bits: as close as bfloat16 would be to within 8 times as much.
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=2e-3)
        np.testing.assert_allclose(ours.grad_norm, theirs.grad_norm, rtol=1e-2)
    assert expected[-1].loss < expected[0].loss - 0.2


def test_an_overflow_is_skipped_and_survived():
    heavy = BATCH._replace(loss_weights=np.full((4, 8), 4000, np.float32))
    start = scaled(program("float16")[1], 2.0**10)
    state, (first,) = trained(start, 1, batch=heavy)
    assert np.isfinite(first.loss)
    assert first.grad_norm == 0
    assert not np.any(jax.tree.leaves(first.leaf_norms))
    assert (state.optimizer.scale, state.step) == (2.0**9, 1)
    jax.tree.map(np.testing.assert_array_equal, state.params, start.params)
    jax.tree.map(
        np.testing.assert_array_equal, state.optimizer.optimizer, start.optimizer.optimizer
    )
    state, metrics = trained(state, 12, batch=heavy)
    assert metrics[-1].grad_norm > 0
    assert metrics[-1].loss < first.loss


def test_what_no_scale_helps_is_shown():
    # At the least scale, or of a loss that is not finite itself, a step has diverged.
    huge = BATCH._replace(loss_weights=np.full((4, 8), 1e30, np.float32))
    state, (metrics,) = trained(scaled(program("float16")[1], LEAST_SCALE), 1, batch=huge)
    assert not np.isfinite(metrics.grad_norm)
    assert state.optimizer.scale == LEAST_SCALE
    broken = BATCH._replace(loss_weights=np.full((4, 8), np.nan, np.float32))
    _, (metrics,) = trained(program("float16")[1], 1, batch=broken)
    assert not np.isfinite(metrics.grad_norm)


def test_the_scale_doubles_after_finite_steps(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 2)
    optimizer = with_loss_scale(build_optimizer(OPTIMIZER, steps=9))
    params = {"w": jnp.ones(3)}
    state: Any = optimizer.init(params)
    scales = []
    for step in range(7):
        if step == 3:  # The count restarts.
            state = loss_scale.after_skipped_step(state)
        else:
            _, state = optimizer.update(params, state, params)
        scales.append(float(state.scale) / INITIAL_SCALE)
    assert scales == [1, 2, 2, 1, 1, 2, 2]
    largest = state._replace(scale=jnp.float32(loss_scale.LARGEST_SCALE), finite_steps=jnp.int32(9))
    _, state = optimizer.update(params, largest, params)
    assert state.scale == loss_scale.LARGEST_SCALE


def test_a_run_resumes_bit_for_bit_with_its_scale(tmp_path):
    start = scaled(program("float16")[1], 256.0)
    expected, _ = trained(start, 4)
    halfway, _ = trained(start, 2)
    restored: Any
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(halfway, {})
        checkpoints.wait()
        restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, halfway)).state
    assert restored.optimizer.scale == 256
    assert restored.optimizer.finite_steps == 2
    found, _ = trained(restored, 2)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("x", [300.0, -300.0, 60_000.0])
def test_gelu_of_a_large_number_has_a_gradient(x):
    y, slope = jax.value_and_grad(gelu_tanh)(jnp.float16(x))
    assert (y, slope) == (max(x, 0), float(x > 0))
