"""What an encoder-decoder is asked: a source is read, a target written, token by token.

Besides translation, T5's ways to make both of one text (Raffel et al. 2020, sections 3.1.4, 3.3.1
and 3.3.4): spans that were taken out, and the rest of what was begun. Each function makes one
example, and follows from its arguments and the state of `rng` alone.
"""

import bisect

import numpy as np

from gptjax.config import InputError
from gptjax.data.batch import Batch
from gptjax.data.objectives.vocabulary import Vocabulary

FEWEST = 2
"""The tokens of a text that can be parted in two."""


def span_corruption(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    vocabulary: Vocabulary,
    rate: float = 0.15,
    mean_span: float = 3.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Take spans out of a text: the source has a sentinel for each, the target what it stands for.

    As in figure 2 of Raffel et al. 2020, without `end`, which `teacher_forcing` puts behind both:

        Thank you for inviting me to your party last week
        source: Thank you <X> me to your party <Y> week
        target: <X> for inviting <Y> last <Z>

    As in their code (random_spans_noise_mask), how many tokens are taken, and in how many spans,
    follows from n alone; which, from two random partitions of what is kept and what is taken into
    as many parts, none of them empty, that take turns. So the first token is always kept and the
    last one always taken. Their code writes no last sentinel; their figure does.

    Args:
      tokens: [n], n at least 2, none of them a sentinel.
      rng: where the choice comes from.
      vocabulary: with as many `sentinels` as `span_sentinels` says.
      rate: how many of the tokens are taken.
      mean_span: the mean length of a span, in tokens.

    Returns:
      source and target, int32, as long as `span_lengths` says.

    Raises:
      InputError: fewer tokens or sentinels, or a rate or a mean that cannot be.
    """
    taken, spans = _taken_and_spans(len(tokens), rate, mean_span)
    if len(vocabulary.sentinels) <= spans:
        raise InputError(
            f"The vocabulary has {len(vocabulary.sentinels)} sentinels; {spans} spans of "
            f"{len(tokens)} tokens need {spans + 1}."
        )
    sentinels = np.array(vocabulary.sentinels[: spans + 1], np.int32)
    kept_lengths = _random_parts(len(tokens) - taken, spans, rng)
    taken_lengths = _random_parts(taken, spans, rng)
    lengths = np.stack([kept_lengths, taken_lengths], axis=1).ravel()
    is_taken = np.repeat(np.tile([False, True], spans), lengths)
    # A sentinel stands behind each part that is kept, and before each that is taken.
    source = np.insert(tokens[~is_taken], np.cumsum(kept_lengths), sentinels[:-1])
    before = np.cumsum(taken_lengths) - taken_lengths
    target = np.insert(tokens[is_taken], np.append(before, taken), sentinels)
    return source.astype(np.int32), target.astype(np.int32)


def span_lengths(n: int, rate: float = 0.15, mean_span: float = 3.0) -> tuple[int, int]:
    """The tokens of source and target that `span_corruption` makes of `n`.

    The target has all the sentinels: one more than there are spans.

    Raises:
      InputError: fewer than 2 tokens, or a rate or a mean that cannot be.
    """
    taken, spans = _taken_and_spans(n, rate, mean_span)
    return n - taken + spans, taken + spans + 1


def span_sentinels(n: int, rate: float = 0.15, mean_span: float = 3.0) -> int:
    """The sentinels that `span_corruption` needs for texts of up to `n` tokens.

    Raises:
      InputError: fewer than 2 tokens, or a rate or a mean that cannot be.
    """
    _, spans = _taken_and_spans(n, rate, mean_span)
    return spans + 1


def span_input(
    source_length: int, target_length: int, rate: float = 0.15, mean_span: float = 3.0
) -> int:
    """The largest n of which `span_corruption` makes no longer source and target than these.

    What `teacher_forcing` adds is not counted: for its lengths ask with one less of each.

    Raises:
      InputError: no text is as short, or a rate or a mean that cannot be.
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
    # Both lengths grow with n, and together they have all of its tokens.
    every = range(FEWEST, source_length + target_length + 1)
    return FEWEST + bisect.bisect_left(every, True, key=exceeds) - 1


def _taken_and_spans(n: int, rate: float, mean_span: float) -> tuple[int, int]:
    """How many of n tokens are taken, and in how many spans, at least one of each."""
    if n < FEWEST:
        raise InputError(f"The text has {n} tokens; span corruption needs at least {FEWEST}.")
    if not 0 < rate < 1:
        raise InputError(f"rate is {rate}; it must be above 0 and below 1.")
    if mean_span < 1:
        raise InputError(f"mean_span is {mean_span}; it must be at least 1.")
    taken = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(taken / mean_span), 1), n - taken)
    return taken, spans


def _random_parts(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """[parts]: lengths of at least 1 that sum to `total`, each such partition equally likely."""
    cuts = np.sort(rng.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def prefix(tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A text [n] parted at a random place: source and target, neither of them empty.

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
    """A row in which each token of `target`, and its end, is predicted from the true ones before.

    The decoder is given `begin` and the target, and is to write the target and `end`. The source
    too ends in `end`, as Marian's and T5's do: the encoder sees that the text is over and not cut,
    and a source of no tokens still has one to be looked at. The target's padding lies behind all
    that is predicted, where a causal decoder cannot look, so that there is no `valid`.

    Args:
      source: [n].
      target: [m].
      vocabulary: with `begin` and `end`.
      source_length: S, at least n + 1.
      target_length: T, at least m + 1.

    Raises:
      InputError: a source or a target that is too long, or a vocabulary that lacks a token.
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
