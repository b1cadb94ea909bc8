"""Weights of what is chosen, without holding the rest; and what they say of a head."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from probed import SOURCE, TINY, TOKENS, inputs, model

from gptjax import InputError, build, probe, split
from gptjax.probe import heads, weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("decoder", None),
        ("scanned", "decoder"),
        ("encoder", "encoder"),
        ("pattern", None),
        ("compressed", None),
    ]
    + [("encoder_decoder", part) for part in ("decoder", "encoder", "cross")],
)
def test_what_is_chosen_is_a_part_of_the_whole(name, part):
    def looked(**chosen):
        return probe.attention(model(name), TOKENS, part=part, **chosen, **inputs(name))

    whole = looked()
    chosen = whole[np.ix_([1, 0], [0, 1], [1], [4, 2])]
    np.testing.assert_allclose(looked(layers=[1, 0], heads=[1], rows=[4, 2]), chosen, atol=1e-6)
    top = looked(top=3)
    np.testing.assert_allclose(top.weights, -np.sort(-whole, axis=-1)[..., :3], atol=1e-6)
    found = np.take_along_axis(np.asarray(whole), np.asarray(top.positions), axis=-1)
    np.testing.assert_allclose(found, top.weights, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder", "scanned", "parallel", "compressed"])
def test_blocks_of_queries_are_the_whole(name):
    whole = probe.attention(model(name), TOKENS, heads=[1])
    for layers, rows in ((range(3), range(8)), ([2], [7, 3])):
        blocks = probe.attention(model(name), TOKENS, heads=[1], block=3, layers=layers, rows=rows)
        expected = np.asarray(whole)[np.ix_(layers, range(2), range(1), rows)]
        np.testing.assert_allclose(blocks, expected, atol=1e-6)
    top = probe.attention(model(name), TOKENS, heads=[1], block=3, top=2)
    np.testing.assert_allclose(top.weights, -np.sort(-whole, axis=-1)[..., :2], atol=1e-6)


def temporary(program: jax.stages.Compiled) -> int:
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.slow
def test_a_long_text_is_never_held_whole():
    """Bytes that the programs take beside what comes in: not L layers' weights, nor one's."""
    length, layers = 1024, 6
    config = dataclasses.replace(TINY, context_length=length, depth=layers)
    graphdef, params = split(build(config, rngs=nnx.Rngs(0)))
    tokens = jnp.zeros((1, length), jnp.int32)
    of_a_layer = 4 * config.heads * length**2
    keep = weights._Selection("attention", (5,), (1,), None, 8)
    whole = weights._whole.lower(graphdef, keep, params, tokens, {}).compile()
    assert temporary(whole) < 4 * of_a_layer < layers * of_a_layer
    cache = nnx.merge(graphdef, params).empty_cache(1)
    block = weights._block.lower(graphdef, keep, params, tokens[:, :64], cache, 0).compile()
    assert temporary(block) < of_a_layer / 4


def test_measures_of_known_weights():
    weights = jnp.array([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0.25] * 4])
    np.testing.assert_allclose(probe.entropy(weights), np.log([1, 2, 1, 4]), atol=1e-6)
    np.testing.assert_allclose(probe.mean_distance(weights), [0, 0.5, 0, 1.5])
    # Two layers that look at the token before and then at themselves: half of it is still there.
    before, itself = jnp.eye(4, k=-1).at[0, 0].set(1), jnp.eye(4)
    through = probe.rollout(jnp.stack([before, itself])[:, None, None])
    np.testing.assert_allclose(through[0], before / 2 + itself / 2)
    through = probe.rollout(jnp.stack([before, before])[:, None, None])
    np.testing.assert_allclose(through[0, 3], [0, 0.25, 0.5, 0.25])


@pytest.mark.parametrize("begin", [None, 7])
def test_heads_of_known_kinds_are_told(begin, monkeypatch):
    length, vocabulary = 5, 7
    sequences = probe.repeated_sequences(vocabulary, length, 4, seed=3, begin=begin)
    first = 0 if begin is None else 1
    assert sequences.shape == (4, 2 * length + first)
    np.testing.assert_array_equal(sequences[:, first : first + length], sequences[:, -length:])
    assert (begin is None) or (sequences[:, 0] == begin).all()
    total = sequences.shape[1]
    kinds = {"previous_token": 1, "induction": length - 1, "duplicate_token": length}
    ideal = jnp.stack([jnp.eye(total, k=-distance) for distance in kinds.values()])

    def observe(_, tokens, capture):
        looked = jnp.broadcast_to(ideal, (len(tokens), *ideal.shape))
        (keep,) = capture.values()
        return probe.Activations(looked, looked, {"attention": keep(looked)[None]})

    monkeypatch.setattr(heads, "observe", observe)
    scores = probe.head_scores(model("decoder"), sequences, length)
    for number, kind in enumerate(kinds):
        np.testing.assert_allclose(getattr(scores, kind), jnp.eye(3)[number][None], atol=1e-6)


def test_scores_of_a_model_are_means_of_its_weights():
    sequences = probe.repeated_sequences(11, 4, 2)
    scores = probe.head_scores(model("decoder"), sequences, 4)
    weights = np.asarray(probe.attention(model("decoder"), sequences))
    on_previous = np.mean([weights[..., t, t - 1] for t in range(4, 8)], axis=(0, 2))
    np.testing.assert_allclose(scores.previous_token, on_previous, atol=1e-6)
    on_next = np.mean([weights[..., t, t - 3] for t in range(4, 8)], axis=(0, 2))
    np.testing.assert_allclose(scores.induction, on_next, atol=1e-6)


def test_what_is_not_there_is_refused():
    def refused(name="decoder", **chosen):
        with pytest.raises(InputError) as caught:
            probe.attention(model(name), TOKENS, **chosen)
        return str(caught.value)

    assert refused(layers=[0, 3]) == "layers has 3: it must be between 0 and 2."
    assert refused(heads=[-1]) == "heads has -1: it must be between 0 and 1."
    assert refused(rows=[8]) == "rows has 8: it must be between 0 and 7."
    assert refused(top=9) == "top is 9: it must be from 0 to the number of keys, 8."
    cross = "part is 'cross': a model of the family encoder has encoder."
    assert refused("encoder", part="cross") == cross
    assert refused("recurrent") == "A model of the family recurrent has no attention."
    assert "only a decoder" in refused("encoder", block=4)
    assert "only a decoder" in refused("encoder_decoder", block=4, source=SOURCE)
    with pytest.raises(InputError, match="sequences have 8 tokens: twice length, 6, or one more"):
        probe.head_scores(model("decoder"), TOKENS, 3)


def test_attention_between_words_sums_over_keys_and_means_over_queries():
    weights = np.array([[1, 0, 0], [0.25, 0.75, 0], [0.5, 0.1, 0.4]])
    by_hand = [[1, 0], [0.6, 0.4]]  # The words are the first two tokens, and the third.
    np.testing.assert_allclose(probe.by_word(weights, np.array([True, False, True])), by_hand)
    random = np.random.default_rng(0).dirichlet(np.ones(7), size=(2, 3, 7))
    starts = np.array([True, False, False, True, True, False, True])
    np.testing.assert_allclose(probe.by_word(random, starts).sum(axis=-1), 1)
    np.testing.assert_array_equal(probe.by_word(random, np.ones(7, bool)), random)
