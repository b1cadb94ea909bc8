import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import Decoder, OptimizerConfig, TransformerConfig, split
from gptjax.config.values import Dtype
from gptjax.data.batch import Batch
from gptjax.parallel import platforms
from gptjax.parallel.platforms import sum_rows
from gptjax.training.losses import token_loss
from gptjax.training.optimizers import build_optimizer
from gptjax.training.step import State, train_step


def program_for(platform: str, dtype: Dtype) -> str:
    """The text of a training step, lowered for a platform that need not be there."""
    config = TransformerConfig(
        vocab_size=17,
        context_length=8,
        depth=1,
        width=16,
        heads=2,
        dtype=dtype,
        activation="gelu_tanh",
    )
    graphdef, params = split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    optimizer = build_optimizer(OptimizerConfig(), steps=9)
    tokens: Any = jax.ShapeDtypeStruct((4, 8), jnp.int32)
    weights: Any = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    step = functools.partial(train_step, loss=token_loss(graphdef), optimizer=optimizer)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = State(count, params, jax.eval_shape(optimizer.init, params))
    batch = Batch(tokens, tokens, weights)
    traced = jax.jit(step).trace(state, batch)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "dtype", "logits", "tanhs", "conditions"),
    [
        ("cpu", "bfloat16", "f32", 1, 1),
        ("cuda", "bfloat16", "bf16", 2, 0),
        ("tpu", "bfloat16", "f32", 1, 1),
        ("cuda", "float32", "f32", 2, 0),
    ],
)
def test_a_program_has_the_code_of_its_platform(platform, dtype, logits, tanhs, conditions):
    text = program_for(platform, dtype)
    products = re.findall(r"stablehlo.dot_general.*-> tensor<32x17x(\w+)>", text)
    assert products == [logits]
    assert text.count("stablehlo.tanh") == tanhs
    # The update's; those by platform have a constant index, or one branch alone.
    assert len(re.findall(r"stablehlo\.convert.*tensor<i1>\) -> tensor<i32>", text)) == conditions
    # Sums in two steps have one operand, and the statistics of each of three norms are in one of 4.
    operands = re.findall(r"stablehlo.optimization_barrier (.*) :", text)
    assert bool(operands) == (platform == "cuda")
    saved = [each for each in operands if each.count("%") == 4]
    assert len(saved) == (3 if platform == "cuda" else 0)


@pytest.mark.parametrize("shape", [(1, 3), (7, 5), (3, 11, 2), (64, 4), (2, 2048, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_summed_in_two_steps_as_at_once(shape, dtype):
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    expected = np.asarray(x, np.float64).sum(axis=tuple(range(x.ndim - 1)))
    found = platforms._sum_in_two_steps(x)
    assert found.dtype == dtype
    # Of bfloat16, whose sums are of float32, the result alone is rounded.
    rounding = {"float32": 1e-6, "bfloat16": 2.0**-8}[dtype]
    scale = np.abs(np.asarray(x, np.float64)).sum() if dtype == "float32" else np.abs(expected)
    np.testing.assert_array_less(np.abs(found - expected), rounding * scale + 1e-6)
    if dtype == "float32":  # CPUs sum bfloat16 in bfloat16.
        np.testing.assert_allclose(sum_rows(x), expected, atol=rounding * scale)
