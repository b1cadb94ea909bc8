"""Beam search: the likeliest continuations found, instead of the likeliest token at each step.

Source: Graves 2012, section 2.3; the length penalty, Wu et al. 2016 (GNMT), equation 14.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from gptjax.config import InputError
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
) -> list[list[Hypothesis]]:
    """The `beams` best continuations found of each row of `prompt`, best first.

    A continuation's log-probability is divided by ((5 + length) / 6)^length_penalty (GNMT, Wu et
    al. 2016, equation 14). A row's search ends when no live beam can still beat its worst finished
    hypothesis; with `early_stopping` as soon as it has `beams` finished ones.

    Args:
      model: a decoder, a recurrent model, or an encoder-decoder.
      prompt: tokens, B rows.
      max_new_tokens: the length at which live beams are truncated.
      beams: the number of live beams, and of hypotheses returned.
      end_token: the token that ends a continuation, or several such tokens.
      length_penalty: 0 compares log-probabilities; larger favours longer continuations.
      early_stopping: see above.
      source: source tokens of an encoder-decoder, B rows.

    Raises:
      InputError: `beams` below 1, or as `generate`.
    """
    if beams < 1:
        raise InputError(f"beams is {beams}: it must be at least 1.")
    prompts = checked_rows(model, prompt, "prompt")
    sources = checked_sources(model, source, len(prompts))
    found = []
    for tokens, read in zip(prompts, sources or [None] * len(prompts), strict=True):
        decoding = Decoding(model, beams, None if read is None else [read] * beams)
        longest = min(max_new_tokens, model.config.context_length - len(tokens) + 1)
        search = _BeamSearch(beams, end_tokens(end_token), length_penalty, early_stopping, longest)
        found.append(search.run(decoding, tokens))
    return found


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
        self._longest = longest

    def run(self, decoding: Decoding, prompt: list[int]) -> list[Hypothesis]:
        """The finished hypotheses of `prompt`, best first."""
        finished: list[Hypothesis] = []
        live: list[Hypothesis] = [Hypothesis([], 0.0)]
        unread, start = [prompt] * self._beams, 0
        for length in range(1, self._longest + 1):
            logits = decoding.read(unread, np.full(self._beams, start, np.int32))
            start += len(unread[0])
            scores = np.asarray(jax.nn.log_softmax(logits))[: len(live)]
            scores = scores + np.array([[beam.score] for beam in live])
            live, parents = self._extend(live, scores, finished)
            if not live or self._done(live, finished, length):
                break
            padding = self._beams - len(live)
            decoding.reorder(parents + [0] * padding)
            unread = [beam.tokens[-1:] for beam in live] + [live[0].tokens[-1:]] * padding
        else:
            self._keep(finished, [self._scored(beam.tokens, beam.score) for beam in live])
        return finished

    def _extend(
        self,
        live: list[Hypothesis],
        scores: Float[np.ndarray, "beams V"],
        finished: list[Hypothesis],
    ) -> tuple[list[Hypothesis], list[int]]:
        """The best `beams` unfinished extensions and their parents; finished ones are kept.

        `scores` [live beams, V] are the extensions' log-probabilities. As usual, a finished
        extension is kept only if it is among the best `beams`, so that one beam is greedy.
        """
        extended, parents = [], []
        # Each beam has one finished extension per end token, and needs an unfinished one.
        candidates = (1 + len(self._ends)) * self._beams
        for rank, index in enumerate(_largest(scores.ravel(), candidates)):
            parent, token = divmod(int(index), scores.shape[1])
            tokens, score = [*live[parent].tokens, token], float(scores[parent, token])
            if token in self._ends:
                if rank < self._beams:
                    self._keep(finished, [self._scored(tokens, score)])
            elif len(extended) < self._beams:
                extended.append(Hypothesis(tokens, score))
                parents.append(parent)
        return extended, parents

    def _scored(self, tokens: list[int], log_probability: float) -> Hypothesis:
        penalty = ((5 + len(tokens)) / 6) ** self._length_penalty
        return Hypothesis(tokens, log_probability / penalty)

    def _keep(self, finished: list[Hypothesis], candidates: list[Hypothesis]) -> None:
        finished += candidates
        finished.sort(key=lambda hypothesis: -hypothesis.score)
        del finished[self._beams :]

    def _done(self, live: list[Hypothesis], finished: list[Hypothesis], length: int) -> bool:
        if len(finished) < self._beams:
            return False
        # A log-probability only falls, and the largest penalty is that of the longest length.
        lengths = (length + 1, self._longest)
        bound = max(self._scored([0] * n, live[0].score).score for n in lengths)
        return self._early_stopping or bound <= finished[-1].score


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """The indices of the `count` largest of `values`, largest first."""
    if count < len(values):
        indices = np.argpartition(-values, count)[:count]
    else:
        indices = np.arange(len(values))
    return indices[np.argsort(-values[indices], kind="stable")]
