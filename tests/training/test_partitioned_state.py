"""No device ever holds more than its part of a state that is parted."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from gptjax import OptimizerConfig, TransformerConfig, build, split
from gptjax.config import MeshConfig
from gptjax.data.batch import Batch
from gptjax.models.build import parameter_axes
from gptjax.parallel.sharding import batch_sharding, build_mesh, mesh_axes, parameter_sharding
from gptjax.training.losses import token_loss
from gptjax.training.optimizers import build_optimizer
from gptjax.training.step import compile_train_step, init_state, lower_first_state, state_shapes

# Sizes so that no part of a parameter has the shape of another whole one.
CONFIG = TransformerConfig(
    vocab_size=66,
    context_length=10,
    depth=2,
    width=20,
    heads=6,
    head_dim=4,
    mlp_dim=28,
    position_embedding="rotary",
    norm="rmsnorm",
    scan_layers=True,
)
AXES = parameter_axes(CONFIG)
MESH = build_mesh(MeshConfig(pipeline=2, fsdp=2, tensor=2), rows=8)
GRAPHDEF, _ = split(nnx.eval_shape(lambda: build(CONFIG, rngs=nnx.Rngs(0))))
TOKENS = np.random.default_rng(0).integers(66, size=(8, 11), dtype=np.int32)
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:], np.ones((8, 10), np.float32))


def init() -> Any:
    return split(build(CONFIG, rngs=nnx.Rngs(0)))[1]


def optimizer_of(name: Any) -> optax.GradientTransformation:
    return build_optimizer(OptimizerConfig(name=name, warmup_steps=1), steps=10)


@functools.cache
def made(name: str) -> Any:
    return init_state(init, optimizer_of(name), MESH, AXES)


def leaves(tree: Any) -> dict[str, Any]:
    """By name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


SHAPES = {name: leaf.shape for name, leaf in leaves(jax.eval_shape(init)).items()}
RULES = {
    name: parameter_sharding(name, axes, SHAPES[name], MESH) for name, axes in leaves(AXES).items()
}
"""What the table says of each parameter."""


def assert_parted(state: Any, kernels: int) -> None:
    """Each parameter and its moments; of a block's kernel there are so many arrays, else three."""
    found = leaves(state)
    for parameter, sharding in RULES.items():
        own = [found.pop(name) for name in list(found) if name.endswith(parameter)]
        of_block = "blocks" in parameter and parameter.endswith("kernel")
        assert len(own) == (kernels if of_block else 3)
        axes = mesh_axes(sharding.spec)
        for leaf in own:
            assert leaf.sharding == sharding
            held = {shard.data.size * 2 ** len(axes) for shard in leaf.addressable_shards}
            assert held == {leaf.size}
    assert max(leaf.size for leaf in found.values()) == 1  # Counts.


@pytest.mark.parametrize(("name", "kernels"), [("adamw", 3), ("muon", 2)])
def test_parameters_and_moments_are_parted_by_the_rules(name, kernels):
    assert_parted(made(name), kernels)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_a_state_will_be_is_known_before(name):
    def told(leaf):
        return leaf.shape, leaf.dtype, leaf.sharding

    shapes = state_shapes(init, optimizer_of(name), MESH, AXES)
    assert jax.tree.map(told, shapes) == jax.tree.map(told, made(name))


def test_no_device_makes_a_whole_parameter_first():
    program = lower_first_state(init, optimizer_of("adamw"), MESH, AXES)
    text = program.compile().as_text() or ""
    assert text
    parted = [name for name, sharding in RULES.items() if mesh_axes(sharding.spec)]
    assert len(parted) == len(RULES) - 1
    for name in parted:
        assert f"f32[{','.join(map(str, SHAPES[name]))}]" not in text, name


def test_parameters_made_in_parts_are_those_of_one_device_by_bits():
    alone = init_state(init, optimizer_of("adamw"), build_mesh(MeshConfig(), rows=1))
    jax.tree.map(np.testing.assert_array_equal, made("adamw").params, alone.params)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kernels"), [("adamw", 3), ("muon", 2)])
def test_a_step_keeps_each_part_where_it_is(name, kernels):
    optimizer = optimizer_of(name)
    shapes = state_shapes(init, optimizer, MESH, AXES)
    step = compile_train_step(token_loss(GRAPHDEF), optimizer, shapes, BATCH, MESH)
    state, _ = step(init_state(init, optimizer, MESH, AXES), BATCH)
    assert_parted(jax.block_until_ready(state), kernels)


def test_a_gradient_is_parted_where_it_is_formed():
    # Here nothing says where it shall go, as the parts of the state would in a step.
    params = made("adamw").params
    given = jax.tree.map(lambda leaf: leaf.sharding, params)
    rows = jax.tree.map(lambda array: batch_sharding(MESH, array.shape), BATCH)
    loss = token_loss(GRAPHDEF)
    with jax.set_mesh(MESH):
        gradient = jax.jit(
            jax.grad(lambda params, batch: loss(params, batch, None).loss),
            in_shardings=(given, rows),
        )(params, BATCH)
    for name, leaf in leaves(gradient).items():
        # A bias of the width, which every device adds, is whole until it is updated.
        if not name.endswith(("output.bias", "down.bias")):
            assert leaf.sharding.is_equivalent_to(RULES[name], leaf.ndim), name
