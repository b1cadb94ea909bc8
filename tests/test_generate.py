import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import Decoder, InputError, Sampling, TransformerConfig, generate, split
from gptjax.generate import choose, filtered_logits
from gptjax.transformer import empty_cache

VOCABULARY, CONTEXT = 13, 12
GREEDY = Sampling(temperature=0)


@functools.cache
def decoder(positions: Any = "learned", scan_layers: bool = False) -> Decoder:
    config = TransformerConfig(
        vocab_size=VOCABULARY,
        context=CONTEXT,
        depth=2,
        width=16,
        heads=2,
        positions=positions,
        scan_layers=scan_layers,
    )
    return Decoder(config, rngs=nnx.Rngs(0))


def tokens_of(prompt, max_new_tokens=5, model=None, **how) -> np.ndarray:
    rows = generate(model or decoder(), np.array(prompt), max_new_tokens=max_new_tokens, **how)
    return np.stack(list(rows), axis=1)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("positions", ["learned", "rotary", "none"])
@pytest.mark.parametrize("chunk", [1, 5])
def test_cached_decoding_equals_the_full_forward_at_every_position(positions, scan_layers, chunk):
    model = decoder(positions, scan_layers)
    tokens = jax.random.randint(jax.random.key(0), (2, CONTEXT), 0, VOCABULARY)
    graphdef, params = split(model)

    @jax.jit
    def hidden(tokens, cache, position):
        output = nnx.merge(graphdef, params).hidden(tokens, cache=cache, position=position)
        return output.hidden, output.cache

    cache, pieces = empty_cache(model.config, 2), []
    for start in range(0, CONTEXT, chunk):
        piece, cache = hidden(tokens[:, start : start + chunk], cache, start)
        pieces.append(piece)
    full = model.hidden(tokens).hidden
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, atol=2e-6)


def test_greedy_takes_the_most_likely_token_of_the_full_forward():
    tokens = [[1, 2, 3]]
    for chosen in tokens_of(tokens, sampling=GREEDY)[0]:
        assert chosen == decoder()(jnp.array(tokens))[0, -1].argmax()
        tokens[0].append(int(chosen))


def test_a_batch_decodes_as_its_rows_do():
    prompts = [[1, 2, 3], [7, 0, 4]]
    batch = tokens_of(prompts, sampling=GREEDY)
    alone = [tokens_of([prompt], sampling=GREEDY)[0] for prompt in prompts]
    np.testing.assert_array_equal(batch, alone)


def test_the_seed_decides():
    def sampled(seed):
        return tokens_of([[1, 2]] * 4, 8, seed=seed)

    np.testing.assert_array_equal(sampled(0), sampled(0))
    assert not np.array_equal(sampled(0), sampled(1))
    assert len({tuple(row) for row in sampled(0)}) == 4


def test_decoding_stops_when_every_row_has_ended():
    free = tokens_of([[1, 2, 3], [7, 0, 4]], 9, sampling=GREEDY)
    end = int(free[0, 2])
    ends = [int(np.flatnonzero(row == end)[0]) if end in row else 9 for row in free]
    stopped = tokens_of([[1, 2, 3], [7, 0, 4]], 9, sampling=GREEDY, end_token=end)
    assert stopped.shape[1] == min(max(ends) + 1, 9)
    for row, place in zip(stopped, ends, strict=True):
        assert (row[place:] == end).all()


def test_decoding_stops_at_the_end_of_the_context():
    # Three tokens of prompt; the last token that fits is read to choose one more.
    assert tokens_of([[1, 2, 3]], 50).shape == (1, CONTEXT - 3 + 1)


def test_a_sliding_window_goes_on_from_the_second_half():
    continued = tokens_of([[1, 2, 3]], 15, sampling=GREEDY, sliding_window=True)[0]
    full = [1, 2, 3, *continued.tolist()]
    first_after_cut = CONTEXT + 1
    window = jnp.array([full[first_after_cut - CONTEXT // 2 : first_after_cut]])
    assert full[first_after_cut] == decoder()(window)[0, -1].argmax()
    assert len(continued) == 15


def test_top_k_keeps_the_k_most_likely():
    logits = jnp.array([[0.1, 3.0, 2.0, -1.0, 2.5]])
    kept = np.isfinite(filtered_logits(logits, Sampling(top_k=3)))
    np.testing.assert_array_equal(kept, [[False, True, True, False, True]])


def test_top_p_keeps_the_fewest_that_reach_p():
    probability = np.array([[0.5, 0.05, 0.3, 0.15]])
    for top_p, expected in ((0.4, [1, 0, 0, 0]), (0.6, [1, 0, 1, 0]), (0.9, [1, 0, 1, 1])):
        kept = np.isfinite(filtered_logits(jnp.log(probability), Sampling(top_p=top_p)))
        np.testing.assert_array_equal(kept[0], np.array(expected, bool))


def test_sampling_follows_the_softmax():
    logits, draws = jnp.array([0.0, 1.0, 2.0, -1.0]), 20_000
    sampling = Sampling(temperature=1.5)
    chosen = choose(jnp.tile(logits, (draws, 1)), sampling, jax.random.key(0))
    expected = np.asarray(jax.nn.softmax(logits / 1.5)) * draws
    chi_square = ((np.bincount(chosen, minlength=4) - expected) ** 2 / expected).sum()
    assert chi_square < 16.27  # The 99.9th percentile of 3 degrees of freedom.


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[]], "The prompt is empty"),
        ([[1] * 13], "The prompt has 13 tokens; the model's context is 12"),
        ([[1, 13]], "The prompt has token 13; the vocabulary has 13"),
        ([[-1, 2]], "The prompt has token -1; the vocabulary has 13"),
    ],
)
def test_bad_prompts_are_refused(prompt, message):
    with pytest.raises(InputError, match=message):
        tokens_of(prompt)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_p": 0.0}, "top-p is 0.0"),
    ],
)
def test_bad_sampling_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Sampling(**values)
