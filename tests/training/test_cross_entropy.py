"""The loss where tokens and the vocabulary are parted among devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import MeshConfig
from gptjax.parallel.sharding import build_mesh, parameter_spec, spec
from gptjax.training.cross_entropy import cross_entropy

# No other size is the vocabulary's, nor that of a part of it.
ROWS, WIDTH, VOCABULARY = 8, 10, 46
TABLE = jax.random.normal(jax.random.key(0), (VOCABULARY, WIDTH))
BIAS = jnp.linspace(-1, 1, VOCABULARY)
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01}
MESH = build_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2), ROWS)


def ours(hidden, table, bias, chunk: int = 0):
    targets = jnp.arange(hidden[..., 0].size).reshape(hidden.shape[:2]) % VOCABULARY
    weights = 0.5 + targets / VOCABULARY
    return cross_entropy(hidden, table, targets, weights, bias=bias, chunk=chunk, **OPTIONS).loss


def naive(hidden, table, bias):
    """What must not happen: every token's logits come together."""
    logits = jax.lax.with_sharding_constraint(hidden @ table.T + bias, P())
    return jax.nn.logsumexp(logits, axis=-1).sum()


def compiled(loss, length: int):
    """Its value and gradients by hidden, table and bias, parted over the mesh."""
    hidden = jax.random.normal(jax.random.key(1), (ROWS, length, WIDTH))
    with jax.set_mesh(MESH):
        specs = spec("BtD", hidden.shape), parameter_spec("VD"), parameter_spec("V")
        program = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1, 2)),
            in_shardings=tuple(NamedSharding(MESH, each) for each in specs),
        ).lower(hidden, TABLE, BIAS)
    return program.compile(), (hidden, TABLE, BIAS)


def exchanged(text: str) -> set[tuple[int, ...]]:
    """The shapes of what devices send each other."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    results = re.findall(rf"= (.*) (?:{kinds})(?:-start)?\(", text)
    shapes = re.findall(r"\[([\d,]*)\]", " ".join(results))
    return {tuple(map(int, filter(None, shape.split(",")))) for shape in shapes}


def of_vocabulary(shapes: set[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Those with the vocabulary, or a device's part of it, beside other axes."""
    return {shape for shape in shapes if len(shape) > 1 and {46, 23} & set(shape)}


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("length", [8, 6])  # 8 is parted over `tensor` too, 6 is not.
def test_devices_exchange_parts_of_the_table_and_never_logits(length, chunk):
    loss = functools.partial(ours, chunk=chunk)
    program, given = compiled(loss, length)
    text = program.as_text() or ""
    assert of_vocabulary(exchanged(text)) == {(23, 10), (23, 5)}
    assert not re.search(r"\[[\d,]*46[\d,]*\]", text)
    expected = jax.value_and_grad(ours, argnums=(0, 1, 2))(*given)
    for found, one in zip(jax.tree.leaves(program(*given)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-5)


def test_logits_that_are_brought_together_would_be_seen():
    text = compiled(naive, 8)[0].as_text() or ""
    assert any(shape[-1] == VOCABULARY for shape in of_vocabulary(exchanged(text)))
