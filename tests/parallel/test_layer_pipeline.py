import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import InputError, MeshConfig
from gptjax.parallel.pipeline import bubble, microbatches, run_stages
from gptjax.parallel.sharding import build_mesh

ROWS, TURNS = 16, 8
MESH = build_mesh(MeshConfig(pipeline=4, data=2), ROWS)


@pytest.mark.parametrize(("stages", "parts"), [(1, 4), (2, 1), (4, 2), (4, 16)])
def test_the_bubble_is_the_share_of_turns_in_which_a_stage_has_no_part(stages, parts):
    ticks = range(parts + stages - 1)
    idle = [not 0 <= tick - stage < parts for stage in range(stages) for tick in ticks]
    assert bubble(stages, parts) == pytest.approx(np.mean(idle))


def test_a_batch_passes_in_four_parts_a_stage_or_as_many_as_it_has():
    assert microbatches(64, 0, MESH.shape) == 16
    assert bubble(4, microbatches(64, 0, MESH.shape)) <= 1 / 5
    assert microbatches(16, 0, MESH.shape) == 8  # Each has a row on both devices along data.
    assert microbatches(24, 0, MESH.shape) == 12
    assert microbatches(64, 32, MESH.shape) == 32


def test_parts_that_the_mesh_cannot_split_are_refused():
    sentence = (
        r"TransformerConfig\.microbatches is 16: with 16 rows in 2 shards it must be one of "
        r"1, 2, 4, 8\."
    )
    with pytest.raises(InputError, match=sentence):
        microbatches(16, 16, MESH.shape)


class Own(NamedTuple):
    key: Any


def turn(params, x, rows, own):
    """A layer of which the order matters, which tells what it saw."""
    (mine, shared), (weight,) = rows, params
    drawn = None if own.key is None else jnp.full((1, len(x)), jax.random.uniform(own.key[0]))
    return jnp.tanh(weight * x + mine[:, None, None] + shared), {"entered": x[None], "drawn": drawn}


@functools.cache
def passed(parts: int, mesh=MESH):
    """What the stages make of a batch, and what comes of it layer by layer."""
    x = jax.random.normal(jax.random.key(0), (ROWS, 3, 2))
    stacks = [jax.random.normal(jax.random.key(1), (TURNS,))]
    rows = jnp.arange(ROWS) / ROWS, jnp.full((1, 1, 1), 0.5)
    own = Own(jax.random.split(jax.random.key(2), (TURNS, 1)))
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(run_stages, turn, requested=parts))(stacks, x, rows, own)
    entered = []
    for weight in stacks[0]:
        entered.append(x)
        x, _ = turn([weight], x, rows, Own(None))
    return jax.device_get(found), (x, jnp.stack(entered))


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_rows_leave_the_stages_as_they_leave_the_layers_in_their_order(parts):
    (x, told), (expected, entered) = passed(parts)
    np.testing.assert_allclose(x, expected, atol=1e-6)
    np.testing.assert_allclose(told["entered"][:, 0], entered, atol=1e-6)


def test_every_part_has_rows_of_every_device_and_every_layer_drops_something_else_of_it():
    drawn = passed(8)[0][1]["drawn"]
    by_part = drawn.reshape(TURNS, ROWS // 8, 8)
    assert (by_part == by_part[:, :1]).all()
    assert len(np.unique(by_part[:, 0])) == TURNS * 8
