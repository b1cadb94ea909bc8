"""Autoregressive decoding with a key/value cache, greedy or sampled, for a batch of prompts.

Sources: temperature, Ackley et al. 1985; top-k, Fan et al. 2018; top-p (nucleus), Holtzman et al.
2020; min-p, Nguyen et al. 2024; repetition penalty, CTRL (Keskar et al. 2019, section 4.1). They
are applied in this order, but the penalty first, as in Hugging Face transformers.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from gptjax.config import InputError
from gptjax.models.build import LanguageModel, Params, split
from gptjax.parallel.keys import random_key

SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""The smallest normal float32; a temperature below it is greedy decoding."""
PENALTIES = 1e-6, 1e6
"""The least and the largest repetition penalty for which logits stay finite."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled.

    Raises:
      InputError: a value out of range.
    """

    temperature: float = 1.0
    """Divides the logits; 0, or a number that float32 rounds to 0, is greedy decoding."""
    top_k: int = 0
    """Sample from this many of the most likely tokens; 0 takes all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Sample from tokens with at least this fraction of the most likely token's probability."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that occurred, and multiplies the negative ones."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}: it must be at least 0.")
        if self.top_k < 0:
            raise InputError(f"top-k is {self.top_k}: it must be at least 0.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}: it must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min-p is {self.min_p}: it must be at least 0 and at most 1.")
        if not PENALTIES[0] <= self.repetition_penalty <= PENALTIES[1]:
            raise InputError(
                f"repetition-penalty is {self.repetition_penalty}: it must be at least "
                f"{PENALTIES[0]:g} and at most {PENALTIES[1]:g}."
            )


def filtered_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits divided by the temperature, -inf where top-k, top-p or min-p exclude a token.

    The most likely token gets 0 and is never excluded. The temperature is above 0.
    """
    # Relative to the largest, since a logit divided by the temperature may be infinite.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest_kept = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = jnp.where(before < sampling.top_p, descending, 0)
        logits = jnp.where(logits < kept.min(axis=-1, keepdims=True), -jnp.inf, logits)
    if sampling.min_p:
        logits = jnp.where(logits < math.log(sampling.min_p), -jnp.inf, logits)
    return logits


def penalised_logits(
    logits: Float[Array, "B V"], occurred: Bool[Array, "B V"], penalty: float
) -> Float[Array, "B V"]:
    """Logits after the repetition penalty of the tokens that `occurred` (CTRL)."""
    return jnp.where(occurred, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits: Float[Array, "B V"], sampling: Sampling, key: jax.Array) -> Int[Array, " B"]:
    """Next tokens, int32, greedy or sampled from the filtered softmax of `logits`."""
    if sampling.temperature < SMALLEST_TEMPERATURE:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    chosen = jax.random.categorical(key, filtered_logits(logits, sampling), axis=-1)
    return chosen.astype(jnp.int32)


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
) -> Iterator[Int[np.ndarray, " B"]]:
    """Continue each row of `prompt`, yielding the next tokens [B], int32, per step.

    Rows may differ in length; each is decoded as it would be alone with its own seed. A row that
    has reached `end_token` repeats it; decoding stops when all have, or when the longest of the
    others fills the context. With `sliding_window` that row is truncated to its last half context,
    which is read again, and decoding continues without what was cut.

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

    Raises:
      InputError: an empty prompt, one longer than the context, a token out of the vocabulary, or
        not as many seeds as rows.
    """
    sampling, context_length = sampling or Sampling(), model.config.context_length
    rows = checked_rows(model, prompt, "prompt")
    decoding = Decoding(model, len(rows), source)
    choose_next = functools.partial(_choose_next, sampling)
    occurred = None
    if sampling.repetition_penalty != 1:
        occurred = np.zeros((len(rows), model.config.vocab_size), bool)
        for row, tokens in enumerate(rows):
            occurred[row, tokens] = True
    seeds, ends = _row_seeds(seed, len(rows)), end_tokens(end_token)
    ended, last_tokens = np.zeros(len(rows), bool), np.zeros(len(rows), np.int32)
    logits, lengths = decoding.read(rows), _lengths(rows)
    for index in range(max_new_tokens):
        chosen, occurred = choose_next(logits, occurred, seeds, index)
        last, full = index == max_new_tokens - 1, lengths[~ended].max() == context_length
        if not (last or full):
            # Started before these tokens are fetched: the device does not wait for the host.
            logits = decoding.read_chosen(chosen, lengths)
        tokens = last_tokens = np.where(ended, last_tokens, np.asarray(chosen)[:, 0])
        yield tokens
        ended |= np.isin(tokens, ends)
        if last or ended.all() or (full and not sliding_window):
            return
        # An ended row no longer grows, so that no other is truncated or stopped for it.
        rows = [
            row if done else [*row, int(token)]
            for row, token, done in zip(rows, tokens, ended, strict=True)
        ]
        lengths = lengths + ~ended
        if full:
            half = max(1, context_length // 2)
            rows = [row[-half:] if len(row) > context_length else row for row in rows]
            decoding.reset()
            logits, lengths = decoding.read(rows), _lengths(rows)


def end_tokens(given: int | Sequence[int] | None) -> list[int]:
    """The end tokens as a list, of one, several or none."""
    return [] if given is None else np.atleast_1d(given).tolist()


class Decoding:
    """A model with its key/value cache for a batch of sequences, read incrementally."""

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int,
        source: Int[np.ndarray, "B S"] | Sequence[Sequence[int]] | None = None,
    ):
        sources = checked_sources(model, source, batch_size)
        graphdef, self._params = split(model)
        self._read = compiled_read(graphdef)
        self._scanned = model.config.scan_layers
        self._context = model.config.context_length
        # Unrolled blocks would be sliced from their stack, and so copied, at every step.
        self._layers = None
        if not self._scanned:
            self._layers = [nnx.to_pure_dict(layer) for layer in model.decoding_layers()]
        self._source_mask = None
        if sources is None:
            self._empty_cache = functools.partial(model.empty_cache, batch_size)
        else:
            length = _padded_length(max(map(len, sources)), self._context)
            tokens, self._source_mask = padded(sources, length)
            self._empty_cache = functools.partial(model.empty_cache, tokens, self._source_mask)
        self._cache = self._empty_cache()

    def reset(self) -> None:
        """Empty the cache, which for a recurrent model resets its state."""
        self._cache = self._empty_cache()

    def read(
        self, rows: Sequence[Sequence[int]], starts: Int[np.ndarray, " B"] | None = None
    ) -> Float[Array, "B V"]:
        """The next-token logits after reading `rows`, each from its cache index in `starts`."""
        starts = np.zeros(len(rows), np.int32) if starts is None else starts
        length = _padded_length(max(map(len, rows)), self._context - int(starts.max()))
        tokens, padding_mask = padded(rows, length)
        return self._step(jnp.asarray(tokens), padding_mask, starts)

    def read_chosen(
        self, chosen: Int[Array, "B 1"], starts: Int[np.ndarray, " B"]
    ) -> Float[Array, "B V"]:
        """As `read` of one token per row, which need not have been computed yet."""
        return self._step(chosen, np.ones(chosen.shape, bool), starts)

    def _step(
        self,
        tokens: Int[Array, "B T"],
        padding_mask: Bool[np.ndarray, "B T"],
        starts: Int[np.ndarray, " B"],
    ) -> Float[Array, "B V"]:
        logits, self._cache = self._read(
            self._params,
            self._layers,
            self._cache,
            tokens,
            padding_mask,
            starts,
            self._source_mask,
        )
        return logits

    def reorder(self, order: Sequence[int]) -> None:
        """Reorder the cache: sequence i continues from sequence order[i]."""
        self._cache = _reordered(self._cache, np.array(order, np.int32), int(self._scanned))


def _row_seeds(seed: int | Sequence[int], rows: int) -> UInt32[np.ndarray, " B"]:
    """The seed of each row, uint32."""
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + row for row in range(rows)]
    if len(seeds) != rows:
        raise InputError(f"There are {len(seeds)} seeds and {rows} rows: each row needs one.")
    return np.array([each % 2**32 for each in seeds], np.uint32)


def _lengths(rows: Sequence[Sequence[int]]) -> Int[np.ndarray, " B"]:
    """The number of tokens of each row."""
    return np.array([len(row) for row in rows], np.int32)


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


@functools.cache
def compiled_read(graphdef: nnx.GraphDef) -> Any:
    """The compiled decoding step of models of one structure.

    As an argument the structure would be hashed at every step, a tenth of a GPT-2 step's time.
    """

    def read(
        params: Params,
        layers: list[Params] | None,
        cache: Any,
        tokens: Int[Array, "B T"],
        padding_mask: Bool[Array, "B T"],
        starts: Int[Array, " B"],
        source_mask: Bool[Array, "B S"] | None,
    ) -> tuple[Float[Array, "B V"], Any]:
        """Logits after each row's last token that is no padding, and the updated cache."""
        model = nnx.merge(graphdef, params)
        sources = {} if source_mask is None else {"source_mask": source_mask}
        output = model.hidden(
            tokens,
            padding_mask=padding_mask,
            cache=cache,
            cache_index=starts,
            layers=layers,
            **sources,
        )
        last = padding_mask.sum(axis=1)[:, None, None] - 1
        hidden = jnp.take_along_axis(output.hidden, last, axis=1)[:, 0]
        return model.unembed(model.readout(hidden)), output.cache

    return jax.jit(read, donate_argnums=2)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _reordered(cache: Any, order: jax.Array, axis: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.take(leaf, order, axis=axis), cache)


@functools.partial(jax.jit, static_argnums=0)
def _choose_next(
    sampling: Sampling,
    logits: Float[Array, "B V"],
    occurred: Bool[Array, "B V"] | None,
    seeds: UInt32[Array, " B"],
    index: Int[Array, ""],
) -> tuple[Int[Array, "B 1"], Bool[Array, "B V"] | None]:
    """The next tokens, each row's sampled with its own seed, and the updated `occurred`."""
    if occurred is not None:
        logits = penalised_logits(logits, occurred, sampling.repetition_penalty)

    def choose_in_row(logits: Float[Array, " V"], seed: UInt32[Array, ""]) -> Int[Array, ""]:
        # Made here: a key as an argument would leave jit's fast path.
        key = jax.random.fold_in(random_key(seed), index)
        return choose(logits[None], sampling, key)[0]

    chosen = jax.vmap(choose_in_row)(logits, seeds)
    if occurred is not None:
        occurred = occurred.at[jnp.arange(len(chosen)), chosen].set(True)
    return chosen[:, None], occurred
