"""Losses, lenses and attributions are the model's own numbers, taken apart."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from probed import TOKENS, VARIANTS, config, inputs, model

from gptjax import InputError, build, probe


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "recurrent"])
def test_attributions_add_up_to_the_logit(name):
    logits = probe.observe(model(name), TOKENS, **inputs(name)).logits
    for answer in (3, np.roll(TOKENS, -1, axis=1)):
        found = probe.attribution(model(name), TOKENS, answer, **inputs(name))
        chosen = np.broadcast_to(answer, TOKENS.shape)[..., None]
        expected = np.take_along_axis(np.asarray(logits), chosen, axis=-1)[..., 0]
        np.testing.assert_allclose(found.total, expected, atol=1e-5, rtol=0)
        assert found.heads.shape == (3, 2, 2, 8)
        assert (found.cross_heads is not None) == (name == "encoder_decoder")


def test_a_head_is_credited_with_what_it_adds_to_the_last_stream():
    answer = 3
    found = probe.attribution(model("decoder"), TOKENS, answer)
    captured = probe.observe(model("decoder"), TOKENS, ("head_output", "residual")).captured
    sums = ("residual", "attention_output", "mlp_output")
    last = probe.observe(model("decoder"), TOKENS, sums).captured
    stream = sum(last[hook_point][-1] for hook_point in sums)
    norm = model("decoder").final_norm
    deviation = np.sqrt(np.var(stream, axis=-1, keepdims=True) + norm.epsilon)
    added = captured["head_output"][1, :, :, 0]
    centred = (added - added.mean(-1, keepdims=True)) / deviation * norm.scale[...]
    np.testing.assert_allclose(
        found.heads[1, 0], centred @ model("decoder").unembedding[answer], atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_the_lens_ends_at_the_models_own_logits(name):
    seen = probe.observe(model(name), TOKENS, ("residual",), **inputs(name))
    lens = probe.logit_lens(model(name), TOKENS, **inputs(name))
    assert lens.shape == (config(name).depth + 1, 2, 8, 11)
    np.testing.assert_allclose(lens[-1], jax.nn.log_softmax(seen.logits), atol=1e-5)
    norm, stream = model(name).final_norm, seen.captured["residual"][1]
    second = model(name).unembed(model(name).readout(stream if norm is None else norm(stream)))
    np.testing.assert_allclose(lens[1], jax.nn.log_softmax(second), atol=1e-5)


def test_losses_are_those_of_the_tokens_that_follow():
    logits = probe.observe(model("decoder"), TOKENS).logits
    losses = probe.token_loss(model("decoder"), TOKENS)
    assert losses.shape == (2, 7)
    expected = -jax.nn.log_softmax(logits)[1, 4, TOKENS[1, 5]]
    np.testing.assert_allclose(losses[1, 4], expected, atol=1e-6)
    own = probe.token_loss(model("encoder"), TOKENS, TOKENS)
    logits = probe.observe(model("encoder"), TOKENS).logits
    expected = -jax.nn.log_softmax(logits)[0, 7, TOKENS[0, 7]]
    np.testing.assert_allclose(own[0, 7], expected, atol=1e-6)


def test_what_is_no_sum_is_not_taken_apart():
    with pytest.raises(InputError, match=r"An LSTM's layers replace the stream"):
        probe.attribution(model("recurrent"), TOKENS, 3)
    bert = build(
        dataclasses.replace(config("encoder"), encoder_heads="masked_lm"), rngs=nnx.Rngs(0)
    )
    with pytest.raises(InputError, match=r"encoder_heads is 'masked_lm': a head that is not"):
        probe.attribution(bert, TOKENS, 3)
