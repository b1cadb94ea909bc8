import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.layers.norms import layer_norm, rms_norm

EPSILON = 1e-3

KEYS = jax.random.split(jax.random.key(0), 4)
X = 3 * jax.random.normal(KEYS[0], (2, 5, 8)) + 1
SCALE, BIAS = jax.random.normal(KEYS[1], (8,)), jax.random.normal(KEYS[2], (8,))
GRADIENT = jax.random.normal(KEYS[3], X.shape)


def plain_layer_norm(x, scale, bias):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(x.var(axis=-1, keepdims=True) + EPSILON) * scale + bias


def plain_rms_norm(x, scale):
    return x / jnp.sqrt(jnp.square(x).mean(axis=-1, keepdims=True) + EPSILON) * scale


@pytest.mark.parametrize(
    ("ours", "plain", "arguments"),
    [
        (lambda *a: layer_norm(*a, EPSILON), plain_layer_norm, (X, SCALE, BIAS)),
        (lambda x, scale: layer_norm(x, scale, None, EPSILON),
         lambda x, s: plain_layer_norm(x, s, 0.0), (X, SCALE)),
        (lambda *a: rms_norm(*a, EPSILON), plain_rms_norm, (X, SCALE)),
    ],
    ids=["layernorm", "layernorm without bias", "rmsnorm"],
)  # fmt: skip
def test_norm_and_its_backward_pass_equal_autodiff(ours, plain, arguments):
    output, vjp = jax.vjp(ours, *arguments)
    expected, expected_vjp = jax.vjp(plain, *arguments)
    np.testing.assert_allclose(output, expected, atol=1e-6, rtol=1e-6)
    for gradient, wanted in zip(vjp(GRADIENT), expected_vjp(GRADIENT), strict=True):
        # 1e-6 of the largest entry: scale and bias add up ten rows.
        np.testing.assert_allclose(gradient, wanted, atol=1e-6 * float(jnp.abs(wanted).max() + 1))


@pytest.mark.parametrize(
    "norm", [lambda x: layer_norm(x, SCALE, BIAS, EPSILON), lambda x: rms_norm(x, SCALE, EPSILON)]
)
def test_bfloat16_goes_in_and_out_with_float32_inside(norm):
    output = norm(X.astype(jnp.bfloat16))
    assert output.dtype == jnp.bfloat16
    exact = norm(X.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(output, exact.astype(jnp.bfloat16))
