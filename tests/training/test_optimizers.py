import dataclasses
import itertools
import math
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gptjax import Decoder, InputError, OptimizerConfig, TransformerConfig, build, split
from gptjax.config.values import OptimizerName
from gptjax.training.leaves import leaf_names
from gptjax.training.optimizers import (
    build_optimizer,
    decays,
    learning_rate_schedule,
    muon_dimensions,
)

CONFIG = TransformerConfig(
    vocab_size=5, context_length=4, depth=2, width=8, heads=2, tie_embeddings=False
)
PARAMS = split(Decoder(CONFIG, rngs=nnx.Rngs(0)))[1]
KERNELS = {
    f"decoder.blocks.{kernel}.kernel"
    for kernel in (
        "attention.query",
        "attention.key",
        "attention.value",
        "attention.output",
        "mlp.up",
        "mlp.down",
    )
}
TABLES = {"embedding.table", "positions.table", "head.table"}
STEADY = {"schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0}


def test_kernels_and_tables_decay_and_nothing_else():
    decaying = dict(zip(leaf_names(PARAMS), jax.tree.leaves(decays(PARAMS)), strict=True))
    assert {name for name, yes in decaying.items() if yes} == KERNELS | TABLES
    assert len(decaying) == len(KERNELS) + len(TABLES) + 6 + 6


OTHERS = {
    "num_experts": {"num_experts": 2, "activation": "swiglu", "norm": "rmsnorm", "qk_norm": True},
    "compressed": {"attention": "full,compressed", "embedding_norm": True, "head_bias": True},
    "bert": {"family": "encoder", "encoder_heads": "pretraining", "token_types": 2},
    "t5": {"family": "encoder_decoder", "position_embedding": "relative"},
    "lstm": {"family": "recurrent", "position_embedding": "none"},
}
"""Between them every kind of layer."""


def shapes_of(changes: dict[str, Any]) -> Any:
    config = dataclasses.replace(CONFIG, **changes)
    return split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))[1]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in typing.get_args(OptimizerName)),
        *itertools.product(("adamw", "muon"), OTHERS.values()),
    ],
)
def test_weight_decay_moves_just_the_leaves_that_decay(name, changes):
    """A step of zero gradient, leaf by leaf, whichever optimizer a leaf goes to."""
    rates = {"learning_rate": 0.1, "muon_learning_rate": 0.1}
    config = OptimizerConfig(name=name, weight_decay=0.5, **rates, **STEADY)
    transformation = build_optimizer(config, steps=10)
    shapes = shapes_of(changes)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    zero = jax.tree.map(np.zeros_like, ones)
    updates = jax.jit(lambda: transformation.update(zero, transformation.init(ones), ones)[0])()
    for path, update in zip(leaf_names(updates), jax.tree.leaves(updates), strict=True):
        kind = path.rpartition(".")[2]
        assert kind in ("kernel", "table", "scale", "bias")
        np.testing.assert_allclose(
            update, -0.05 if kind in ("kernel", "table") else 0.0, err_msg=path
        )


@pytest.mark.slow
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
        "decoder.blocks.mlp.up.kernel": ((1,), (2,)),
        "decoder.blocks.mlp.down.kernel": ((1,), (2,)),
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"num_experts": 4, "activation": "swiglu"},
            {
                "decoder.blocks.mlp.up.kernel": ((2,), (3,)),
                "decoder.blocks.mlp.gate.kernel": ((2,), (3,)),
                "decoder.blocks.mlp.down.kernel": ((2,), (3,)),
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
            {"family": "recurrent", "position_embedding": "none"},
            {"layers.recurrent.kernel": ((1,), (2, 3)), "layers.input.kernel": ((1,), (2, 3))},
        ),
        ({"family": "encoder", "encoder_heads": "pretraining"}, {}),
    ],
)
def test_muon_takes_other_families_kernels_and_neither_routers_nor_heads(changes, expected):
    axes = muon_axes(shapes_of(changes))
    assert expected.items() <= axes.items()
    for name in axes:
        assert "router" not in name
        assert ".blocks." in name or name.startswith("layers.")


JORDAN_MATRICES = {
    "query": (1, 1),
    "key": (1, 1),
    "value": (1, 1),
    "output": (1, 2),
    "compress_key": (1, 3),
    "compress_value": (1, 3),
    "up": (2, 1),
    "gate": (2, 1),
    "down": (2, 1),
}
"""A kernel's leading axes, which count matrices (layers, experts), and its axes of inputs."""


class Jordan:
    """Muon of one matrix [outputs, inputs], after KellerJordan/Muon, in float64."""

    def __init__(self, rate: float, decay: float):
        self.rate, self.decay = rate, decay
        self.momentum: Any = 0.0

    def __call__(self, weight: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        self.momentum = 0.95 * self.momentum + 0.05 * gradient
        x = 0.05 * gradient + 0.95 * self.momentum
        x = x / (np.sqrt((x * x).sum()) + 1e-7)
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
        outputs, inputs = weight.shape
        weight = weight * (1 - self.rate * self.decay)
        return weight - self.rate * max(1, outputs / inputs) ** 0.5 * x


class AdamW:
    """Loshchilov & Hutter 2019, algorithm 2, of one array."""

    def __init__(self, rate: float, decay: float, beta1: float, beta2: float, epsilon: float):
        self.rate, self.decay, self.epsilon = rate, decay, epsilon
        self.betas, self.step = (beta1, beta2), 0
        self.moments: list[Any] = [0.0, 0.0]

    def __call__(self, weight: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        self.step += 1
        corrected = []
        for number, (beta, power) in enumerate(
            zip(self.betas, (gradient, gradient**2), strict=True)
        ):
            self.moments[number] = beta * self.moments[number] + (1 - beta) * power
            corrected.append(self.moments[number] / (1 - beta**self.step))
        direction = corrected[0] / (np.sqrt(corrected[1]) + self.epsilon)
        return weight - self.rate * (direction + self.decay * weight)


def test_twenty_steps_of_muon_are_jordans_and_of_the_rest_adamws():
    """Every layer's and every expert's matrix on its own, to 1e-5 of the largest weight."""
    config = OptimizerConfig(name="muon", learning_rate=0.01, muon_learning_rate=0.02, **STEADY)
    draw = np.random.default_rng(0)
    shapes = shapes_of({**OTHERS["compressed"], **OTHERS["num_experts"], "kv_heads": 1})
    params = jax.tree.map(lambda leaf: draw.normal(0, 0.02, leaf.shape).astype("f4"), shapes)
    expected, references = dict(zip(leaf_names(params), jax.tree.leaves(params), strict=True)), {}

    def matrices(name: str, array: np.ndarray) -> list[np.ndarray]:
        """Those of a kernel of Muon's, [outputs, inputs]; another leaf is one row."""
        leading, inputs = JORDAN_MATRICES[name.split(".")[-2]] if of_muon(name) else (0, array.ndim)
        counted, read = array.shape[:leading], array.shape[leading : leading + inputs]
        flat = array.astype(np.float64).reshape(math.prod(counted), math.prod(read), -1)
        return [matrix.T for matrix in flat]

    def of_muon(name: str) -> bool:
        layer, _, kind = name.rpartition(".")
        return kind == "kernel" and layer.split(".")[-1] in JORDAN_MATRICES

    def reference(name: str) -> Jordan | AdamW:
        if of_muon(name):
            return Jordan(rate=0.02, decay=0.1)
        decay = 0.1 if name.endswith(("kernel", "table")) else 0.0
        return AdamW(0.01, decay, 0.9, 0.99, 1e-8)

    transformation = build_optimizer(config, steps=20)
    state = jax.jit(transformation.init)(params)

    @jax.jit
    def step(params, state, gradient):
        updates, state = transformation.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(20):
        gradient = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype("f4"), shapes)
        params, state = step(params, state, gradient)
        for name, leaf in zip(leaf_names(gradient), jax.tree.leaves(gradient), strict=True):
            parts = [matrices(name, array) for array in (expected[name], leaf)]
            own = references.setdefault(name, [reference(name) for _ in parts[0]])
            moved = [each(*part) for each, *part in zip(own, *parts, strict=True)]
            expected[name] = np.stack([matrix.T for matrix in moved]).reshape(leaf.shape)
    for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
        largest = np.abs(expected[name]).max()
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=1e-5 * largest, err_msg=name)
    assert {name for name in expected if of_muon(name)} == set(muon_axes(shapes))


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_first_moment_in_bfloat16_takes_half_and_steps_alike(name):
    def stepped(moments: Any) -> tuple[Any, Any]:
        config = OptimizerConfig(name=name, mu_dtype=moments, epsilon=1e-2, **STEADY)
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
    # Adam's and Muon's.
    first = moments_of(half_state, "mu") + moments_of(half_state, "trace")
    second = moments_of(half_state, "nu")
    assert len(first) == len(jax.tree.leaves(PARAMS))
    assert {leaf.dtype.name for leaf in first} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in second} == {"float32"}
    in_float32 = moments_of(whole_state, "mu") + moments_of(whole_state, "trace")
    assert 2 * sum(leaf.nbytes for leaf in first) == sum(leaf.nbytes for leaf in in_float32)
    moved = optax.tree.sub(whole, PARAMS)
    apart = optax.tree.norm(optax.tree.sub(half, whole)) / optax.tree.norm(moved)
    assert 0 < apart < 0.05


OPTAX: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": lambda c: optax.adamw(0.1, c.beta1, c.beta2, c.epsilon, weight_decay=0.1),
    "nadamw": lambda c: optax.nadamw(0.1, c.beta1, c.beta2, c.epsilon, weight_decay=0.1),
    "adabelief": lambda c: optax.adabelief(0.1, c.beta1, c.beta2, c.epsilon),
    "radam": lambda c: optax.radam(0.1, c.beta1, c.beta2, c.epsilon),
    "lion": lambda c: optax.lion(0.1, c.beta1, c.beta2, weight_decay=0.1),
    "rmsprop": lambda c: optax.rmsprop(0.1, c.beta2, c.epsilon),
    "sgd": lambda c: optax.sgd(0.1, c.beta1),
}
"""By name, with decay where Optax's own has it."""


@pytest.mark.parametrize("name", OPTAX)
def test_an_optimizer_of_optax_takes_the_steps_of_optax(name: Any):
    decay = 0.1 if name in ("adamw", "nadamw", "lion") else 0.0
    config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=decay, **STEADY)
    ours, theirs = build_optimizer(config, steps=10), OPTAX[name](config)
    params = {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4)}

    def trained(optimizer: optax.GradientTransformation) -> Any:
        now, state = params, optimizer.init(params)
        for step in range(8):
            gradient = jax.tree.map(lambda leaf, step=step: jnp.sin(3 * leaf + step), params)
            updates, state = optimizer.update(gradient, state, now)
            now = optax.apply_updates(now, updates)
        return jax.tree.leaves(now)[0]

    np.testing.assert_allclose(trained(ours), trained(theirs), rtol=1e-6, atol=1e-7)
