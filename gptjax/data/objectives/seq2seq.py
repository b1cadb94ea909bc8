"""Sequence-to-sequence objectives: the encoder reads a source, the decoder predicts a target.

Besides translation, T5's ways to make both from one text (Raffel et al. 2020, sections 3.1.4, 3.3.1
and 3.3.4): span corruption, and prefix language modelling. Each function makes one example and is
deterministic given its arguments and the state of `rng`.
"""

import bisect

import numpy as np

from gptjax.config import InputError
from gptjax.data.batch import Batch
from gptjax.data.objectives.vocabulary import Vocabulary

FEWEST = 2
"""Fewest tokens of a text that can be split in two."""


def span_corruption(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    vocabulary: Vocabulary,
    rate: float = 0.15,
    mean_span: float = 3.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Replace spans of a text by sentinels in the source; the target lists sentinels and spans.

    As in figure 2 of Raffel et al. 2020, without `end`, which `teacher_forcing` appends to both:

        Thank you for inviting me to your party last week
        source: Thank you <X> me to your party <Y> week
        target: <X> for inviting <Y> last <Z>

    As in their code (random_spans_noise_mask), the number of removed tokens and of spans follows
    from n alone; which tokens, from random partitions of the kept and of the removed tokens into as
    many non-empty parts, which alternate. So the first token is always kept and the last always
    removed. Their code writes no last sentinel; their figure does.

    Args:
      tokens: [n], n at least 2, none of them a sentinel.
      rng: source of randomness.
      vocabulary: with as many `sentinels` as `span_sentinels` says.
      rate: fraction of the tokens that are removed.
      mean_span: the mean length of a span, in tokens.

    Returns:
      source and target, int32, as long as `span_lengths` says.

    Raises:
      InputError: fewer tokens or sentinels, or an invalid rate or mean.
    """
    removed, spans = _removed_and_spans(len(tokens), rate, mean_span)
    if len(vocabulary.sentinels) <= spans:
        raise InputError(
            f"The vocabulary has {len(vocabulary.sentinels)} sentinels; {spans} spans of "
            f"{len(tokens)} tokens need {spans + 1}."
        )
    sentinels = np.array(vocabulary.sentinels[: spans + 1], np.int32)
    kept_lengths = _random_parts(len(tokens) - removed, spans, rng)
    removed_lengths = _random_parts(removed, spans, rng)
    lengths = np.stack([kept_lengths, removed_lengths], axis=1).ravel()
    is_removed = np.repeat(np.tile([False, True], spans), lengths)
    # A sentinel follows each kept part, and precedes each removed one.
    source = np.insert(tokens[~is_removed], np.cumsum(kept_lengths), sentinels[:-1])
    before = np.cumsum(removed_lengths) - removed_lengths
    target = np.insert(tokens[is_removed], np.append(before, removed), sentinels)
    return source.astype(np.int32), target.astype(np.int32)


def span_lengths(n: int, rate: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """Lengths of source and target that `span_corruption` makes from `n` tokens.

    The target has all the sentinels: one more than there are spans.

    Raises:
      InputError: fewer than 2 tokens, or an invalid rate or mean.
    """
    removed, spans = _removed_and_spans(n, rate, mean_span)
    return n - removed + spans, removed + spans + 1


def span_sentinels(n: int, rate: float = 0.15, mean_span: float = 3.0) -> int:
    """Number of sentinels that `span_corruption` needs for texts of up to `n` tokens.

    Raises:
      InputError: fewer than 2 tokens, or an invalid rate or mean.
    """
    _, spans = _removed_and_spans(n, rate, mean_span)
    return spans + 1


def span_input(
    source_length: int, target_length: int, rate: float = 0.15, mean_span: float = 3.0
) -> int:
    """The largest n whose source and target from `span_corruption` fit these lengths.

    The tokens that `teacher_forcing` adds are not counted: for its lengths pass one less of each.

    Raises:
      InputError: lengths too short for any text, or an invalid rate or mean.
    """

    def exceeds(n: int) -> bool:
        source, target = span_lengths(n, rate, mean_span)
        return source > source_length or target > target_length

    if exceeds(FEWEST):
        source, target = span_lengths(FEWEST, rate, mean_span)
        raise InputError(
            f"A source of {source_length} and a target of {target_length} tokens are too short: "
            f"{FEWEST} tokens make {source} and {target}."
        )
    # Both lengths grow with n, and their sum is at least n.
    every = range(FEWEST, source_length + target_length + 1)
    return FEWEST + bisect.bisect_left(every, True, key=exceeds) - 1


def _removed_and_spans(n: int, rate: float, mean_span: float) -> tuple[int, int]:
    """Numbers of removed tokens and of spans for n tokens, each at least 1."""
    if n < FEWEST:
        raise InputError(f"The text has {n} tokens; span corruption needs at least {FEWEST}.")
    if not 0 < rate < 1:
        raise InputError(f"rate is {rate}; it must be above 0 and below 1.")
    if mean_span < 1:
        raise InputError(f"mean_span is {mean_span}; it must be at least 1.")
    removed = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(removed / mean_span), 1), n - removed)
    return removed, spans


def _random_parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """[parts]: lengths of at least 1 that sum to `total`, each such partition equally likely."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def prefix(tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Split a text [n] at a random position into source and target, both non-empty.

    Prefix language modelling (Raffel et al. 2020, section 3.3.1; Liu et al. 2018).

    Raises:
      InputError: fewer than 2 tokens.
    """
    if len(tokens) < FEWEST:
        raise InputError(f"The text has {len(tokens)} tokens; a prefix needs at least {FEWEST}.")
    cut = rng.integers(1, len(tokens))
    return tokens[:cut], tokens[cut:]


def teacher_forcing(
    source: np.ndarray,
    target: np.ndarray,
    *,
    vocabulary: Vocabulary,
    source_length: int,
    target_length: int,
) -> Batch:
    """A teacher-forcing row: each token of `target`, and `end`, predicted from the true prefix.

    The decoder's input is `begin` and the target; it predicts the target and `end`. The source too
    ends in `end`, as Marian's and T5's do: the encoder can tell that the text is complete, and an
    empty source still has one key. The target's padding comes after all that is predicted, which
    a causal decoder cannot attend to, so that no `padding_mask` is needed.

    Args:
      source: [n].
      target: [m].
      vocabulary: with `begin` and `end`.
      source_length: S, at least n + 1.
      target_length: T, at least m + 1.

    Raises:
      InputError: a source or target that is too long, or a vocabulary that lacks a token.
    """
    begin, end = vocabulary.needed("begin"), vocabulary.needed("end")
    for name, text, length in (
        ("source", source, source_length),
        ("target", target, target_length),
    ):
        if len(text) >= length:
            raise InputError(
                f"The {name} has {len(text)} tokens; with its end, {name}_length {length} has "
                f"room for {length - 1}."
            )
    read, written = len(source) + 1, len(target) + 1
    sources = np.zeros(source_length, np.int32)
    sources[: read - 1], sources[read - 1] = source, end
    tokens, targets = np.zeros((2, target_length), np.int32)
    tokens[0], tokens[1:written] = begin, target
    targets[: written - 1], targets[written - 1] = target, end
    return Batch(
        tokens,
        targets,
        (np.arange(target_length) < written).astype(np.float32),
        source=sources,
        source_mask=np.arange(source_length) < read,
    )
