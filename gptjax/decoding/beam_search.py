"""Beam search: the likeliest continuations rather than one after another's likeliest token.

Source: Graves 2012, section 2.3; the length penalty, Wu et al. 2016 (GNMT), equation 14.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from gptjax.config import InputError
from gptjax.decoding.generate import Decoding, checked_rows, checked_sources, end_tokens
from gptjax.models.build import LanguageModel


class Hypothesis(NamedTuple):
    """One continuation that beam search has found."""

    tokens: list[int]
    """The new tokens, the end token included where it was reached."""
    score: float
    """Their log-probability over the length penalty; larger is better."""


def beam_search(
    model: LanguageModel,
    prompt: np.ndarray | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    beams: int,
    end_token: int | Sequence[int] | None = None,
    length_penalty: float = 0.0,
    early_stopping: bool = False,
    source: np.ndarray | Sequence[Sequence[int]] | None = None,
) -> list[list[Hypothesis]]:
    """The `beams` best continuations found of each row of `prompt`, best first.

    A continuation's log-probability is divided by ((5 + length) / 6)^length_penalty (GNMT, Wu et
    al. 2016, equation 14). A row's search ends when no live beam can beat its worst kept
    continuation any more; with `early_stopping` as soon as it has `beams` of them.

    Args:
      model: a decoder, a recurrent model, or an encoder-decoder.
      prompt: tokens, B rows.
      max_new_tokens: the length at which live beams are cut.
      beams: how many continuations live, and how many are kept.
      end_token: the token that ends a continuation, or several such tokens.
      length_penalty: 0 compares log-probabilities; larger favours longer continuations.
      early_stopping: see above.
      source: what an encoder-decoder reads, B rows.

    Raises:
      InputError: `beams` below 1, or what `generate` refuses.
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
    """The search for one prompt."""

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
        """The kept continuations of `prompt`, best first."""
        kept: list[Hypothesis] = []
        live: list[Hypothesis] = [Hypothesis([], 0.0)]
        unread, start = [prompt] * self._beams, 0
        for length in range(1, self._longest + 1):
            logits = decoding.read(unread, np.full(self._beams, start, np.int32))
            start += len(unread[0])
            scores = np.asarray(jax.nn.log_softmax(logits))[: len(live)]
            scores = scores + np.array([[beam.score] for beam in live])
            live, parents = self._extend(live, scores, kept)
            if not live or self._done(live, kept, length):
                break
            padding = self._beams - len(live)
            decoding.reorder(parents + [0] * padding)
            unread = [beam.tokens[-1:] for beam in live] + [live[0].tokens[-1:]] * padding
        else:
            self._keep(kept, [self._scored(beam.tokens, beam.score) for beam in live])
        return kept

    def _extend(
        self, live: list[Hypothesis], scores: np.ndarray, kept: list[Hypothesis]
    ) -> tuple[list[Hypothesis], list[int]]:
        """The best `beams` unended extensions and their parents; what ended is kept.

        `scores` [beams that live, V] are the extensions' log-probabilities. As usual, an end is
        kept only where it is among the best `beams` extensions, so that one beam is greedy.
        """
        extended, parents = [], []
        # Each beam has as many extensions that end as there are end tokens, and needs one more.
        candidates = (1 + len(self._ends)) * self._beams
        for rank, index in enumerate(_largest(scores.ravel(), candidates)):
            parent, token = divmod(int(index), scores.shape[1])
            tokens, score = [*live[parent].tokens, token], float(scores[parent, token])
            if token in self._ends:
                if rank < self._beams:
                    self._keep(kept, [self._scored(tokens, score)])
            elif len(extended) < self._beams:
                extended.append(Hypothesis(tokens, score))
                parents.append(parent)
        return extended, parents

    def _scored(self, tokens: list[int], log_probability: float) -> Hypothesis:
        penalty = ((5 + len(tokens)) / 6) ** self._length_penalty
        return Hypothesis(tokens, log_probability / penalty)

    def _keep(self, kept: list[Hypothesis], candidates: list[Hypothesis]) -> None:
        kept += candidates
        kept.sort(key=lambda hypothesis: -hypothesis.score)
        del kept[self._beams :]

    def _done(self, live: list[Hypothesis], kept: list[Hypothesis], length: int) -> bool:
        if len(kept) < self._beams:
            return False
        # A log-probability only falls, and is divided at most by the longest length's penalty.
        lengths = (length + 1, self._longest)
        reachable = max(self._scored([0] * n, live[0].score).score for n in lengths)
        return self._early_stopping or reachable <= kept[-1].score


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` largest of `values`, largest first."""
    if count < len(values):
        places = np.argpartition(-values, count)[:count]
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")]
