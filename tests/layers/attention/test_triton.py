"""Flash attention with dropout, interpreted, against XLA's with the same mask."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from gptjax import TransformerConfig, build, split
from gptjax.config import MeshConfig
from gptjax.layers.attention import flash
from gptjax.layers.attention.masks import MaskRule, attention_mask
from gptjax.layers.attention.xla import attend
from gptjax.layers.dropout import Dropout
from gptjax.parallel.keys import random_key
from gptjax.parallel.sharding import build_mesh, spec

SCALE = 0.3
DRAW = np.random.default_rng(0)
DOCUMENTS = np.sort(DRAW.integers(1, 4, (2, 199)), axis=1).astype(np.int32)
VALID = np.arange(140) < np.array([[100], [140]])
interpreted = functools.partial(flash.triton, scale=SCALE, interpret=True)


def reference(query, key, value, rule: MaskRule, dropout: Dropout | None) -> jax.Array:
    distance = jnp.arange(query.shape[1])[None, :, None] - jnp.arange(key.shape[1])
    mask = attention_mask(distance, rule)
    return attend(query, key, value, mask, None, SCALE, 0.0, dropout=dropout)


def inputs(queries: int, keys: int, heads: int = 2, kv_heads: int = 1) -> list[jax.Array]:
    """Query [2, T, N, 16], key and value [2, S, K, 16], gradient of the z."""
    shapes = (queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)
    return [jnp.asarray(DRAW.standard_normal((2, *shape, 16), np.float32)) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(attend, rule, dropout, query, key, value, gradient):
    def attended(query, key, value):
        return attend(query, key, value, rule=rule, dropout=dropout)

    z, vjp = jax.vjp(attended, query, key, value)
    return z, *vjp(gradient)


def assert_equal(got, expected) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        largest = max(float(jnp.abs(theirs).max()), 1.0)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "rule", "rate"),
    [
        (256, 256, (4, 2), MaskRule(causal=True), 0.3),
        (199, 199, (2, 1), MaskRule(True, window=50, segment_ids=jnp.asarray(DOCUMENTS)), 0.5),
        (140, 140, (2, 2), MaskRule(False, 60, jnp.asarray(VALID)), 0.1),
        (7, 140, (2, 1), MaskRule(False, padding_mask=jnp.asarray(VALID)), 0.1),
        (1, 1, (1, 1), MaskRule(causal=True), 0.0),
    ],
    ids=["causal, grouped", "window, documents", "both sides, padding", "another sequence", "one"],
)
def test_output_and_gradients_equal_xlas_with_the_same_mask(queries, keys, heads, rule, rate):
    given = inputs(queries, keys, *heads)
    dropout = Dropout.drawn(random_key(1), (2, heads[0], queries, keys), rate) if rate else None
    expected = with_gradients(reference, rule, dropout, *given)
    assert_equal(with_gradients(interpreted, rule, dropout, *given), expected)


def test_each_device_of_a_mesh_drops_its_part():
    mesh = build_mesh(MeshConfig(data=2, tensor=2), 2, jax.devices()[:4])
    given = inputs(128, 128, heads=4, kv_heads=2)
    rule, dropout = MaskRule(causal=True), Dropout.drawn(random_key(1), (2, 4, 128, 128), 0.3)
    expected = with_gradients(reference, rule, dropout, *given)
    with jax.set_mesh(mesh):
        parts = NamedSharding(mesh, spec("BTNH", given[0].shape))
        got = with_gradients(interpreted, rule, dropout, *jax.device_put(given, parts))
        jax.block_until_ready(got)
    assert got[1].sharding.is_equivalent_to(parts, 4)
    assert_equal(got, expected)


def test_several_runs_at_once_drop_each_its_own():
    """As `gptjax.runs.ensembles` trains them, under `jax.vmap`."""
    given = [jnp.stack(two) for two in zip(*(inputs(128, 128) for _ in range(2)), strict=True)]
    keys = jnp.stack([random_key(1), random_key(2)])

    def run(attend: Any, key: jax.Array, *given: jax.Array) -> Any:
        dropout = Dropout.drawn(key, (2, 2, 128, 128), 0.3)
        return with_gradients(attend, MaskRule(causal=True), dropout, *given)

    together = jax.vmap(functools.partial(run, interpreted))(keys, *given)
    assert_equal(together, jax.vmap(functools.partial(run, reference))(keys, *given))


def test_a_query_without_keys_yields_numbers_and_no_gradient():
    rule = MaskRule(causal=True, padding_mask=jnp.zeros((2, 128), bool))
    z, *gradients = with_gradients(interpreted, rule, None, *inputs(128, 128))
    assert jnp.isfinite(z).all()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.slow
def test_a_model_trains_with_the_dropout_of_its_key_whatever_computes_it(monkeypatch):
    calls = []

    def spied(*args: Any) -> jax.Array:
        calls.append(args)
        return flash_triton(*args, interpret=True)

    flash_triton = flash.triton
    monkeypatch.setattr(flash, "triton", spied)
    config = TransformerConfig(
        vocab_size=11, context_length=8, depth=1, width=16, heads=1, dropout=0.3
    )
    params = split(build(config, rngs=nnx.Rngs(0)))[1]
    tokens = DRAW.integers(11, size=(2, 8))

    def gradients(kernel: str, **given: Any) -> Any:
        own = dataclasses.replace(config, attention_kernel=kernel)
        graphdef = split(nnx.eval_shape(lambda: build(own, rngs=nnx.Rngs(0))))[0]

        def loss(params: Any) -> jax.Array:
            model = nnx.merge(graphdef, params)
            return model.hidden(tokens, key=random_key(5), **given).hidden.var(axis=1).sum()

        return jax.jit(jax.grad(loss))(params)

    expected = gradients("xla")
    assert not calls
    step_by_step = gradients("triton", capture=("attention",))  # Captured, so written out.
    assert not calls
    by_kernel = gradients("triton")
    assert calls
    for got in (step_by_step, by_kernel):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), got, expected)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_the_kernels_are_lowered_for_a_gpu():
    """Pallas's interpreter also runs what Triton does not take."""
    described = contextlib.nullcontext()
    if jax.__version_info__ >= (0, 11):  # Older ones assume an H100 where there is no GPU.
        device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
        described = jax.sharding.use_abstract_mesh(mesh)
    rule = MaskRule(True, 50, segment_ids=jnp.asarray(DOCUMENTS))
    attend = functools.partial(flash.triton, scale=SCALE)
    dropout = Dropout.drawn(random_key(1), (2, 2, 199, 199), 0.1)
    given = [x.astype(jnp.bfloat16) for x in inputs(199, 199)]
    with described:
        traced = with_gradients.trace(attend, rule, dropout, *given)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 3
