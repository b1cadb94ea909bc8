"""What is seen is what the model computed, and seeing changes nothing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from probed import SOURCE, TOKENS, VARIANTS, config, inputs, model

from gptjax import InputError, from_huggingface, probe, split
from gptjax.data.batch import Batch
from gptjax.huggingface.families import TRANSLATIONS
from gptjax.layers.hooks import POINTS, Hooks
from gptjax.training.losses import token_loss

GOLDEN = ROOT / "tests" / "golden"


@functools.cache
def seen(name: str) -> probe.Activations:
    """All places of a model."""
    return probe.observe(model(name), TOKENS, [*probe.hook_points(config(name))], **inputs(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_place_has_the_axes_that_are_told(name):
    own = config(name)
    sizes = {"L": own.depth, "B": 2, "T": 8, "S": 8, "N": 2, "K": own.actual_kv_heads, "H": 8}
    sizes |= {"D": own.width, "F": own.actual_mlp_dim}
    places = {}
    for hook_point, axes in probe.hook_points(own).items():
        at = dict(sizes)
        if hook_point.startswith("encoder_"):
            at |= {"L": own.encoder_depth, "T": 5, "S": 5}
        if hook_point.startswith("cross_"):
            at |= {"S": 5}
        places[hook_point] = tuple(at[axis] for axis in axes)
    assert jax.tree.map(jnp.shape, seen(name).captured) == places


@pytest.mark.parametrize("name", VARIANTS)
def test_looking_changes_nothing(name):
    plain = model(name)(jnp.asarray(TOKENS), **inputs(name))
    np.testing.assert_allclose(seen(name).logits, plain, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["decoder", "sandwich", "parallel", "encoder", "encoder_decoder"])
def test_scores_become_weights_and_weights_a_mixture(name):
    captured = seen(name).captured
    prefixes = ("", "cross_", "encoder_") if name == "encoder_decoder" else ("",)
    for prefix in prefixes:
        scores, weights, value, mixture, heads, output = (
            np.asarray(captured[prefix + hook_point])
            for hook_point in (
                "scores", "attention", "value", "z", "head_output", "attention_output",
            )
        )  # fmt: skip
        causal = config(name).family != "encoder" and prefix == ""
        mask = np.tril(np.ones(scores.shape[-2:], bool)) if causal else np.True_
        expected = jax.nn.softmax(jnp.where(mask, scores, -1e30))
        np.testing.assert_allclose(weights, expected, atol=1e-6)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
        by_head = np.repeat(value, 2 // value.shape[3], axis=3)
        mixed = np.einsum("lbnts,lbsnh->lbtnh", weights, by_head)
        np.testing.assert_allclose(mixture, mixed, atol=1e-5)
        bias = output - heads.sum(axis=3)  # The same at every place, whatever the tokens are.
        np.testing.assert_allclose(bias - bias[:, :1, :1], 0, atol=1e-5)


def test_the_stream_is_the_sum_of_what_is_added_to_it():
    captured = seen("decoder").captured
    after = np.sum(
        [captured[hook_point] for hook_point in ("residual", "attention_output", "mlp_output")], 0
    )
    np.testing.assert_allclose(after[:-1], captured["residual"][1:], atol=1e-5)


@pytest.mark.parametrize("name", ["decoder", "sandwich", "parallel", "encoder", "scanned"])
def test_weights_are_those_that_the_model_used(name):
    """A value that is moved moves each mixture by its weight, in the fast path too."""
    layer, key, shift = 1, 2, 0.5
    here = probe.where(model(name), "value", TOKENS.shape, layers=[layer], positions=[key])
    interventions = {"value": probe.add(here, shift)}
    moved = probe.observe(model(name), TOKENS, ("z",), interventions).captured["z"][layer]
    captured = seen(name).captured
    by_weights = shift * captured["attention"][layer][..., key].swapaxes(1, 2)  # [B, T, N]
    shifted = moved - captured["z"][layer]
    np.testing.assert_allclose(shifted, np.repeat(by_weights[..., None], 8, -1), atol=1e-5)


@pytest.mark.parametrize("name", TRANSLATIONS)
def test_weights_are_those_of_transformers(name):
    expected = np.load(GOLDEN / name / "expected.npz")
    tokens, golden = expected["tokens"], from_huggingface(GOLDEN / name)
    parts = {"attention": None}
    given: dict[str, Any] = {}
    if name == "marian":
        tokens, given = tokens[:, ::-1], {"source": tokens}
        parts = {"attention": "decoder", "cross_attention": "cross", "encoder_attention": "encoder"}
    for place, part in parts.items():
        weights = probe.attention(golden, tokens, part=part, **given)
        np.testing.assert_allclose(weights, expected[place], atol=1e-5)


def test_only_what_is_kept_of_a_place_is_returned():
    rows = probe.observe(model("decoder"), TOKENS, {"attention": probe.entropy})
    np.testing.assert_allclose(
        rows.captured["attention"], probe.entropy(seen("decoder").captured["attention"]), atol=1e-6
    )
    np.testing.assert_allclose(rows.captured["attention"][..., 0], 0, atol=1e-6)


@pytest.mark.slow
def test_asking_for_nothing_is_the_program_of_training(monkeypatch):
    graphdef, params = split(model("scanned"))
    batch = Batch.causal(np.concatenate([TOKENS[:, :1], TOKENS], axis=1)[:, :9])

    def program() -> str:
        step = jax.value_and_grad(lambda params: token_loss(graphdef)(params, batch, None).loss)
        return str(jax.make_jaxpr(step)(params))

    with_hooks = program()
    forward = functools.partial(nnx.merge(graphdef, params).hidden, jnp.asarray(TOKENS))
    assert str(jax.make_jaxpr(forward)()) == str(
        jax.make_jaxpr(functools.partial(forward, capture=(), interventions={}))()
    )
    jax.clear_caches()

    def named(self: Hooks, name: str, x: jax.Array) -> jax.Array:
        saved_as = POINTS[name].saved_as
        return checkpoint_name(x, saved_as) if saved_as else x

    monkeypatch.setattr(Hooks, "__call__", named)
    assert program() == with_hooks  # Without capture and interventions in it.


@pytest.mark.slow
def test_another_text_of_the_same_shape_needs_no_other_program():
    traced = []

    def kept(x: jax.Array) -> jax.Array:
        traced.append(x)
        return x

    for tokens in (TOKENS, TOKENS[::-1].copy()):
        probe.observe(model("scanned"), tokens, {"z": kept})
    assert len(traced) == 1


def test_what_the_model_has_not_is_refused():
    with pytest.raises(InputError, match=r"9 tokens; context allows 8\.$"):
        probe.observe(model("decoder"), np.zeros((1, 9), int))
    with pytest.raises(InputError, match=r"has the shape \(8,\): it must be \[B, T\]\.$"):
        probe.observe(model("decoder"), TOKENS[0])
    with pytest.raises(InputError, match=r"has token 11; the vocabulary has 11\.$"):
        probe.observe(model("decoder"), TOKENS + 1)
    with pytest.raises(
        InputError, match=r"Unknown hook point 'atention' of a decoder: did you mean"
    ):
        probe.observe(model("decoder"), TOKENS, ("atention",))
    with pytest.raises(InputError, match=r"'cross_scores' is of an encoder-decoder; this model"):
        probe.observe(model("encoder"), TOKENS, ("cross_scores",))
    with pytest.raises(InputError, match=r"Unknown hook point 'activation' of a decoder"):
        probe.observe(model("num_experts"), TOKENS, ("activation",))
    with pytest.raises(InputError, match=r"has token 93; the vocabulary has 11\.$"):
        probe.observe(model("encoder_decoder"), TOKENS, source=SOURCE + 89)
