"""Decoding with a cache: a token at a time, greedy or sampled, for a batch of sequences.

Sources: temperature, Ackley et al. 1985; top-k, Fan et al. 2018; top-p (nucleus), Holtzman et al.
2020; min-p, Nguyen et al. 2024; repetition penalty, CTRL (Keskar et al. 2019, section 4.1). They
act in this order, the penalty first, as in Hugging Face transformers.
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

from gptjax.config import InputError
from gptjax.models.build import LanguageModel, Params, split
from gptjax.parallel.keys import random_key

SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""The smallest normal number of float32; below it there is no division, and so no randomness."""
PENALTIES = 1e-6, 1e6
"""The least and the largest repetition penalty, of which logits stay finite."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Raises:
      InputError: a value out of range.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0, or what float32 takes for 0, takes the most likely token."""
    top_k: int = 0
    """Choose among this many of the most likely tokens; 0 takes all."""
    top_p: float = 1.0
    """Choose among the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Choose among tokens at least this times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that occurred, and multiplies negative ones."""

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


def filtered_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [B, V] over the temperature, -inf where top-k, top-p or min-p leave a token out.

    The most likely token's is 0, and it is never left out. The temperature is above 0.
    """
    # Differences to the largest, since the quotient of a logit may be infinite.
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


def penalised_logits(logits: jax.Array, occurred: jax.Array, penalty: float) -> jax.Array:
    """Logits [B, V] with those of the tokens that `occurred` [B, V] made less likely."""
    return jnp.where(occurred, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Next tokens [B], int32, from logits [B, V]."""
    if sampling.temperature < SMALLEST_TEMPERATURE:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    chosen = jax.random.categorical(key, filtered_logits(logits, sampling), axis=-1)
    return chosen.astype(jnp.int32)


def generate(
    model: LanguageModel,
    prompt: np.ndarray | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int | Sequence[int] = 0,
    end_token: int | Sequence[int] | None = None,
    sliding_window: bool = False,
    source: np.ndarray | Sequence[Sequence[int]] | None = None,
) -> Iterator[np.ndarray]:
    """Continue each row of `prompt`, yielding the next tokens [B] one place at a time.

    Rows may differ in length; each decodes as it would alone with its own seed. A row that has
    reached `end_token` repeats it; decoding stops when all have, or when the longest of the others
    fills the context. With `sliding_window` that row is cut to its last half context, which is read
    again, and decoding goes on: what was cut is forgotten.

    Args:
      model: a decoder, a recurrent model, or an encoder-decoder.
      prompt: tokens, B rows.
      max_new_tokens: places to decode at most.
      sampling: how tokens are chosen; None samples from the softmax.
      seed: of the choices, one for each row, or the first row's, row i having `seed` + i; the key
        of a row's n-th choice is `fold_in(random_key(its seed), n)`. Seeds are taken modulo 2³².
      end_token: the token after which a row says nothing more, or several such tokens.
      sliding_window: whether to go on past the context's end.
      source: what an encoder-decoder reads, B rows.

    Raises:
      InputError: an empty prompt, one longer than the context, a token out of the vocabulary, or
        seeds of which there are not as many as rows.
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
    ended, repeated = np.zeros(len(rows), bool), np.zeros(len(rows), np.int32)
    logits, lengths = decoding.read(rows), _lengths(rows)
    for index in range(max_new_tokens):
        chosen, occurred = choose_next(logits, occurred, seeds, index)
        last, full = index == max_new_tokens - 1, lengths[~ended].max() == context_length
        if not (last or full):
            # Before these tokens are fetched, so that the device does not wait for the host.
            logits = decoding.read_chosen(chosen, lengths)
        tokens = repeated = np.where(ended, repeated, np.asarray(chosen)[:, 0])
        yield tokens
        ended |= np.isin(tokens, ends)
        if last or ended.all() or (full and not sliding_window):
            return
        # A row that has ended stays as it is, so that no other is cut or stopped for it.
        rows = [
            row if over else [*row, int(token)]
            for row, token, over in zip(rows, tokens, ended, strict=True)
        ]
        lengths = lengths + ~ended
        if full:
            half = max(1, context_length // 2)
            rows = [row[-half:] if len(row) > context_length else row for row in rows]
            decoding.forget()
            logits, lengths = decoding.read(rows), _lengths(rows)


def end_tokens(given: int | Sequence[int] | None) -> list[int]:
    """The end tokens that a caller gave: one, several or none."""
    return [] if given is None else np.atleast_1d(given).tolist()


class Decoding:
    """A model and its cache for a batch of sequences that are read bit by bit."""

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int,
        source: np.ndarray | Sequence[Sequence[int]] | None = None,
    ):
        sources = checked_sources(model, source, batch_size)
        graphdef, self._params = split(model)
        self._read = compiled_read(graphdef)
        self._scanned = model.config.scan_layers
        self._context = model.config.context_length
        # Unrolled blocks would be cut out of their stack, and so copied, at every step.
        self._layers = None
        if not self._scanned:
            self._layers = [nnx.to_pure_dict(layer) for layer in model.decoding_layers()]
        self._source_valid = None
        if sources is None:
            self._empty_cache = functools.partial(model.empty_cache, batch_size)
        else:
            length = _few(max(map(len, sources)), self._context)
            tokens, self._source_valid = padded(sources, length)
            self._empty_cache = functools.partial(model.empty_cache, tokens, self._source_valid)
        self._cache = self._empty_cache()

    def forget(self) -> None:
        """Begin anew, with nothing read; a recurrent state would go on otherwise."""
        self._cache = self._empty_cache()

    def read(self, rows: Sequence[Sequence[int]], starts: np.ndarray | None = None) -> jax.Array:
        """Read `rows`, each from `starts` [B] on, and return the next logits [B, V]."""
        starts = np.zeros(len(rows), np.int32) if starts is None else starts
        length = _few(max(map(len, rows)), self._context - int(starts.max()))
        tokens, valid = padded(rows, length)
        return self._step(jnp.asarray(tokens), valid, starts)

    def read_chosen(self, chosen: jax.Array, starts: np.ndarray) -> jax.Array:
        """As `read`, of one token a row, [B, 1], which may not have been computed yet."""
        return self._step(chosen, np.ones(chosen.shape, bool), starts)

    def _step(self, tokens: jax.Array, valid: np.ndarray, starts: np.ndarray) -> jax.Array:
        logits, self._cache = self._read(
            self._params,
            self._layers,
            self._cache,
            tokens,
            valid,
            starts,
            self._source_valid,
        )
        return logits

    def reorder(self, order: Sequence[int]) -> None:
        """Let sequence i go on from what sequence order[i] has read."""
        self._cache = _reordered(self._cache, np.array(order, np.int32), int(self._scanned))


def _row_seeds(seed: int | Sequence[int], rows: int) -> np.ndarray:
    """The seed of each row, [B], uint32."""
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + row for row in range(rows)]
    if len(seeds) != rows:
        raise InputError(f"There are {len(seeds)} seeds and {rows} rows: each row needs one.")
    return np.array([each % 2**32 for each in seeds], np.uint32)


def _lengths(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Tokens of each row, [B]."""
    return np.array([len(row) for row in rows], np.int32)


def _few(length: int, most: int) -> int:
    """The power of two that `length` is padded to, so that few lengths are compiled."""
    return min(1 << (length - 1).bit_length(), most)


def checked_rows(
    model: LanguageModel, rows: np.ndarray | Sequence[Sequence[int]], name: str
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
    model: LanguageModel, source: np.ndarray | Sequence[Sequence[int]] | None, rows: int
) -> list[list[int]] | None:
    """The source of each of `rows` prompts, for a model that reads one.

    Raises:
      InputError: a family that does not generate, a source too few or too many, or a wrong one.
    """
    family = model.config.family
    if family == "encoder":
        raise InputError("The family encoder does not generate: it sees what follows.")
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


def padded(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as tokens [B, length], zeros after their ends, and where there is a token."""
    tokens = np.zeros((len(rows), length), np.int32)
    valid = np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        valid[index, : len(row)] = True
    return tokens, valid


@functools.cache
def compiled_read(graphdef: nnx.GraphDef) -> Any:
    """The compiled step of models of one structure.

    As an argument the structure would be hashed at every step, for a GPT-2 a tenth of its time.
    """

    def read(
        params: Params,
        layers: list[Params] | None,
        cache: Any,
        tokens: jax.Array,
        valid: jax.Array,
        starts: jax.Array,
        source_mask: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        """Logits [B, V] after each row's last valid token, and the cache after it."""
        model = nnx.merge(graphdef, params)
        reads = {} if source_mask is None else {"source_mask": source_mask}
        output = model.hidden(
            tokens, padding_mask=valid, cache=cache, cache_index=starts, layers=layers, **reads
        )
        last = valid.sum(axis=1)[:, None, None] - 1
        hidden = jnp.take_along_axis(output.hidden, last, axis=1)[:, 0]
        return model.unembed(model.readout(hidden)), output.cache

    return jax.jit(read, donate_argnums=2)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _reordered(cache: Any, order: jax.Array, axis: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.take(leaf, order, axis=axis), cache)


@functools.partial(jax.jit, static_argnums=0)
def _choose_next(
    sampling: Sampling,
    logits: jax.Array,
    occurred: jax.Array | None,
    seeds: jax.Array,
    index: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Tokens [B, 1] that follow, and the tokens that have occurred with them.

    Each row [V] of the logits is chosen from with its own of the `seeds` [B].
    """
    if occurred is not None:
        logits = penalised_logits(logits, occurred, sampling.repetition_penalty)

    def choose_alone(logits: jax.Array, seed: jax.Array) -> jax.Array:
        # A key as an argument would leave the fast path of jit's calls.
        key = jax.random.fold_in(random_key(seed), index)
        return choose(logits[None], sampling, key)[0]

    chosen = jax.vmap(choose_alone)(logits, seeds)
    if occurred is not None:
        occurred = occurred.at[jnp.arange(len(chosen)), chosen].set(True)
    return chosen[:, None], occurred
