"""Beam search: the likeliest continuations found, instead of the likeliest token at each step.

Source: Graves 2012, section 2.3; the length penalty, Wu et al. 2016 (GNMT), equation 14.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from gptjax.config import InputError
from gptjax.config.values import DecodingWeights
from gptjax.decoding.generate import Decoding, checked_rows, checked_sources, end_tokens
from gptjax.models.build import LanguageModel


class Hypothesis(NamedTuple):
    """A continuation found by beam search."""

    tokens: list[int]
    """The new tokens, with the end token where it was reached."""
    score: float
    """Their log-probability divided by the length penalty; larger is better."""


def beam_search(
    model: LanguageModel,
    prompt: Int[np.ndarray, "B T"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    beams: int,
    end_token: int | Sequence[int] | None = None,
    length_penalty: float = 0.0,
    early_stopping: bool = False,
    source: Int[np.ndarray, "B S"] | Sequence[Sequence[int]] | None = None,
    weights: DecodingWeights = "dtype",
) -> list[list[Hypothesis]]:
    """The `beams` best continuations found of each row of `prompt`, best first.

    A continuation's log-probability is divided by ((5 + length) / 6)^length_penalty (GNMT, Wu et
    al. 2016, equation 14). A row's search ends when no live beam can still beat its worst finished
    hypothesis; with `early_stopping` as soon as it has `beams` finished ones. All prompts are
    decoded as one batch.

    Args:
      model: a decoder, a recurrent model, or an encoder-decoder.
      prompt: tokens, B rows.
      max_new_tokens: the length at which live beams are truncated.
      beams: the number of live beams, and of hypotheses returned.
      end_token: the token that ends a continuation, or several such tokens.
      length_penalty: 0 compares log-probabilities; larger favours longer continuations.
      early_stopping: see above.
      source: source tokens of an encoder-decoder, B rows.
      weights: as in `generate`.

    Raises:
      InputError: `beams` below 1, or as `generate`.
    """
    if beams < 1:
        raise InputError(f"beams is {beams}: it must be at least 1.")
    prompts, ends = checked_rows(model, prompt, "prompt"), end_tokens(end_token)
    sources, context = checked_sources(model, source, len(prompts)), model.config.context_length
    searches = [
        _BeamSearch(
            beams,
            ends,
            length_penalty,
            early_stopping,
            min(max_new_tokens, context - len(tokens) + 1),
        )
        for tokens in prompts
    ]
    most = max(len(row) + search.longest for row, search in zip(prompts, searches, strict=True))
    decoding = Decoding(model, beams * len(prompts), _repeated(sources, beams), most, weights)
    unread, starts = _repeated(prompts, beams), np.zeros(beams * len(prompts), np.int32)
    while any(search.live for search in searches):
        # Each beam has one finished extension per end token, and needs an unfinished one.
        candidates = min((1 + len(ends)) * beams, model.config.vocab_size)
        scores, tokens = map(np.asarray, _likeliest(decoding.read(unread, starts), candidates))
        order, following = [], []
        for index, search in enumerate(searches):
            own = slice(index * beams, (index + 1) * beams)
            if search.live:
                starts[own] += [len(row) for row in unread[own]]
                search.extend(scores[own], tokens[own])
            if not search.live:
                starts[own] = 0  # Its beams read on beside the others, whatever it is.
            spare = beams - len(search.live)
            parents = search.parents[: len(search.live)] + [0] * spare
            order += [own.start + parent for parent in parents]
            following += [beam.tokens[-1:] for beam in search.live] + [[0]] * spare
        decoding.reorder(order)
        unread = following
    return [search.finished for search in searches]


def _repeated(rows: Any, times: int) -> Any:
    """Each row that many times, or None."""
    return None if rows is None else [row for row in rows for _ in range(times)]


@functools.partial(jax.jit, static_argnums=1)
def _likeliest(
    logits: Float[Array, "B V"], count: int
) -> tuple[Float[Array, "B count"], Int[Array, "B count"]]:
    """The log-probabilities of the likeliest tokens, largest first, and these tokens."""
    values, tokens = jax.lax.top_k(jax.nn.log_softmax(logits), count)
    return values, tokens


class _BeamSearch:
    """Beam search for one prompt."""

    def __init__(
        self,
        beams: int,
        ends: list[int],
        length_penalty: float,
        early_stopping: bool,
        longest: int,
    ):
        self._beams = beams
        self._ends = ends
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self.longest = longest
        self.live = [Hypothesis([], 0.0)] if longest > 0 else []
        """The best unfinished hypotheses; none when the search has ended."""
        self.parents = []
        """The beams that the live ones extend."""
        self.finished: list[Hypothesis] = []
        """The best finished hypotheses, best first."""

    def extend(
        self, scores: Float[np.ndarray, "beams count"], tokens: Int[np.ndarray, "beams count"]
    ) -> None:
        """Extend the live hypotheses by the best `beams` unfinished extensions.

        `scores` are the log-probabilities of each beam's likeliest `tokens`. As usual, a finished
        extension is kept only if it is among the best `beams`, so that one beam is greedy.
        """
        total = scores[: len(self.live)] + np.array([[beam.score] for beam in self.live])
        extended, self.parents = [], []
        for rank, index in enumerate(np.argsort(-total, axis=None, kind="stable")):
            parent, column = divmod(int(index), total.shape[1])
            token = int(tokens[parent, column])
            row, score = [*self.live[parent].tokens, token], float(total[parent, column])
            if token in self._ends:
                if rank < self._beams:
                    self._keep([self._scored(row, score)])
            elif len(extended) < self._beams:
                extended.append(Hypothesis(row, score))
                self.parents.append(parent)
        self.live = extended
        if extended and len(extended[0].tokens) == self.longest:
            self._keep([self._scored(beam.tokens, beam.score) for beam in extended])
            self.live = []
        elif extended and self._done(len(extended[0].tokens)):
            self.live = []

    def _scored(self, tokens: list[int], log_probability: float) -> Hypothesis:
        penalty = ((5 + len(tokens)) / 6) ** self._length_penalty
        return Hypothesis(tokens, log_probability / penalty)

    def _keep(self, candidates: list[Hypothesis]) -> None:
        self.finished += candidates
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self._beams :]

    def _done(self, length: int) -> bool:
        """Whether no live hypothesis, of that length, can still beat the worst finished one."""
        if len(self.finished) < self._beams:
            return False
        # A log-probability only falls, and the largest penalty is that of the longest length.
        lengths = (length + 1, self.longest)
        bound = max(self._scored([0] * n, self.live[0].score).score for n in lengths)
        return self._early_stopping or bound <= self.finished[-1].score
