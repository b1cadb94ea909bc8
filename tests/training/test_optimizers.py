import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gptjax import Decoder, InputError, OptimizerConfig, TransformerConfig, build, split
from gptjax.training.checkpoint import leaf_names
from gptjax.training.optimizers import (
    build_optimizer,
    decays,
    learning_rate_schedule,
    muon_dimensions,
)

CONFIG = TransformerConfig(vocab_size=5, context=4, depth=2, width=8, heads=2, tied=False)
PARAMS = split(Decoder(CONFIG, rngs=nnx.Rngs(0)))[1]
KERNELS = {
    f"decoder.blocks.{kernel}.kernel"
    for kernel in (
        "attention.query",
        "attention.key",
        "attention.value",
        "attention.output",
        "feedforward.up",
        "feedforward.down",
    )
}
TABLES = {"embedding.table", "positions.table", "head.table"}
STEADY = {"schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0}


def test_kernels_and_tables_decay_and_nothing_else():
    decaying = dict(zip(leaf_names(PARAMS), jax.tree.leaves(decays(PARAMS)), strict=True))
    assert {name for name, yes in decaying.items() if yes} == KERNELS | TABLES
    assert len(decaying) == len(KERNELS) + len(TABLES) + 6 + 6


def test_weight_decay_moves_just_the_leaves_that_decay():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, **STEADY)
    transformation = build_optimizer(config, steps=10)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = transformation.update(zero, transformation.init(ones), ones)
    for name, update in zip(leaf_names(updates), jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(update, -0.05 if name in KERNELS | TABLES else 0.0)


def test_factors_scale_the_step_and_not_the_decay():
    """What a weight loses to decay in a step is the same share at every width."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, **STEADY)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    factors = {name: 2.0 + place for place, name in enumerate(leaf_names(PARAMS))}
    tree = jax.tree.unflatten(jax.tree.structure(PARAMS), factors.values())
    steps = []
    for rate_factors in (None, tree):
        transformation = build_optimizer(config, steps=10, rate_factors=rate_factors)
        updates, _ = transformation.update(ones, transformation.init(ones), ones)
        steps.append(dict(zip(leaf_names(updates), jax.tree.leaves(updates), strict=True)))
    for name, factor in factors.items():
        decay = -0.05 if name in KERNELS | TABLES else 0.0
        expected = factor * (steps[0][name] - decay) + decay
        np.testing.assert_allclose(steps[1][name], expected, rtol=1e-5)


def test_without_factors_adamw_is_optax_own():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, **STEADY)
    theirs = optax.adamw(0.1, 0.9, 0.99, weight_decay=0.5, mask=decays)
    updates = []
    for transformation in (build_optimizer(config, steps=10), theirs):
        update, _ = transformation.update(PARAMS, transformation.init(PARAMS), PARAMS)
        updates.append(update)
    jax.tree.map(np.testing.assert_array_equal, *updates)


def muon_axes(params) -> dict[str, tuple]:
    """The axes that Muon multiplies along, by leaf."""

    def is_leaf(node: Any) -> bool:
        return node is None or hasattr(node, "output_axis")

    dimensions = jax.tree.leaves(muon_dimensions(params), is_leaf=is_leaf)
    return {
        name: (axes.reduction_axis, axes.output_axis)
        for name, axes in zip(leaf_names(params), dimensions, strict=True)
        if axes is not None
    }


def test_muon_takes_the_blocks_kernels_along_their_own_axes():
    assert muon_axes(PARAMS) == {
        "decoder.blocks.attention.query.kernel": ((1,), (2, 3)),
        "decoder.blocks.attention.key.kernel": ((1,), (2, 3)),
        "decoder.blocks.attention.value.kernel": ((1,), (2, 3)),
        "decoder.blocks.attention.output.kernel": ((1, 2), (3,)),
        "decoder.blocks.feedforward.up.kernel": ((1,), (2,)),
        "decoder.blocks.feedforward.down.kernel": ((1,), (2,)),
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"experts": 4, "feedforward": "swiglu"},
            {
                "decoder.blocks.feedforward.up.kernel": ((2,), (3,)),
                "decoder.blocks.feedforward.gate.kernel": ((2,), (3,)),
                "decoder.blocks.feedforward.down.kernel": ((2,), (3,)),
            },
        ),
        (
            {"attention": "full,compressed"},
            {
                "decoder.blocks.1.attention.compress_key.kernel": ((1, 2, 3), (4, 5)),
                "decoder.blocks.0.attention.output.kernel": ((1, 2), (3,)),
            },
        ),
        (
            {"family": "recurrent", "positions": "none"},
            {"layers.recurrent.kernel": ((1,), (2, 3)), "layers.input.kernel": ((1,), (2, 3))},
        ),
        ({"family": "encoder", "encoder_heads": "pretraining"}, {}),
    ],
)
def test_muon_takes_other_families_kernels_and_neither_routers_nor_heads(changes, expected):
    config = dataclasses.replace(CONFIG, **changes)
    axes = muon_axes(split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))[1])
    assert expected.items() <= axes.items()
    for name in axes:
        assert "router" not in name
        assert ".blocks." in name or name.startswith("layers.")


def test_muon_orthogonalises_each_layers_matrix():
    config = OptimizerConfig(name="muon", muon_learning_rate=1.0, weight_decay=0.0, **STEADY)
    transformation = build_optimizer(config, steps=10)
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(PARAMS)))
    gradients = jax.tree.unflatten(
        jax.tree.structure(PARAMS),
        [
            jax.random.normal(key, leaf.shape)
            for key, leaf in zip(keys, jax.tree.leaves(PARAMS), strict=True)
        ],
    )
    updates: Any = transformation.update(gradients, transformation.init(PARAMS), PARAMS)[0]
    for layer in range(CONFIG.depth):
        update = updates["decoder"]["blocks"]["attention"]["query"]["kernel"][layer].reshape(8, 8)
        values = np.linalg.svd(update, compute_uv=False)
        # Five Newton-Schulz steps bring singular values near 1, not onto it (Jordan 2024); the
        # smallest of a random matrix may lag behind.
        assert values.max() < 1.3
        assert np.median(values) > 0.6


@pytest.mark.parametrize(
    ("name", "at_60", "at_85"),
    [
        ("cosine", 0.55, 0.1 + 0.9 * (1 + np.cos(0.75 * np.pi)) / 2),
        ("constant", 1.0, 1.0),
        ("wsd", 1.0, 0.55),
    ],
)
def test_schedules_have_their_shapes(name, at_60, at_85):
    config = OptimizerConfig(schedule=name, warmup_steps=10, decay_fraction=0.5)
    rate = learning_rate_schedule(config, 1.0, 110)
    got = [float(jnp.asarray(rate(step))) for step in (0, 5, 10, 60, 85, 110)]
    end = 1.0 if name == "constant" else 0.1
    np.testing.assert_allclose(got, [0, 0.5, 1, at_60, at_85, end], atol=1e-5)


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(InputError, match="warmup_steps is 100: it must be below"):
        build_optimizer(OptimizerConfig(warmup_steps=100), steps=100)


def test_gradients_are_clipped_by_their_global_norm():
    config = OptimizerConfig(clip_norm=1.0, schedule="constant", warmup_steps=0, epsilon=1e6)
    transformation = build_optimizer(config, steps=1)
    state = transformation.init(PARAMS)
    small = jax.tree.map(lambda leaf: jnp.full_like(leaf, 10.0), PARAMS)
    large = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e4), PARAMS)
    first, second = (transformation.update(g, state, PARAMS)[0] for g in (small, large))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), first, second)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_first_moment_in_bfloat16_takes_half_and_steps_alike(name):
    def stepped(moments: Any) -> tuple[Any, Any]:
        config = OptimizerConfig(name=name, moments=moments, epsilon=1e-2, **STEADY)
        transformation = build_optimizer(config, steps=10)
        params, state = PARAMS, transformation.init(PARAMS)
        for number in range(3):
            gradient = jax.tree.map(
                lambda leaf, scale=number + 1: scale * jnp.cos(9 * leaf), params
            )
            updates, state = transformation.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    def moments_of(state: Any, which: str) -> list[jax.Array]:
        found = jax.tree_util.tree_leaves_with_path(state)
        return [leaf for path, leaf in found if f".{which}" in map(str, path)]

    (half, half_state), (whole, whole_state) = stepped("bfloat16"), stepped("float32")
    first, second = moments_of(half_state, "mu"), moments_of(half_state, "nu")
    assert {leaf.dtype.name for leaf in first} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in second} == {"float32"}
    in_float32 = moments_of(whole_state, "mu")
    assert 2 * sum(leaf.nbytes for leaf in first) == sum(leaf.nbytes for leaf in in_float32)
    moved = optax.tree.sub(whole, PARAMS)
    apart = optax.tree.norm(optax.tree.sub(half, whole)) / optax.tree.norm(moved)
    assert 0 < apart < 0.05
