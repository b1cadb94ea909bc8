import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import Decoder, InputError, TransformerConfig, build, preset, split
from gptjax.layers.hooks import Hooks, hook_points
from gptjax.layers.inputs import Inputs
from gptjax.layers.moe import MoE

TINY = TransformerConfig(vocab_size=11, context_length=8, depth=3, width=16, heads=2)
TOKENS = jnp.array([[1, 5, 3, 2, 9, 0, 4, 7], [3, 3, 8, 1, 10, 6, 2, 5]])


@functools.cache
def decoder(**changes) -> Decoder:
    """One model for all tests that ask for it; none of them changes it."""
    return Decoder(dataclasses.replace(TINY, **changes), rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, params, tokens, key):
    return nnx.merge(graphdef, params)(tokens, key=key)


def logits_of(model: Decoder, tokens: jax.Array = TOKENS, key: jax.Array | None = None):
    return np.asarray(run(*split(model), tokens, key))


def loss_and_gradient(model: Decoder, key: jax.Array | None = None):
    graphdef, params = split(model)

    def loss(params):
        return nnx.merge(graphdef, params)(TOKENS, key=key).var()

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_same(first, second, rtol: float = 1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), first, second)


@pytest.mark.parametrize("positions", ["learned", "rotary", "none"])
def test_a_later_token_moves_no_earlier_logit(positions):
    model = decoder(position_embedding=positions)
    logits = logits_of(model)
    for place in range(TINY.context_length):
        other = TOKENS.at[0, place].set((TOKENS[0, place] + 1) % TINY.vocab_size)
        changed = np.abs((logits_of(model, other) - logits)[0]).max(axis=-1) > 0
        assert not changed[:place].any()
        assert changed[place]


def test_the_gradient_of_a_logit_by_later_embeddings_is_zero():
    graphdef, params = split(decoder(tie_embeddings=False))

    @jax.jit
    @jax.grad
    def gradient(offset, place):
        moved = nnx.merge(graphdef, params)
        moved.embedding = lambda tokens, _: params["embedding"]["table"][tokens] + offset
        return moved(TOKENS[:1])[0, place].sum()

    offset = jnp.zeros((1, TINY.context_length, TINY.width))
    for place in (0, 3, TINY.context_length - 1):
        moved = np.abs(gradient(offset, place))[0].max(axis=-1)
        assert (moved[: place + 1] > 0).all()
        assert (moved[place + 1 :] == 0).all()


def test_scanned_layers_equal_unrolled_ones():
    assert_same(loss_and_gradient(decoder(scan_layers=True)), loss_and_gradient(decoder()))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_remat_changes_no_value(scan_layers):
    plain = loss_and_gradient(decoder(scan_layers=scan_layers))
    assert_same(loss_and_gradient(decoder(scan_layers=scan_layers, remat="full")), plain)


def test_remat_recomputes():
    def flops(model):
        graphdef, params = split(model)
        gradient = jax.grad(lambda params: nnx.merge(graphdef, params)(TOKENS).sum())
        costs: Any = jax.jit(gradient).lower(params).cost_analysis()
        return costs["flops"]

    assert flops(decoder(remat="full")) > 1.2 * flops(decoder())


@pytest.mark.parametrize("scan_layers", [False, True])
def test_dropout_needs_a_key_and_follows_it(scan_layers):
    model = decoder(dropout=0.3, scan_layers=scan_layers)
    assert_same(logits_of(model), logits_of(decoder()))
    first = logits_of(model, key=jax.random.key(1))
    assert_same(logits_of(model, key=jax.random.key(1)), first)
    assert not np.allclose(logits_of(model, key=jax.random.key(2)), first)
    assert not np.allclose(logits_of(model), first)


@pytest.mark.slow
def test_dropout_is_the_same_scanned_and_unrolled():
    key = jax.random.key(1)
    scanned = loss_and_gradient(decoder(dropout=0.3, scan_layers=True), key)
    assert_same(loss_and_gradient(decoder(dropout=0.3), key), scanned)


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
def test_captured_intermediates_are_those_of_the_model(scan_layers):
    model = decoder(scan_layers=scan_layers)
    plain, output = model.hidden(TOKENS), model.hidden(TOKENS, capture=[*hook_points(TINY)])
    assert plain.captured == {}
    assert_same(plain.hidden, output.hidden)
    sizes = dict(zip("LBTSDNKHF", (3, 2, 8, 8, 16, 2, 2, 8, 64), strict=True))
    shapes = {name: tuple(sizes[axis] for axis in axes) for name, axes in hook_points(TINY).items()}
    assert jax.tree.map(jnp.shape, output.captured) == shapes
    attention = output.captured["attention"]
    np.testing.assert_allclose(attention.sum(axis=-1), 1, rtol=1e-6)
    assert (np.triu(attention, 1) == 0).all()
    embedded = model.embedding(TOKENS) + model.positions(jnp.arange(8))
    assert_same(output.captured["residual"][0], embedded)


def test_asking_for_nothing_is_the_program_of_training():
    model = decoder()
    graphdef, params = split(model)

    def program(**how) -> str:
        forward = jax.jit(lambda params: nnx.merge(graphdef, params).hidden(TOKENS, **how))
        return forward.lower(params).as_text()

    assert program() == program(capture=())
    assert program() != program(capture=("attention",))


def test_gpt2_has_its_published_parameters():
    _, shapes = split(nnx.eval_shape(lambda: Decoder(preset("gpt2"), rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808


@pytest.mark.slow
def test_initialisation_is_gpt2s():
    model = Decoder(
        TransformerConfig(vocab_size=500, context_length=64, depth=8, width=128, heads=4),
        rngs=nnx.Rngs(0),
    )
    block = split(model)[1]["decoder"]["blocks"]
    for kernel in (block["attention"]["query"], block["mlp"]["up"]):
        assert np.std(kernel["kernel"]) == pytest.approx(0.02, rel=0.02)
        assert (kernel["bias"] == 0).all()
    for kernel in (block["attention"]["output"], block["mlp"]["down"]):
        assert np.std(kernel["kernel"]) == pytest.approx(0.02 / 4, rel=0.02)
    assert np.std(model.embedding.table[...]) == pytest.approx(0.02, rel=0.02)
    layers = block["attention"]["query"]["kernel"]
    assert not np.allclose(layers[0], layers[1])


def test_an_untied_head_has_a_table_of_its_own():
    model = decoder(tie_embeddings=False)
    assert model.unembedding is not model.embedding.table[...]
    assert split(model)[1]["head"]["table"].shape == (TINY.vocab_size, TINY.width)


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
    model = decoder(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(split(model)[1])} == {np.dtype("float32")}
    logits = logits_of(model)
    assert logits.dtype == np.float32
    # bfloat16 keeps 8 bits: 3 blocks of rounding at 2^-8 each, on logits of about 0.1.
    np.testing.assert_allclose(logits, logits_of(decoder()), atol=0.01)
    assert not np.array_equal(logits, logits_of(decoder()))


def test_bad_calls_are_refused():
    with pytest.raises(InputError, match="9 tokens; context allows 8"):
        decoder()(jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(
        InputError, match="Unknown hook point 'atention' of a decoder: did you mean attention"
    ):
        decoder().hidden(TOKENS, capture=("atention",))
    with pytest.raises(InputError, match="vocab_size is 0"):
        decoder(vocab_size=0)


@pytest.mark.parametrize("token", [-1, 11])
def test_a_token_outside_the_vocabulary_is_refused_or_nan_but_never_another(token):
    tokens = TOKENS.at[1, 3].set(token)
    with pytest.raises(InputError, match=f"The sequence has token {token}; the vocabulary has 11"):
        decoder()(tokens)
    logits = logits_of(decoder(), tokens)
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1, 3:]).all()


def test_an_encoder_looks_both_ways_and_not_at_padding():
    config = dataclasses.replace(TINY, family="encoder", token_types=2)
    model = build(config, rngs=nnx.Rngs(0))
    valid = jnp.array([[True] * 6 + [False] * 2, [True] * 8])
    logits = model(TOKENS, padding_mask=valid)
    last = model(TOKENS.at[:, 7].set(8), padding_mask=valid)
    np.testing.assert_array_equal(last[0, :6], logits[0, :6])
    assert (np.abs(last[1] - logits[1]).max(axis=-1) > 0).all()


def test_a_segment_is_an_embedding_more():
    config = dataclasses.replace(TINY, family="encoder", token_types=2)
    model = build(config, rngs=nnx.Rngs(0))
    token_types = jnp.array([[0, 0, 0, 1, 1, 1, 1, 1]] * 2)
    np.testing.assert_array_equal(
        model(TOKENS), model(TOKENS, token_types=jnp.zeros_like(token_types))
    )
    typed, plain = Inputs(TOKENS, token_types=token_types), Inputs(TOKENS)
    difference = model.embed(typed, None) - model.embed(plain, None)
    table = model.token_types.table[...]
    np.testing.assert_allclose(difference[0, 3], table[1] - table[0], atol=1e-6)
    assert (difference[:, :3] == 0).all()


@pytest.mark.slow
def test_a_decoder_reads_the_source_but_not_its_padding():
    config = dataclasses.replace(TINY, family="encoder_decoder", encoder_depth=2)
    model = build(config, rngs=nnx.Rngs(0))
    source = jnp.array([[4, 3, 2, 1, 0], [1, 2, 3, 4, 5]])
    valid = jnp.array([[True, True, True, False, False], [True] * 5])
    logits = model(TOKENS, source=source, source_mask=valid)
    changed = model(TOKENS, source=source.at[:, 4].set(9), source_mask=valid)
    np.testing.assert_array_equal(changed[0], logits[0])
    assert (np.abs(changed[1] - logits[1]).max(axis=-1) > 0).all()
    shorter = model(TOKENS[:1], source=source[:1, :3])
    np.testing.assert_allclose(shorter, logits[:1], atol=1e-6)


def test_cross_attention_is_captured_where_there_is_any():
    config = dataclasses.replace(TINY, family="encoder_decoder", encoder_depth=2)
    model = build(config, rngs=nnx.Rngs(0))
    source = jnp.array([[4, 3, 2, 1, 0]] * 2)
    captured = model.hidden(TOKENS, source=source, capture=[*hook_points(config)]).captured
    weights = captured["cross_attention"]
    assert weights.shape == (TINY.depth, 2, TINY.heads, 8, 5)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
    assert captured["encoder_attention"].shape == (2, 2, TINY.heads, 5, 5)
    np.testing.assert_allclose(captured["encoder_attention"].sum(axis=-1), 1, rtol=1e-6)
    with pytest.raises(InputError, match="'cross_attention' is of an encoder-decoder; this model"):
        decoder().hidden(TOKENS, capture=("cross_attention",))


def test_layers_of_different_kinds_are_captured_together():
    config = dataclasses.replace(TINY, depth=4, attention="local,compressed", window=3)
    model = build(config, rngs=nnx.Rngs(0))
    weights = model.hidden(TOKENS, capture=("attention",)).captured["attention"]
    assert weights.shape == (4, 2, TINY.heads, 8, 8)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
    local, compressed = weights[2, 0, 0], weights[3, 0, 0]
    assert (local[6, 4:7] > 0).all()
    assert (local[6, :4] == 0).all()
    # The empty key, the groups of places 0 to 2 and 3 to 5; the third group is not whole.
    assert (compressed[6, :3] > 0).all()
    assert (compressed[:, 3:] == 0).all()
    assert (compressed[:2, 0] == 1).all()


@pytest.mark.slow
def test_an_expert_beyond_its_capacity_takes_no_token_in_training():
    config = dataclasses.replace(TINY, num_experts=4, experts_per_token=1, capacity_factor=0.5)
    block = MoE(config, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 8, TINY.width))
    all_taken, _ = block(x)
    some_taken, _ = block(x, Hooks(key=jax.random.key(0)))
    chosen = block.router(x).argmax(axis=-1).ravel()
    capacity = 2  # Half of the 16 tokens' even share of 4.
    taken = [int((chosen[:place] == chosen[place]).sum()) < capacity for place in range(16)]
    assert not all(taken)
    flat = np.asarray(some_taken).reshape(16, -1)
    np.testing.assert_array_equal((flat != 0).any(axis=1), taken)
    np.testing.assert_array_equal(flat[taken], np.asarray(all_taken).reshape(16, -1)[taken])


@pytest.mark.slow
def test_a_mixture_is_the_weighted_sum_of_the_chosen_experts():
    config = dataclasses.replace(TINY, num_experts=4, activation="swiglu")
    block: Any = MoE(config, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 3, TINY.width))
    mixed, losses = block(x)
    probability = jax.nn.softmax(block.router(x))[0]
    for place, row in enumerate(np.asarray(probability)):
        best = np.argsort(-row)[:2]
        expected = 0
        for expert in best:
            up, gate, down = (part.kernel[expert] for part in (block.up, block.gate, block.down))
            fed = (jax.nn.silu(x[0, place] @ gate) * (x[0, place] @ up)) @ down
            expected += row[expert] / row[best].sum() * fed
        np.testing.assert_allclose(mixed[0, place], expected, rtol=1e-4, atol=1e-7)
    share = np.bincount(np.argsort(-probability, axis=-1)[:, :2].ravel(), minlength=4) / 6
    balance = 4 * (share * probability.mean(axis=0)).sum()
    np.testing.assert_allclose(losses.balance[0], balance, rtol=1e-5)
    z = np.square(jax.nn.logsumexp(block.router(x)[0], axis=-1)).mean()
    np.testing.assert_allclose(losses.z[0], z, rtol=1e-5)
