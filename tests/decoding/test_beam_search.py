import functools
import importlib
import itertools
import math
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from gptjax import InputError, Sampling, TransformerConfig, beam_search, generate
from gptjax.models.build import build

VOCABULARY, LENGTH = 4, 3
ALL = VOCABULARY**LENGTH
"""As many beams as there are sequences, so that none is ever dropped."""
CONFIG = TransformerConfig(vocab_size=VOCABULARY, context_length=8, depth=2, width=16, heads=2)
FAMILIES: dict[str, dict[str, Any]] = {
    "decoder": {},
    "scanned": {"scan_layers": True, "position_embedding": "rotary", "kv_heads": 1},
    "recurrent": {"family": "recurrent", "position_embedding": "none", "final_norm": False},
    "encoder_decoder": {"family": "encoder_decoder"},
}


@functools.cache
def model(name: str = "decoder") -> Any:
    """A model with large parameters, so that its tokens differ much in probability."""
    built = build(TransformerConfig(**{**vars(CONFIG), **FAMILIES[name]}), rngs=nnx.Rngs(1))
    params = nnx.state(built, nnx.Param)
    nnx.update(built, jax.tree.map(lambda leaf: 12 * leaf if leaf.ndim > 1 else leaf, params))
    return built


@functools.cache
def log_probabilities(name: str, row: tuple[int, ...], source: tuple[int, ...] | None):
    """Of each token after `row`, from a forward pass without a cache."""
    reads = {} if source is None else {"source": np.array([source])}
    return np.asarray(jax.nn.log_softmax(model(name)(np.array([row]), **reads)[0, -1]))


def exhaustive(
    prompt: list[int],
    length: int,
    *,
    end_token: int | None = None,
    length_penalty: float = 0.0,
    name: str = "decoder",
    source: list[int] | None = None,
) -> list[tuple[tuple[int, ...], float]]:
    """Every continuation that ends with `end_token` or has `length` tokens, best first."""
    found: dict[tuple[int, ...], float] = {}
    for tokens in itertools.product(range(VOCABULARY), repeat=length):
        if end_token in tokens:
            tokens = tokens[: tokens.index(end_token) + 1]
        total, row = 0.0, tuple(prompt)
        for token in tokens:
            total += log_probabilities(name, row, None if source is None else tuple(source))[token]
            row += (token,)
        found[tokens] = total / ((5 + len(tokens)) / 6) ** length_penalty
    return sorted(found.items(), key=lambda item: -item[1])


def assert_same(hypotheses, expected) -> None:
    assert [tuple(hypothesis.tokens) for hypothesis in hypotheses] == [row for row, _ in expected]
    scores = [hypothesis.score for hypothesis in hypotheses]
    np.testing.assert_allclose(scores, [score for _, score in expected], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0, -1.0])
@pytest.mark.parametrize("end_token", [None, 2])
def test_beams_enough_for_all_find_what_an_exhaustive_search_finds(end_token, length_penalty):
    how = {"end_token": end_token, "length_penalty": length_penalty}
    (found,) = beam_search(model(), [[1, 3]], max_new_tokens=LENGTH, beams=ALL, **how)
    expected = exhaustive([1, 3], LENGTH, **how)
    assert len(expected) == (ALL if end_token is None else 1 + 3 + 9 + 27)
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "decoder"])
def test_so_do_other_families(name):
    source = [3, 0, 1] if name == "encoder_decoder" else None
    how = {"end_token": 0, "length_penalty": 1.0}
    sources = None if source is None else [source]
    (found,) = beam_search(
        model(name), [[2]], max_new_tokens=LENGTH, beams=ALL, source=sources, **how
    )
    assert_same(found, exhaustive([2], LENGTH, name=name, source=source, **how))


def test_length_penalties_change_what_is_best():
    best = {
        penalty: len(
            beam_search(
                model(),
                [[1, 3]],
                max_new_tokens=LENGTH,
                beams=ALL,
                end_token=2,
                length_penalty=penalty,
            )[0][0].tokens
        )
        for penalty in (-8.0, 8.0)
    }
    assert best[-8.0] < best[8.0]


@pytest.mark.parametrize("end_token", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("prompt", [[0], [1, 3], [2, 2, 1]])
def test_one_beam_is_greedy(prompt, end_token):
    (found,) = beam_search(model(), [prompt], max_new_tokens=4, beams=1, end_token=end_token)
    steps = generate(
        model(),
        [prompt],
        max_new_tokens=4,
        sampling=Sampling(temperature=0),
        end_token=end_token,
    )
    assert found[0].tokens == [int(step[0]) for step in steps]
    assert len(found) == 1


@pytest.mark.slow
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_scores_are_the_models_and_fall(beams):
    (found,) = beam_search(
        model(), [[1]], max_new_tokens=5, beams=beams, end_token=2, length_penalty=0.7
    )
    assert 1 <= len(found) <= beams
    assert len({tuple(hypothesis.tokens) for hypothesis in found}) == len(found)
    scores = [hypothesis.score for hypothesis in found]
    assert scores == sorted(scores, reverse=True)
    for tokens, score in found:
        total, row = 0.0, (1,)
        for token in tokens:
            total += log_probabilities("decoder", row, None)[token]
            row += (token,)
        assert score == pytest.approx(total / ((5 + len(tokens)) / 6) ** 0.7, abs=1e-4)
        assert 2 not in tokens[:-1]


def test_early_stopping_takes_the_first_that_end():
    prompt = [[1, 1, 2]]
    how = {"max_new_tokens": 5, "beams": 2, "end_token": 1, "length_penalty": 8.0}
    (early,) = beam_search(model(), prompt, early_stopping=True, **how)
    (late,) = beam_search(model(), prompt, **how)
    assert len(early) == 2
    assert all(hypothesis.tokens[-1] == 1 for hypothesis in early)
    assert max(len(hypothesis.tokens) for hypothesis in early) < 5
    # With so large a penalty a longer continuation still wins, if the search goes on.
    assert late[0].score > early[0].score
    assert len(late[0].tokens) == 5


def test_the_search_ends_when_no_beam_can_win(monkeypatch):
    steps, module = [], importlib.import_module("gptjax.decoding.beam_search")

    class Counted(module.Decoding):
        def read(self, rows, starts):
            steps.append(len(rows[0]))
            return super().read(rows, starts)

    monkeypatch.setattr(module, "Decoding", Counted)
    # The best first token is the end: with one beam nothing that follows another can be better.
    end = int(log_probabilities("decoder", (1, 3), None).argmax())
    beam_search(model(), [[1, 3]], max_new_tokens=6, beams=1, end_token=end)
    assert steps == [2]


@pytest.mark.slow
def test_prompts_and_sources_of_a_batch_are_searched_as_each_alone():
    prompts, sources = [[1, 3], [0], [2, 2, 1]], [[3], [0, 1, 2], [1, 1]]
    for name, read in (("decoder", None), ("encoder_decoder", sources)):
        how: Any = {"max_new_tokens": 4, "beams": 3, "end_token": 2}
        batch = beam_search(model(name), prompts, source=read, **how)
        for row, prompt in enumerate(prompts):
            source = None if read is None else [read[row]]
            alone = beam_search(model(name), [prompt], source=source, **how)[0]
            assert [found.tokens for found in batch[row]] == [found.tokens for found in alone]
            # XLA adds in another order for another number of rows: jax 0.12 differs by 2e-7.
            scores = [found.score for found in alone]
            assert [found.score for found in batch[row]] == pytest.approx(scores, rel=1e-6)
    assert len({tuple(found[0].tokens) for found in batch}) > 1


def test_the_search_ends_with_the_context():
    """And goes on for prompts of the batch that have not filled it."""
    prompts = [[1] * 6, [2, 1], [1] * 6]
    batch = beam_search(model(), prompts, max_new_tokens=50, beams=2)
    for prompt, found in zip(prompts, batch, strict=True):
        assert [len(hypothesis.tokens) for hypothesis in found] == [8 - len(prompt) + 1] * 2
    assert batch[1] == beam_search(model(), prompts[1:2], max_new_tokens=50, beams=2)[0]


def test_the_penalty_is_gnmts():
    (found,) = beam_search(model(), [[1]], max_new_tokens=4, beams=1, length_penalty=0.6)
    (plain,) = beam_search(model(), [[1]], max_new_tokens=4, beams=1)
    assert found[0].tokens == plain[0].tokens
    assert math.isclose(found[0].score, plain[0].score * (6 / 9) ** 0.6, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beams": 0}, "beams is 0: it must be at least 1"),
        ({"prompt": [[4]]}, "The prompt has token 4; the vocabulary has 4"),
        ({"prompt": [[1] * 9]}, "The prompt has 9 tokens; the model's context is 8"),
        ({"source": [[1]]}, "The family decoder reads no source"),
    ],
)
def test_what_cannot_be_searched_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        beam_search(model(), **{"prompt": [[1]], "beams": 2, "max_new_tokens": 2, **values})
