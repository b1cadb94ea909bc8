"""With JAX_ENABLE_X64 everything stays as wide as it is documented to be."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import OptimizerConfig, Sampling, TrainConfig, TransformerConfig, build, generate, probe
from gptjax import split as split_model
from gptjax.data.batch import Batch
from gptjax.parallel.keys import random_key
from gptjax.training.losses import training_loss
from gptjax.training.optimizers import build_optimizer
from gptjax.training.step import State, train_step

SIZES = {"vocab_size": 11, "context_length": 8, "depth": 2, "width": 8, "heads": 2, "dropout": 0.1}
TRAIN = TrainConfig(batch_size=2, loss_chunk=5, label_smoothing=0.1, z_loss=1e-4)
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt": {"embedding_norm": True, "head_bias": True},
    "llama": {
        "position_embedding": "rotary",
        "rotary_fraction": 0.5,
        "norm": "rmsnorm",
        "activation": "swiglu",
        "kv_heads": 1,
        "qk_norm": True,
        "attention_softcap": 50.0,
        "logit_softcap": 30.0,
    },
    "alibi": {"position_embedding": "alibi", "attention": "local,full", "window": 4},
    "num_experts": {"num_experts": 4, "capacity_factor": 1.0, "embedding_scaled": True},
    "compressed": {"attention": "full,compressed", "scan_layers": True},
    "bert": {
        "family": "encoder",
        "encoder_heads": "pretraining",
        "position_embedding": "sinusoidal",
        "token_types": 2,
    },
    "t5": {"family": "encoder_decoder", "position_embedding": "relative", "tie_embeddings": False},
    "lstm": {"family": "recurrent", "position_embedding": "none"},
}
"""Between them every kind of layer."""


def config_of(name: str) -> TransformerConfig:
    return TransformerConfig(**SIZES, **VARIANTS[name])


def batch_for(config: TransformerConfig) -> Batch:
    tokens = np.random.default_rng(0).integers(11, size=(2, 8), dtype=np.int32)
    known = np.ones((2, 8), bool)
    batch = Batch(tokens, tokens, np.ones((2, 8), np.float32), padding_mask=known)
    if config.family == "encoder_decoder":
        batch = batch._replace(source=tokens, source_mask=known)
    if config.encoder_heads == "pretraining":
        batch = batch._replace(next_sentence=np.zeros(2, np.int32), token_types=0 * tokens)
    return batch


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of a program, and of the programs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def assert_none_wide(function: Callable, *arguments: Any) -> None:
    for equation in equations(jax.make_jaxpr(function)(*arguments)):
        for result in equation.outvars:
            assert getattr(result.aval, "dtype", None) != np.float64, equation


@pytest.mark.parametrize("name", VARIANTS)
def test_no_model_computes_in_float64(name):
    config = config_of(name)

    def initial():
        return split_model(build(config, rngs=nnx.Rngs(0)))[1]

    graphdef, expected = split_model(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
    loss = training_loss(graphdef, TRAIN)
    with jax.enable_x64(True):
        params = jax.eval_shape(initial)
        assert jax.tree.map(lambda leaf: leaf.dtype, params) == jax.tree.map(
            lambda leaf: leaf.dtype, expected
        )
        assert_none_wide(initial)
        assert_none_wide(
            jax.grad(lambda params, batch: loss(params, batch, random_key(0)).loss),
            params,
            batch_for(config),
        )


@pytest.mark.slow
def test_a_step_is_that_without_it_dropout_and_all():
    """Its state, which is what a checkpoint holds, has the same types, and the same numbers."""
    config = config_of("gpt")
    graphdef, _ = split_model(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
    transformation = build_optimizer(OptimizerConfig(name="muon", warmup_steps=0), steps=9)
    loss = training_loss(graphdef, TRAIN)

    def stepped():
        _, params = split_model(build(config, rngs=nnx.Rngs(random_key(0))))
        state = State(jnp.zeros((), jnp.int32), params, transformation.init(params))
        return jax.jit(
            lambda state, batch: train_step(
                state, batch, loss=loss, optimizer=transformation, grad_accumulation=2
            )
        )(state, batch_for(config))

    expected = stepped()
    with jax.enable_x64(True):
        found = stepped()

    def compare(one: jax.Array, other: jax.Array) -> None:
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)

    jax.tree.map(compare, found, expected)


@pytest.mark.slow
def test_decoding_and_probing_are_those_without_it():
    model = build(config_of("gpt"), rngs=nnx.Rngs(0))
    sampling = Sampling(0.8, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    tokens = np.array([[1, 2, 3, 4]], np.int32)

    def looked():
        steps = list(generate(model, tokens, max_new_tokens=3, sampling=sampling, seed=1))
        first = probe.where(model, "residual", tokens.shape, layers=[0], positions=[1])
        last = probe.where(model, "attention_output", tokens.shape, layers=[1])
        interventions = {
            "residual": probe.replace(first, 0.5),
            "attention_output": probe.add(last, np.ones(8)),
        }
        return (
            steps,
            probe.observe(model, tokens, interventions=interventions).logits,
            probe.logit_lens(model, tokens),
            probe.attribution(model, tokens, 2),
            probe.rollout(probe.attention(model, tokens)),
        )

    expected = looked()
    with jax.enable_x64(True):
        found = looked()

    def compare(one: jax.Array, other: jax.Array) -> None:
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, atol=1e-5)

    jax.tree.map(compare, found, expected)
