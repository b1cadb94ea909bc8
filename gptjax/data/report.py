"""Lines that describe the data of a run: `python -m gptjax data`."""

import itertools
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.cells import cell_len

from gptjax.data.batch import Batch
from gptjax.data.corpus import Corpus, Sources
from gptjax.data.objectives.vocabulary import Vocabulary
from gptjax.data.tokenizers import Tokenizer
from gptjax.data.tokenizers.protocol import REPLACEMENT

SECONDS = 1.0
"""How long batches are made to measure their speed."""
SHOWN_BATCHES, SHOWN_ROWS = 3, 2
SHOWN_TOKENS = 96
"""Tokens shown per row; the rest is counted."""
WIDTH = 96
"""Columns of a drawn row, before it wraps."""
BAR = 40
"""Length of the histogram's longest bar."""
Marks = dict[str, list[str]]
"""The marks below each token, by the name of their line."""
INVISIBLE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def report(
    sources: Sources,
    tokenizer: Tokenizer,
    corpus: Corpus,
    batches: Iterator[Batch],
    *,
    opening_seconds: float,
) -> Iterator[str]:
    """Lines about the training part: sizes, lengths, the first batches, speed."""
    yield from _sizes(sources, corpus)
    if tokenizer.end_token is not None:
        yield f"each document ends with the token {tokenizer.end_token}, drawn as [end]"
    elif sources.several:
        yield f"documents have no mark between them: {tokenizer.name} has no end token"
    if opening_seconds >= 1:
        speed = corpus.train_tokens / opening_seconds
        yield f"  opened in {opening_seconds:.1f} s, {speed:,.0f} tokens/s"
    shown = list(itertools.islice(batches, SHOWN_BATCHES))
    yield from _rows(sources, corpus, shown[0])
    for number, batch in enumerate(shown):
        for row in range(min(SHOWN_ROWS, len(batch.tokens))):
            yield f"batch {number}, row {row}"
            yield from drawn(batch, row, tokenizer, corpus.vocabulary)
    yield from _speed(batches)


def _sizes(sources: Sources, corpus: Corpus) -> Iterator[str]:
    """A table of the sources, and a histogram of their documents by powers of two."""
    columns = ("documents", "empty", "bytes", "tokens", "tokens/byte")
    names = [documents.name for documents in [*sources.train, *sources.train_targets]]
    width = max(map(len, names))
    histogram = np.zeros(64, np.int64)
    yield f"{'trained on':<{width}}" + "".join(f"{column:>16}" for column in columns)
    for name, store in zip(names, corpus.stores, strict=True):
        empty = 0
        for _, lengths in store.blocks():
            empty += int((lengths == 0).sum())
            # An exponent is the number of binary digits.
            digits = np.frexp(lengths[lengths > 0])[1]
            histogram += np.bincount(digits, minlength=len(histogram))
        numbers = (store.documents, empty, store.bytes, len(store.tokens))
        cells = [f"{number:,}" for number in numbers]
        cells.append(f"{len(store.tokens) / store.bytes:.4f}")
        yield f"{name:<{width}}" + "".join(f"{cell:>16}" for cell in cells)
    yield "tokens per document"
    for digits in np.flatnonzero(histogram).tolist():
        count = int(histogram[digits])
        bar = "█" * max(1, round(BAR * count / histogram.max()))
        yield f"  {2 ** (digits - 1):>11,} to {2**digits - 1:<11,} {count:>11,}  {bar}"


def _rows(sources: Sources, corpus: Corpus, batch: Batch) -> Iterator[str]:
    """Numbers of rows and their lengths."""
    for bucket in corpus.train:
        if len(bucket):
            row = bucket.row(0, np.random.default_rng(0))
            lengths = f"{len(row.tokens)} tokens"
            if row.source is not None:
                lengths = f"{len(row.source)} tokens, and {lengths} of the target"
            steps = len(bucket) / len(batch.tokens)
            yield f"{len(bucket):,} rows of {lengths}; an epoch is {steps:,.1f} batches"
    pairs = sum(len(documents) for documents in sources.train_targets)
    if pairs:
        left_out = pairs - sum(map(len, corpus.train))
        yield f"{left_out:,} of {pairs:,} pairs left out: empty, or longer than the context"


def _speed(batches: Iterator[Batch]) -> Iterator[str]:
    start = time.perf_counter()
    positions = used = predicted = 0
    while time.perf_counter() - start < SECONDS:
        batch = next(batches)
        for filled in _filled(batch):
            positions, used = positions + filled.size, used + int(filled.sum())
        predicted += int((batch.loss_weights > 0).sum())
    seconds = time.perf_counter() - start
    yield (
        f"{used / positions:.1%} of the positions hold tokens, {predicted / positions:.1%} are "
        f"predicted; {positions / seconds:,.0f} positions/s from {seconds:.1f} s of batches"
    )
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    yield f"peak memory {peak / 2**20:,.0f} MiB"


def _filled(batch: Batch) -> list[np.ndarray]:
    """Masks of the positions that hold tokens, one per array of tokens."""
    if batch.source_mask is not None:
        return [np.asarray(batch.source_mask), np.asarray(batch.loss_weights) > 0]
    if batch.segment_ids is not None:
        return [np.asarray(batch.segment_ids) > 0]
    valid = batch.loss_weights if batch.padding_mask is None else batch.padding_mask
    return [np.asarray(valid) > 0]


def drawn(batch: Batch, row: int, tokenizer: Tokenizer, vocabulary: Vocabulary) -> Iterator[str]:
    """Lines that draw a row of a batch: its tokens, with marks below each.

    A `^` marks a token whose target counts in the loss; documents and segments are shown by the
    last digit of their numbers; padding is not drawn.
    """
    one = batch.apply(lambda array: array[row])
    filled = _filled(one)
    if one.source is not None:
        yield from _lines(labels(one.source[filled[0]], tokenizer, vocabulary), {}, name="source")
    row_labels = labels(one.tokens[filled[-1]], tokenizer, vocabulary)
    marks: Marks = {"predicted": ["^" if weight else " " for weight in one.loss_weights]}
    for name, values in (("documents", one.segment_ids), ("segments", one.token_types)):
        if values is not None:
            marks[name] = [str(value % 10) for value in values]
    yield from _lines(row_labels, marks, name="tokens")
    predicted = np.asarray(one.loss_weights) > 0
    if one.source is None and not np.array_equal(predicted, filled[-1]):
        targets = labels(one.targets[predicted], tokenizer, vocabulary)
        yield from _lines([f"{label} " for label in targets], {}, name="targets")
    if one.next_sentence is not None:
        yield f"  {'next':<10}{'another text' if one.next_sentence else 'it follows'}"


def _lines(labels: Sequence[str], marks: Marks, *, name: str) -> Iterator[str]:
    """Tokens on wrapped lines, with their marks below."""
    left, labels = len(labels) - SHOWN_TOKENS, labels[:SHOWN_TOKENS]
    widths = [cell_len(label) for label in labels]
    starts, filled = [0], 0
    for index, width in enumerate(widths):
        if filled + width > WIDTH and filled:
            starts.append(index)
            filled = 0
        filled += width
    for first, last in itertools.pairwise([*starts, len(labels)]):
        yield f"  {name:<10}{''.join(labels[first:last])}"
        for mark, values in marks.items():
            line = "".join(
                value * width
                for value, width in zip(values[first:last], widths[first:last], strict=True)
            )
            yield f"  {mark:<10}{line}".rstrip()
    if left > 0:
        yield f"  {'':<10}and {left} more"


def labels(tokens: Any, tokenizer: Tokenizer, vocabulary: Vocabulary) -> list[str]:
    """Each token's text, without line breaks; for a special token its meaning."""
    found, before = [], []
    for token in np.asarray(tokens).tolist():
        if vocabulary.special[token]:
            found.append(_meaning(token, tokenizer, vocabulary))
            before = []
            continue
        text = tokenizer.decode([token])
        if REPLACEMENT not in text:
            # What it adds after the one before it: some tokenizers put a space between them.
            text = tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]
        elif token < tokenizer.vocab_size:  # Part of a character is shown as bytes: \xe6\x9c.
            text = tokenizer.token_bytes(token).decode("utf-8", "backslashreplace") or text
        found.append("".join(map(_visible, text)) or REPLACEMENT)  # Marks need a column.
        before = [token]
    return found


def _visible(character: str) -> str:
    """A character, or a visible stand-in for an invisible one."""
    shown = INVISIBLE.get(character, character)
    return shown if shown.isprintable() else shown.encode("unicode_escape").decode()


def _meaning(token: int, tokenizer: Tokenizer, vocabulary: Vocabulary) -> str:
    """The meaning of a special token, in brackets."""
    if token in vocabulary.sentinels:
        return f"[{vocabulary.sentinels.index(token)}]"
    added = {"begin": vocabulary.begin, "end": vocabulary.end, "mask": vocabulary.mask}
    meanings = [*tokenizer.special.items(), *added.items()]
    return next((f"[{name}]" for name, of in meanings if of == token), f"[{token}]")
