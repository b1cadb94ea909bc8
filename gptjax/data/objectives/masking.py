"""BERT's objectives: masked language modelling and next-sentence prediction.

Devlin et al. 2018, section 3.1 and appendix A.1 and A.2. Each function makes one row, the arrays of
a `Batch` without their axis B, and is deterministic given its arguments and the state of `rng`.
"""

import numpy as np

from gptjax.config import InputError
from gptjax.data.batch import Batch
from gptjax.data.objectives.vocabulary import Vocabulary

MASKED, RANDOM = 0.8, 0.1
"""Fractions of the chosen tokens that become `mask` and a random token; the rest stay."""

FRAME = 3
"""Special tokens of a pair: begin, and an end after each segment."""


def masked_lm(
    tokens: np.ndarray,
    rng: np.random.Generator,
    *,
    vocabulary: Vocabulary,
    starts: np.ndarray | None = None,
    rate: float = 0.15,
    frozen: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose `rate` of the tokens as targets; mask 80% of them, replace 10% at random, keep 10%.

    Of n eligible tokens round(rate · n) are chosen, and at least one if there is one; the released
    code (google-research/bert, create_pretraining_data.py) counts the special tokens in n too, and
    may draw one of them as a replacement.

    Whole words are chosen as that code does with do_whole_word_mask: in random order, skipping each
    that would exceed the number, until it is reached. Where every word is too long, that code
    chooses none; we choose the first.

    Args:
      tokens: [T].
      rng: source of randomness.
      vocabulary: with `mask`; its special tokens are never chosen.
      starts: [T], bool, where words begin, from `vocabulary.word_starts`: whole words are chosen.
        None chooses single tokens.
      rate: fraction of the tokens that are chosen.
      frozen: [T], bool: further tokens that are never chosen, such as padding.

    Returns:
      inputs [T], int32; targets [T], int32: the original tokens; weights [T], float32: 1 at the
      chosen ones.

    Raises:
      InputError: a rate outside (0, 1], or a vocabulary without `mask`.
    """
    if not 0 < rate <= 1:
        raise InputError(f"rate is {rate}; it must be above 0 and at most 1.")
    mask = vocabulary.needed("mask")
    free = ~vocabulary.special[tokens]
    if frozen is not None:
        free &= ~frozen
    positions = np.flatnonzero(free)
    inputs, targets = tokens.astype(np.int32), tokens.astype(np.int32)
    weights = np.zeros(len(tokens), np.float32)
    if positions.size == 0:
        return inputs, targets, weights
    number = max(1, round(rate * positions.size))
    if starts is None:
        chosen = rng.permutation(positions)[:number]
    else:
        chosen = _whole_words(np.cumsum(starts)[positions], positions, number, rng)
    weights[chosen] = 1
    lot = rng.random(chosen.size)
    inputs[chosen[lot < MASKED]] = mask
    changed = chosen[(lot >= MASKED) & (lot < MASKED + RANDOM)]
    inputs[changed] = rng.choice(vocabulary.ordinary, changed.size)
    return inputs, targets, weights


def _whole_words(
    words: np.ndarray, positions: np.ndarray, number: int, rng: np.random.Generator
) -> np.ndarray:
    """Positions of random whole words, at most `number` of them, or those of one longer word.

    Args:
      words: [n], the index of the word at each position, ascending.
      positions: [n].
      number: how many positions are wanted.
      rng: source of randomness.
    """
    first = np.flatnonzero(np.diff(words, prepend=words[0] - 1))
    lengths = np.diff(first, append=len(words))
    order = rng.permutation(len(first))
    taken, room = [], number
    for word, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length <= room:
            taken.append(word)
            room -= length
            if room == 0:
                break
    chosen = np.zeros(len(first), bool)
    chosen[taken or order[:1]] = True
    return positions[np.repeat(chosen, lengths)]


def next_sentence(
    document: np.ndarray,
    other: np.ndarray,
    rng: np.random.Generator,
    *,
    vocabulary: Vocabulary,
    context_length: int,
    rate: float = 0.15,
    whole_words: bool = False,
) -> Batch:
    """A row [begin] A [end] B [end] with masked tokens, and whether B follows A in the text.

    A sentence is any span of text (section 3). A is `document` up to a random position. In half of
    the rows B is what follows it there, and `next_sentence` is 0; in the others it is a random
    span of `other`, and `next_sentence` is 1. That span is as long as what it replaces where
    `other` is long enough, so that lengths do not give the answer away.

    Args:
      document: [n], n at least 2: a piece of a document.
      other: [m], m at least 1: a piece of another document.
      rng: source of randomness.
      vocabulary: with `begin`, `end` and `mask`.
      context_length: T, the tokens of a row. Longer pairs are cut by `shortened`, shorter ones
        padded.
      rate: see `masked_lm`.
      whole_words: whether whole words are chosen.

    Raises:
      InputError: texts or a context that are too short, or a vocabulary that lacks a token.
    """
    if len(document) < 2 or len(other) < 1:
        raise InputError(
            f"The document has {len(document)} tokens and the other one {len(other)}: "
            "a pair of sentences needs 2 and 1."
        )
    if context_length < FRAME + 2:
        raise InputError(
            f"context_length is {context_length}; a pair of sentences needs at least {FRAME + 2}."
        )
    begin, end = vocabulary.needed("begin"), vocabulary.needed("end")
    cut = rng.integers(1, len(document))
    first, second = document[:cut], document[cut:]
    is_random = rng.integers(2)
    if is_random:
        length = min(len(second), len(other))
        start = rng.integers(len(other) - length + 1)
        second = other[start : start + length]
    first, second = shortened(first, second, context_length - FRAME, rng)
    border, used = len(first) + 2, len(first) + len(second) + FRAME
    tokens = np.zeros(context_length, np.int32)
    tokens[0], tokens[border - 1], tokens[used - 1] = begin, end, end
    tokens[1 : border - 1], tokens[border : used - 1] = first, second
    valid = np.arange(context_length) < used
    token_types = np.zeros(context_length, np.int32)
    token_types[border:used] = 1
    inputs, targets, weights = masked_lm(
        tokens,
        rng,
        vocabulary=vocabulary,
        starts=vocabulary.word_starts(tokens) if whole_words else None,
        rate=rate,
        frozen=~valid,
    )
    return Batch(
        inputs,
        targets,
        weights,
        padding_mask=valid,
        token_types=token_types,
        next_sentence=np.asarray(is_random, np.int32),
    )


def shortened(
    first: np.ndarray, second: np.ndarray, room: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Two texts [n] and [m], truncated to at most `room` tokens in total.

    Like the released code's truncate_seq_pair, in which the longer one, or the second of two equal
    ones, repeatedly loses a token at either end with equal probability; computed in closed form.
    """
    if len(first) + len(second) <= room:
        return first, second
    # The shorter one stays whole unless it is longer than half of `room`.
    first_length = min(len(first), max((room + 1) // 2, room - len(second)))
    parts = []
    for text, length in ((first, first_length), (second, room - first_length)):
        start = rng.binomial(len(text) - length, 0.5)
        parts.append(text[start : start + length])
    return parts[0], parts[1]
