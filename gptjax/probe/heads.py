"""What kind of head it is: statistics of attention weights, and scores of known head types."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptjax.config import InputError
from gptjax.models.build import LanguageModel
from gptjax.probe.observation import observe
from gptjax.probe.weights import attention_hook_point


def entropy(weights: Float[Array, "*B T S"]) -> Float[Array, "*B T"]:
    """The entropy of each query's attention weights, nats; log S is uniform over all keys."""
    return jax.scipy.special.entr(weights).sum(axis=-1)


def mean_distance(weights: Float[Array, "*B T T"]) -> Float[Array, "*B T"]:
    """The mean distance between each query and its keys, weighted by attention, tokens."""
    positions = jnp.arange(weights.shape[-1])
    return (weights * jnp.abs(positions[:, None] - positions)).sum(axis=-1)


def rollout(weights: Float[Array, "L B N T T"]) -> Float[Array, "B T T"]:
    """Attention rollout: how much of each input token is in each position after all layers.

    The product over layers of half the heads' mean and half the identity (Abnar & Zuidema 2020,
    section 3). It ignores MLPs and the content of values: a rough estimate.

    Args:
      weights: [L, B, N, T, T], self-attention.

    Returns:
      [B, T, T]; rows sum to 1.
    """
    mixed = weights.mean(axis=2) / 2 + jnp.eye(weights.shape[-1], dtype=weights.dtype) / 2
    through = mixed[0]
    for layer in mixed[1:]:
        through = layer @ through
    return through


class HeadScores(NamedTuple):
    """Scores of head types on repeated random tokens: mean attention weights, 0 to 1."""

    previous_token: Float[Array, "L N"]
    """On the previous token."""
    induction: Float[Array, "L N"]
    """On the token after the previous occurrence of the current one (Olsson et al. 2022)."""
    duplicate_token: Float[Array, "L N"]
    """On the previous occurrence of the current token."""


def repeated_sequences(
    vocab_size: int, length: int, batch: int, *, seed: int = 0, begin: int | None = None
) -> Int[np.ndarray, "B T"]:
    """Random tokens, each row repeated once: [B, 2 · length], int32, after `begin` if given.

    Only in-context copying of the first half predicts the second.
    """
    half = np.random.default_rng(seed).integers(vocab_size, size=(batch, length), dtype=np.int32)
    rows = np.concatenate([half, half], axis=1)
    return rows if begin is None else np.insert(rows, 0, begin, axis=1)


@dataclasses.dataclass(frozen=True)
class _MeanAlong:
    """The mean weight on keys `distances` before the query, over queries from `first` on."""

    distances: tuple[int, ...]
    first: int

    def __call__(self, weights: jax.Array) -> jax.Array:
        """[B, N, T, T] → [N, distances]."""
        means = []
        for distance in self.distances:
            diagonal = jnp.diagonal(weights, -distance, axis1=2, axis2=3)
            means.append(diagonal[..., max(self.first - distance, 0) :].mean(axis=(0, 2)))
        return jnp.stack(means, axis=-1)


def head_scores(model: LanguageModel, sequences: Any, length: int) -> HeadScores:
    """Previous-token, induction and duplicate-token scores of every head.

    They are means over the second half of `repeated_sequences`.

    Args:
      model: a decoder or an encoder.
      sequences: [B, 2 · length], or one more with a first token.
      length: of the repeated part.

    Raises:
      InputError: sequences of another length, or as `observe`.
    """
    total = np.shape(sequences)[-1]
    if length < 2 or total - 2 * length not in (0, 1):
        raise InputError(
            f"sequences have {total} tokens: twice length, {2 * length}, or one more is needed, "
            "and length must be at least 2."
        )
    hook_point, _ = attention_hook_point(model, None)
    keep = _MeanAlong((1, length - 1, length), total - length)
    means = observe(model, sequences, {hook_point: keep}).captured[hook_point]
    return HeadScores(*jnp.moveaxis(means, -1, 0))
