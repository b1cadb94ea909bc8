"""Decoding with a key-value cache: a token at a time, greedy or sampled, for a batch of sequences.

Sources: temperature, Ackley et al. 1985; top-k, Fan et al. 2018; top-p (nucleus), Holtzman et al.
2020. The filters act in that order on the same logits, as in Hugging Face transformers.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptjax.config import InputError
from gptjax.layers.attention import KVCache
from gptjax.transformer import Decoder, empty_cache, split


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Raises:
      InputError: a value out of range.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Choose among this many of the most likely tokens; 0 takes all."""
    top_p: float = 1.0
    """Choose among the most likely tokens that together reach this probability."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}: it must be at least 0.")
        if self.top_k < 0:
            raise InputError(f"top-k is {self.top_k}: it must be at least 0.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}: it must be above 0 and at most 1.")


def filtered_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [B, V] over the temperature, -inf where top-k or top-p leave a token out."""
    logits /= sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest_kept = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = jnp.where(before < sampling.top_p, descending, jnp.inf)
        logits = jnp.where(logits < kept.min(axis=-1, keepdims=True), -jnp.inf, logits)
    return logits


def choose(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Next tokens [B] from logits [B, V]."""
    if sampling.temperature == 0:
        return logits.argmax(axis=-1)
    return jax.random.categorical(key, filtered_logits(logits, sampling), axis=-1)


def generate(
    model: Decoder,
    prompt: np.ndarray,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    end_token: int | None = None,
    sliding_window: bool = False,
) -> Iterator[np.ndarray]:
    """Continue each row of `prompt` [B, T], yielding the next tokens [B] one place at a time.

    A row that has reached `end_token` repeats it; decoding stops when all have, or when the context
    is full. With `sliding_window` a full context is cut to its second half, which is read again,
    and decoding goes on: what was cut is forgotten.

    Raises:
      InputError: an empty prompt, one longer than the context, or a token out of the vocabulary.
    """
    config, sampling = model.config, sampling or Sampling()
    tokens = np.asarray(prompt, np.int32)
    if tokens.shape[1] == 0:
        raise InputError("The prompt is empty: it needs at least one token.")
    if tokens.shape[1] > config.context:
        raise InputError(
            f"The prompt has {tokens.shape[1]} tokens; the model's context is {config.context}."
        )
    unknown = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if unknown.size:
        raise InputError(
            f"The prompt has token {unknown[0]}; the vocabulary has {config.vocab_size}."
        )
    graphdef, params = split(model)
    next_tokens = functools.partial(_next_tokens, graphdef, sampling)
    ended = np.zeros(len(tokens), bool)
    cache, position, unread = empty_cache(config, len(tokens)), 0, tokens
    for index in range(max_new_tokens):
        if position + unread.shape[1] > config.context:
            if not sliding_window:
                return
            position, unread = 0, tokens[:, -(config.context // 2) :]
        key = jax.random.fold_in(jax.random.key(seed), index)
        chosen, cache = next_tokens(params, cache, unread, position, key)
        position += unread.shape[1]
        chosen = np.where(ended, end_token, chosen) if end_token is not None else np.array(chosen)
        yield chosen
        unread = chosen[:, None].astype(np.int32)
        tokens = np.concatenate([tokens, unread], axis=1)
        if end_token is not None:
            ended |= chosen == end_token
            if ended.all():
                return


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _next_tokens(
    graphdef: nnx.GraphDef,
    sampling: Sampling,
    params: Any,
    cache: KVCache,
    tokens: jax.Array,
    position: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Read `tokens` [B, T] into the cache and choose the tokens [B] that follow."""
    model = nnx.merge(graphdef, params)
    output = model.hidden(tokens, cache=cache, position=position)
    return choose(model.unembed(output.hidden[:, -1]), sampling, key), output.cache
