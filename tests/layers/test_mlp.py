import jax
import numpy as np
import pytest

from gptjax.config.values import GATES
from gptjax.layers import mlp
from gptjax.layers.mlp import ACTIVATIONS, activate, gelu_tanh

X = jax.random.normal(jax.random.key(0), (7, 9)) * 3


def test_gelu_tanh_and_its_backward_pass_equal_autodiff():
    # In float32 the two round a saturated tanh's slope, 1 - tanh², differently by up to 1e-6.
    with jax.enable_x64(True):
        x = np.asarray(X, np.float64)
        expected, expected_vjp = jax.vjp(lambda x: jax.nn.gelu(x, approximate=True), x)
        output, vjp = jax.vjp(gelu_tanh, x)
        np.testing.assert_allclose(output, expected, atol=1e-12)
        np.testing.assert_allclose(vjp(x)[0], expected_vjp(x)[0], atol=1e-12)
        assert vjp(x)[0].dtype == np.float64
        # What GPUs compute from x alone.
        np.testing.assert_allclose(mlp._gelu_tanh_gradient(x, x), expected_vjp(x)[0], atol=1e-12)


@pytest.mark.parametrize(
    ("name", "at_minus_one", "at_two"),
    [
        ("relu", 0.0, 2.0),
        ("relu2", 0.0, 4.0),
        ("gelu", -0.15865525, 1.9544997),
        ("gelu_tanh", -0.15880801, 1.9545977),
        ("silu", -0.26894143, 1.7615942),
    ],
)
def test_activations_have_their_textbook_values(name, at_minus_one, at_two):
    values = ACTIVATIONS[name](np.array([-1.0, 2.0], np.float32))
    np.testing.assert_allclose(values, [at_minus_one, at_two], atol=1e-6)


@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_activated_and_multiplied(name):
    gate, up = X, X[::-1]
    expected = ACTIVATIONS[GATES[name]](gate) * up
    np.testing.assert_array_equal(activate(name, up, gate), expected)
