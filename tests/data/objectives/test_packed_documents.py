"""Several documents in one row: each is computed as if it stood alone."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import InputError, TransformerConfig, build, split
from gptjax.data.batch import Batch

TINY = TransformerConfig(
    vocab_size=11, context_length=12, depth=2, width=16, heads=2, tie_embeddings=False
)
KINDS: dict[str, dict[str, Any]] = {
    **{
        f"decoder, {positions}": {"position_embedding": positions}
        for positions in ("learned", "sinusoidal", "rotary", "alibi", "relative", "none")
    },
    "decoder, local": {"attention": "local,full", "window": 3, "position_embedding": "rotary"},
    "encoder, learned": {"family": "encoder", "token_types": 2},
    "encoder, relative": {"family": "encoder", "position_embedding": "relative"},
    "recurrent": {"family": "recurrent", "position_embedding": "none"},
}
DOCUMENTS = np.array([[1] * 4 + [2] * 7 + [0], [1] * 7 + [2] * 4 + [0]], np.int32)
POSITIONS = np.array([[*range(4), *range(7), 0], [*range(7), *range(4), 0]], np.int32)
TOKENS = np.random.default_rng(0).integers(11, size=DOCUMENTS.shape, dtype=np.int32)


@functools.cache
def model_of(kind: str, **changes: Any) -> Any:
    """Parameters further from zero than an initialisation, so that the positions are felt."""
    config = dataclasses.replace(TINY, **KINDS[kind], **changes)
    graphdef, params = split(build(config, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.2 * draw.standard_normal(leaf.shape, np.float32), params
    )
    return nnx.merge(graphdef, params)


def packed(model: Any, tokens: np.ndarray = TOKENS) -> jax.Array:
    """Logits [B, T, V] of the packed rows, which the model is given as a step gives them."""
    weights = np.ones(tokens.shape, np.float32)
    batch = Batch(tokens, tokens, weights, segment_ids=DOCUMENTS, positions=POSITIONS)
    return model(batch.tokens, **batch.inputs())


@functools.cache
def logits_of(kind: str) -> np.ndarray:
    return np.asarray(packed(model_of(kind)))


def alone(model: Any, document: int) -> jax.Array:
    """Logits [M, V] of this document of each row, at the beginning of rows of its own."""
    places = np.equal(DOCUMENTS, document)
    valid = np.arange(TINY.context_length) < places.sum(axis=1, keepdims=True)
    tokens = np.zeros_like(TOKENS)
    tokens[valid] = TOKENS[places]
    return model(tokens, padding_mask=valid)[valid]


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_document_is_as_when_alone(kind):
    model, logits = model_of(kind), logits_of(kind)
    assert np.isfinite(logits).all()
    for document in (1, 2):
        found, expected = logits[np.equal(DOCUMENTS, document)], alone(model, document)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("document", [1, 2])
def test_a_neighbour_moves_nothing(kind, document):
    before, places = logits_of(kind), np.equal(DOCUMENTS, document)
    others = np.where(places, (TOKENS + 1) % TINY.vocab_size, TOKENS)
    after = np.asarray(packed(model_of(kind), others))
    np.testing.assert_array_equal(after[~places], before[~places])
    assert (np.abs(after - before)[places].max(axis=-1) > 0).all()


@pytest.mark.parametrize("kind", ["decoder, learned", "encoder, relative", "recurrent"])
def test_the_gradient_by_a_neighbours_embedding_is_zero(kind):
    graphdef, params = split(model_of(kind))

    @jax.grad
    def gradient(offset, places):
        moved = nnx.merge(graphdef, params)
        moved.embedding = lambda tokens, _: params["embedding"]["table"][tokens] + offset
        return (jnp.square(packed(moved)) * places[..., None]).sum()

    for document in (0, 1, 2):
        places = np.equal(DOCUMENTS, document)
        found = np.abs(gradient(jnp.zeros((*TOKENS.shape, TINY.width)), places)).max(axis=-1)
        assert (found[places] > 0).all()
        assert (found[~places] == 0).all()


@pytest.mark.parametrize("kind", ["decoder, learned", "encoder, relative"])
def test_the_gradient_of_packed_documents_is_the_sum_of_theirs(kind):
    graphdef, params = split(model_of(kind))

    def one_row(params):
        return jnp.square(packed(nnx.merge(graphdef, params))[DOCUMENTS > 0]).sum()

    def one_each(params):
        model = nnx.merge(graphdef, params)
        return sum(jnp.square(alone(model, document)).sum() for document in (1, 2))

    found, expected = jax.grad(one_row)(params), jax.grad(one_each)(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), found, expected
    )


def test_scanned_layers_read_packed_rows_as_unrolled_ones_do():
    scanned = packed(model_of("decoder, learned", scan_layers=True))
    np.testing.assert_allclose(scanned, logits_of("decoder, learned"), rtol=1e-5, atol=1e-5)


def test_attention_weighs_no_other_document():
    model = model_of("decoder, learned")
    output = model.hidden(
        TOKENS, segment_ids=DOCUMENTS, positions=POSITIONS, capture=("attention",)
    )
    weights = np.asarray(output.captured["attention"])
    same = np.equal(DOCUMENTS[:, :, None], DOCUMENTS[:, None])
    seen = same & np.tri(TINY.context_length, dtype=bool)
    np.testing.assert_array_equal(weights > 0, np.broadcast_to(seen[None, :, None], weights.shape))


def test_what_takes_one_document_a_row_says_so():
    compressed = build(
        dataclasses.replace(TINY, attention="local,compressed", window=3), rngs=nnx.Rngs(0)
    )
    with pytest.raises(InputError, match="attention is 'local,compressed': compressed attention"):
        packed(compressed)
    translator = build(dataclasses.replace(TINY, family="encoder_decoder"), rngs=nnx.Rngs(0))
    with pytest.raises(
        InputError, match="A model of the family encoder_decoder takes no segment_ids"
    ):
        packed(translator)
    decoder = model_of("decoder, learned")
    with pytest.raises(InputError, match="A cache holds one document per row"):
        decoder.hidden(TOKENS, segment_ids=DOCUMENTS, cache=decoder.empty_cache(2))
