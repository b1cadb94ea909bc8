"""Autoregressive decoding with a key/value cache, greedy or sampled, for a batch of prompts."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from gptjax.config import InputError
from gptjax.config.values import DecodingWeights
from gptjax.decoding.programs import (
    MAX_PORTION,
    Choosing,
    State,
    Weights,
    compiling,
    prepared,
    programs,
    reordered,
    resized,
)
from gptjax.decoding.sampling import Filters, Sampling
from gptjax.models.build import LanguageModel, split

PORTION_SECONDS = 1 / 30
"""The longest that `generate` keeps tokens back, so that text still seems to flow."""


def generate(
    model: LanguageModel,
    prompt: Int[np.ndarray, "B T"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int | Sequence[int] = 0,
    end_token: int | Sequence[int] | None = None,
    sliding_window: bool = False,
    source: Int[np.ndarray, "B S"] | Sequence[Sequence[int]] | None = None,
    weights: DecodingWeights = "dtype",
) -> Iterator[Int[np.ndarray, " B"]]:
    """Continue each row of `prompt`, yielding the next tokens [B], int32, per step.

    Rows may differ in length; each is decoded as it would be alone with its own seed. A row that
    has reached `end_token` repeats it; decoding stops when all have, or when the longest of the
    others fills the context. With `sliding_window` that row is truncated to its last half context,
    which is read again, and decoding continues without what was cut. The device decodes several
    tokens per dispatch, as many as take `PORTION_SECONDS`.

    Args:
      model: a decoder, a recurrent model, or an encoder-decoder.
      prompt: tokens, B rows.
      max_new_tokens: the most tokens to decode per row.
      sampling: how tokens are chosen; None samples from the softmax.
      seed: of sampling, one per row, or the first row's, row i having `seed` + i; the key of a
        row's n-th token is `fold_in(random_key(its seed), n)`. Seeds are taken modulo 2³².
      end_token: the token that ends a row, or several such tokens.
      sliding_window: whether to continue past the end of the context.
      source: source tokens of an encoder-decoder, B rows.
      weights: "dtype" reads them in the model's dtype, "int8" a quarter of float32's bytes, with
        the error that `gptjax.layers.matrices` bounds.

    Raises:
      InputError: an empty prompt, one longer than the context, a token out of the vocabulary, or
        not as many seeds as rows.
    """
    context, size = model.config.context_length, model.config.vocab_size
    rows = checked_rows(model, prompt, "prompt")
    filters, reach = (sampling or Sampling()).filters(), max(map(len, rows))
    most = context if sliding_window else reach + max_new_tokens
    decoding = Decoding(model, len(rows), source, most, weights)
    is_end = np.isin(np.arange(size), end_tokens(end_token))
    choosing = Choosing(filters, _row_seeds(seed, len(rows)), jnp.asarray(is_end))
    state = first_state(rows, size, filters)
    if max_new_tokens < 1:
        return
    live, portion, dispatched = np.ones(len(rows), bool), 1, 1
    since = time.perf_counter()
    state, chosen = decoding.start(rows, state, choosing, more=max_new_tokens > 1)
    pending = [chosen]
    while True:
        # `reach` is the most tokens that a row has in the cache when all pending ones are decoded.
        steps = min(portion, max_new_tokens - dispatched, context - reach)
        if steps > 0:
            # Started before the last ones are fetched: the device does not wait for the host.
            reach, dispatched = reach + steps, dispatched + steps
            state, chosen = decoding.advance(reach, steps, state, choosing)
            pending.append(chosen)
        if not pending:
            return
        fetched = np.asarray(pending.pop(0))
        fetched = fetched[fetched[:, 0] >= 0]
        since, seconds = time.perf_counter(), time.perf_counter() - since
        lively = int(PORTION_SECONDS * len(fetched) / seconds)
        portion = min(4 * portion, MAX_PORTION, max(1, lively))
        for tokens in fetched:
            yield tokens
            # An ended row no longer grows, so that no other is truncated or stopped for it.
            live &= ~is_end[tokens]
            for row in np.flatnonzero(live):
                rows[row].append(int(tokens[row]))
        if not live.any():
            return
        if pending:
            continue
        reach = max(len(rows[row]) for row in np.flatnonzero(live)) - 1
        if reach == context and sliding_window and dispatched < max_new_tokens:
            half = max(1, context // 2)
            rows = [row[-half:] if len(row) > context else row for row in rows]
            decoding.reset()
            reach, dispatched = max(map(len, rows)), dispatched + 1
            state, chosen = decoding.start(rows, state, choosing)
            pending.append(chosen)


def end_tokens(given: int | Sequence[int] | None) -> list[int]:
    """The end tokens as a list, of one, several or none."""
    return [] if given is None else np.atleast_1d(given).tolist()


def first_state(rows: Sequence[Sequence[int]], vocab_size: int, filters: Filters) -> State:
    """The state before `rows` are read."""
    occurred = None
    if filters.penalty is not None:
        occurred = np.zeros((len(rows), vocab_size), bool)
        for row, tokens in enumerate(rows):
            occurred[row, tokens] = True
        occurred = jnp.asarray(occurred)
    none = jnp.zeros(len(rows), jnp.int32)
    return State(none, none, none.astype(bool), occurred, jnp.int32(0))


FIRST_SLOTS = {"cpu": 128}
"""The slots of a new cache by platform, 512 on others; where it is full, it gets four times as many
(on a CPU to read more takes time, and elsewhere to compile, since each size is a program)."""


class Decoding:
    """A model with its key/value cache for a batch of sequences, read incrementally.

    `most` is the most tokens that a sequence will have, by default the model's context; `weights`
    is as in `generate`.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int,
        source: Int[np.ndarray, "B S"] | Sequence[Sequence[int]] | None = None,
        most: int | None = None,
        weights: DecodingWeights = "dtype",
    ):
        context = model.config.context_length
        sources = checked_sources(model, source, batch_size)
        graphdef, self._params = split(model)
        self._programs = programs(graphdef)
        self._batch_size, self._source, source_mask = batch_size, None, None
        self._scanned = model.config.scan_layers
        self._most = _padded_length(context if most is None else most, context)
        if sources is not None:
            length = _padded_length(max(map(len, sources)), context)
            self._source, source_mask = map(jnp.asarray, padded(sources, length))
        params, layers = prepared(graphdef, self._params, weights)
        self._weights = Weights(params, layers, source_mask)
        self.reset()

    def reset(self) -> None:
        """Empty the cache, which for a recurrent model resets its state."""
        self._cache, self._slots = None, 0

    def read(
        self, rows: Sequence[Sequence[int]], starts: Int[np.ndarray, " B"] | None = None
    ) -> Float[Array, "B V"]:
        """The next-token logits after reading `rows`, each from its cache index in `starts`."""
        starts = np.zeros(len(rows), np.int32) if starts is None else starts
        first = int(starts.max())
        tokens, padding_mask = padded(rows, self._padded_length(rows, first))
        reach = first + tokens.shape[1]
        return self._run(self._programs.read, reach, tokens, padding_mask, starts)

    def start(
        self,
        rows: Sequence[Sequence[int]],
        state: State,
        choosing: Choosing,
        *,
        more: bool = True,
    ) -> tuple[State, Int[Array, "1 B"]]:
        """Read `rows` into the empty cache and choose the next tokens; the state, and these.

        If `more` tokens are to follow, `advance` is compiled meanwhile, the first time.
        """
        tokens, padding_mask = padded(rows, self._padded_length(rows, 0))
        state = state._replace(lengths=jnp.zeros(len(rows), jnp.int32))
        reach = tokens.shape[1]
        arguments = tokens, padding_mask, state, choosing
        if not more:
            return self._run(self._programs.start, reach, *arguments)
        self._grow(reach)
        following = self._weights, self._cache, np.int32(1), state, choosing
        with compiling(self._programs.advance, *following):
            return self._run(self._programs.start, reach, *arguments)

    def advance(
        self, reach: int, steps: int, state: State, choosing: Choosing
    ) -> tuple[State, Int[Array, "MAX_PORTION B"]]:
        """Decode up to `steps` tokens per row, fewer if all rows end; the state, and the tokens.

        At most `reach` slots of the cache are filled then. What is not decoded is -1.
        """
        return self._run(self._programs.advance, reach, np.int32(steps), state, choosing)

    def _padded_length(self, rows: Sequence[Sequence[int]], start: int) -> int:
        return _padded_length(max(map(len, rows)), self._most - start)

    def _run(self, program: Callable, reach: int, *arguments: Any) -> Any:
        """What a program returns that reads at most `reach` slots of the cache, and updates it."""
        self._grow(reach)
        output, self._cache = program(self._weights, self._cache, *arguments)
        return output

    def _grow(self, reach: int) -> None:
        """Let the cache have `reach` slots or more."""
        if reach <= self._slots:
            return
        slots = max(self._slots, FIRST_SLOTS.get(jax.default_backend(), 512))
        while slots < reach:
            slots *= 4
        self._slots = min(slots, self._most)
        if self._cache is None:
            given = self._params, self._source, self._weights.source_mask
            self._cache = self._programs.empty(*given, self._batch_size, self._slots)
        else:
            self._cache = resized(self._cache, self._slots)

    def reorder(self, order: Sequence[int]) -> None:
        """Reorder the cache: sequence i continues from sequence order[i]."""
        self._cache = reordered(self._cache, np.array(order, np.int32), int(self._scanned))


def _row_seeds(seed: int | Sequence[int], rows: int) -> UInt32[Array, " B"]:
    """The seed of each row, uint32."""
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + row for row in range(rows)]
    if len(seeds) != rows:
        raise InputError(f"There are {len(seeds)} seeds and {rows} rows: each row needs one.")
    return jnp.asarray(np.array([each % 2**32 for each in seeds], np.uint32))


def _padded_length(length: int, most: int) -> int:
    """`length` rounded up to a power of two, at most `most`, so that few shapes are compiled."""
    return min(1 << (length - 1).bit_length(), most)


def checked_rows(
    model: LanguageModel, rows: Int[np.ndarray, "B T"] | Sequence[Sequence[int]], name: str
) -> list[list[int]]:
    """Rows of tokens as lists.

    Raises:
      InputError: no rows, an empty row, one longer than the context, or an unknown token.
    """
    config, lists = model.config, [[int(token) for token in row] for row in rows]
    if not lists or not all(lists):
        raise InputError(f"The {name} is empty: it needs at least one token.")
    for row in lists:
        if len(row) > config.context_length:
            raise InputError(
                f"The {name} has {len(row)} tokens; the model's context is {config.context_length}."
            )
        for token in row:
            if not 0 <= token < config.vocab_size:
                raise InputError(
                    f"The {name} has token {token}; the vocabulary has {config.vocab_size}."
                )
    return lists


def checked_sources(
    model: LanguageModel,
    source: Int[np.ndarray, "B S"] | Sequence[Sequence[int]] | None,
    rows: int,
) -> list[list[int]] | None:
    """The source tokens of each of `rows` prompts; None for a family without an encoder.

    Raises:
      InputError: a family that does not generate, not one source per prompt, or a wrong one.
    """
    family = model.config.family
    if family == "encoder":
        raise InputError("The family encoder does not generate: its attention is bidirectional.")
    if family != "encoder_decoder":
        if source is not None:
            raise InputError(f"The family {family} reads no source.")
        return None
    if source is None:
        raise InputError(f"The family {family} reads a source: it needs one for each prompt.")
    sources = checked_rows(model, source, "source")
    if len(sources) != rows:
        raise InputError(f"The source has {len(sources)} rows and the prompt {rows}.")
    return sources


def padded(
    rows: Sequence[Sequence[int]], length: int
) -> tuple[Int[np.ndarray, "B length"], Bool[np.ndarray, "B length"]]:
    """Tokens padded with zeros, and the padding mask, True at tokens."""
    tokens = np.zeros((len(rows), length), np.int32)
    padding_mask = np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        padding_mask[index, : len(row)] = True
    return tokens, padding_mask
