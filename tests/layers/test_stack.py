"""What of a block stays between the passes, by the name of the policy."""

import dataclasses
import functools
import re

import jax
import pytest
from jax.ad_checkpoint import print_saved_residuals

from gptjax.certify.cases import ROUNDING, ROWS, Case, difference
from gptjax.certify.properties import product_flops
from gptjax.config import TransformerConfig

L, T, D, N, H, F = 3, 6, 8, 2, 5, 14
CONFIG = TransformerConfig(
    vocab_size=29,
    context_length=T,
    depth=L,
    width=D,
    heads=N,
    head_dim=H,
    mlp_dim=F,
    scan_layers=True,
)
CASE = Case(CONFIG, CONFIG)
TOKENS = ROWS * T
SCORES = 2 * TOKENS * T * N * H
"""FLOPs of a layer's products of queries and keys, and of those of weights and values."""
BEFORE_DOWN = 2 * TOKENS * (4 * D * N * H + D * F)
"""FLOPs of a layer's products with weights, but for the last, which nothing reads again."""
STREAM = (ROWS, T, D)


def loss_under(remat: str):
    loss = CASE.loss(remat=remat)
    return lambda params: loss(params, CASE.batch, None).loss / CASE.batch.loss_weights.sum()


@functools.cache
def gradient_flops(remat: str) -> int:
    return product_flops(jax.make_jaxpr(jax.grad(loss_under(remat)))(CASE.params).jaxpr)


@pytest.mark.parametrize("remat", ["full", "dots", "names", "offload"])
def test_a_recomputed_block_has_the_same_gradient(remat):
    gradient = jax.jit(jax.value_and_grad(loss_under(remat)))(CASE.params)
    assert difference(gradient, CASE.plain) <= ROUNDING


@pytest.mark.slow
def test_layers_that_are_recomputed_together_keep_one_input(capsys):
    deeper = dataclasses.replace(CONFIG, depth=2 * L)
    case = Case(deeper, deeper)
    losses = {
        together: case.loss(remat="full", remat_layers=together) for together in (1, 2, 2 * L)
    }
    for together, loss in losses.items():

        def mean(params, loss=loss):
            return loss(params, case.batch, None).loss / case.batch.loss_weights.sum()

        assert difference(jax.jit(jax.value_and_grad(mean))(case.params), case.plain) <= ROUNDING
        print_saved_residuals(mean, case.params)
        shape = ",".join(map(str, (2 * L // together, *STREAM)))
        assert f"f32[{shape}] output of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("remat", "again"),
    [
        ("full", BEFORE_DOWN + 2 * SCORES),
        ("dots", 2 * SCORES),
        ("names", BEFORE_DOWN - 2 * TOKENS * D * F + SCORES),
        ("offload", BEFORE_DOWN + 2 * SCORES),
    ],
)
def test_as_many_products_are_computed_again_as_a_policy_says(remat, again):
    assert gradient_flops(remat) - gradient_flops("none") == L * again


@pytest.mark.parametrize(
    ("remat", "kept"),
    [
        ("full", {("f32", STREAM)}),
        ("names", {("f32", STREAM), ("f32", (ROWS, T, N, H)), ("f32", (ROWS, T, F))}),
        ("offload", {("f32<host>", STREAM)}),
        (
            "dots",
            {
                ("f32", STREAM),
                ("f32", (TOKENS, N * H)),
                ("f32", (TOKENS, D)),
                ("f32", (TOKENS, F)),
            },
        ),
    ],
)
def test_of_every_layer_a_policy_keeps_what_it_says(remat, kept, capsys):
    print_saved_residuals(loss_under(remat), CASE.params)
    found = re.findall(rf"^(\S+)\[{L},([\d,]+)\] output of", capsys.readouterr().out, re.M)
    assert {(dtype, tuple(map(int, shape.split(",")))) for dtype, shape in found} == kept
