import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.training.losses import cross_entropy

TOKENS, WIDTH, VOCABULARY = 10, 6, 23
KEYS = jax.random.split(jax.random.key(0), 4)
HIDDEN = jax.random.normal(KEYS[0], (TOKENS, WIDTH))
TABLE = jax.random.normal(KEYS[1], (VOCABULARY, WIDTH))
TARGETS = jax.random.randint(KEYS[2], (TOKENS,), 0, VOCABULARY)
WEIGHTS = jnp.array([1.0, 0.0, 2.0, 1.0, 1.0, 0.5, 0.0, 1.0, 1.0, 1.0])


def textbook(hidden, table, label_smoothing, z_loss, bias=0.0, logit_cap=0.0):
    """The definition, left to autodiff."""
    logits = hidden @ table.T + bias
    if logit_cap:
        logits = logit_cap * jnp.tanh(logits / logit_cap)
    log_probability = jax.nn.log_softmax(logits)
    wanted = (1 - label_smoothing) * jax.nn.one_hot(TARGETS, VOCABULARY)
    wanted += label_smoothing / VOCABULARY
    log_z = jax.nn.logsumexp(logits, axis=-1)
    losses = -(wanted * log_probability).sum(axis=-1) + z_loss * log_z**2
    return (WEIGHTS * losses).sum()


@pytest.mark.parametrize("chunk", [0, 1, 4, 10, 99])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.2, 0.01)])
def test_cross_entropy_and_its_gradient_are_the_textbooks(chunk, label_smoothing, z_loss):
    def ours(hidden, table):
        return cross_entropy(
            hidden, table, TARGETS, WEIGHTS,
            chunk=chunk, label_smoothing=label_smoothing, z_loss=z_loss,
        ).loss  # fmt: skip

    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(HIDDEN, TABLE)
    expected, wanted = jax.value_and_grad(textbook, argnums=(0, 1))(
        HIDDEN, TABLE, label_smoothing, z_loss
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours(HIDDEN, TABLE), expected, rtol=1e-5)


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("logit_cap", [0.0, 1.5])
def test_a_bias_and_a_cap_are_the_textbooks_too(chunk, logit_cap):
    bias = jax.random.normal(jax.random.key(5), (VOCABULARY,))

    def ours(hidden, table, bias):
        return cross_entropy(
            hidden, table, TARGETS, WEIGHTS,
            bias=bias, logit_cap=logit_cap, chunk=chunk, label_smoothing=0.1, z_loss=0.01,
        ).loss  # fmt: skip

    def plain(hidden, table, bias):
        return textbook(hidden, table, 0.1, 0.01, bias, logit_cap)

    arguments = (HIDDEN, TABLE, bias)
    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*arguments)
    expected, wanted = jax.value_and_grad(plain, argnums=(0, 1, 2))(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-5)


def test_sums_are_weighted_and_the_plain_cross_entropy_is_reported():
    sums = cross_entropy(HIDDEN, TABLE, TARGETS, WEIGHTS, label_smoothing=0.3, z_loss=0.1)
    assert sums.weight == WEIGHTS.sum()
    np.testing.assert_allclose(sums.cross_entropy, textbook(HIDDEN, TABLE, 0.0, 0.0), rtol=1e-5)


def test_large_logits_do_not_overflow():
    sums = cross_entropy(1000 * HIDDEN, TABLE, TARGETS, WEIGHTS)
    assert np.isfinite(sums.loss)


@pytest.mark.parametrize(("chunk", "largest"), [(0, 400), (50, 50)])
def test_chunks_bound_the_logits_that_exist(chunk, largest):
    hidden, table = jnp.ones((400, 4)), jnp.ones((1000, 4))

    def loss(hidden, table):
        return cross_entropy(
            hidden, table, jnp.zeros(400, jnp.int32), jnp.ones(400), chunk=chunk
        ).loss

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, table).as_text()
    assert f"tensor<{largest}x1000xf32>" in program
    assert ("tensor<400x1000xf32>" in program) == (chunk == 0)
    assert "tensor<8x50x1000xf32>" not in program
