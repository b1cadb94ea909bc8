"""What kind of head it is: measures of its weights."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import InputError
from gptjax.models.build import LanguageModel
from gptjax.probe.observation import observe
from gptjax.probe.weights import place_of


def entropy(weights: jax.Array) -> jax.Array:
    """How widely each query looks: [..., T, S] → [..., T], nats; log S is at all keys equally."""
    return jax.scipy.special.entr(weights).sum(axis=-1)


def mean_distance(weights: jax.Array) -> jax.Array:
    """How far away each query looks on average: [..., T, T] → [..., T], tokens."""
    places = jnp.arange(weights.shape[-1])
    return (weights * jnp.abs(places[:, None] - places)).sum(axis=-1)


def rollout(weights: jax.Array) -> jax.Array:
    """How much of each token is in each place after all layers, by attention alone.

    The product over layers of half the heads' mean and half the residual stream (Abnar & Zuidema
    2020, section 3). Feed-forward layers and what values hold are left out: a rough picture.

    Args:
      weights: [L, B, N, T, T], of one sequence to itself.

    Returns:
      [B, T, T]; rows sum to 1.
    """
    mixed = weights.mean(axis=2) / 2 + jnp.eye(weights.shape[-1], dtype=weights.dtype) / 2
    through = mixed[0]
    for layer in mixed[1:]:
        through = layer @ through
    return through


class HeadScores(NamedTuple):
    """What heads do on repeated random tokens: mean weights [L, N], 0 to 1."""

    previous_token: jax.Array
    """On the token before."""
    induction: jax.Array
    """On the token that came after the same one before (Olsson et al. 2022)."""
    duplicate_token: jax.Array
    """On the same token where it stood before."""


def repeated_sequences(
    vocab_size: int, length: int, batch: int, *, seed: int = 0, begin: int | None = None
) -> np.ndarray:
    """Random tokens, each row twice over: [B, 2 · length], int32; after `begin` if it is given.

    Nothing of language helps to predict the second half; only the first does.
    """
    half = np.random.default_rng(seed).integers(vocab_size, size=(batch, length), dtype=np.int32)
    rows = np.concatenate([half, half], axis=1)
    return rows if begin is None else np.insert(rows, 0, begin, axis=1)


@dataclasses.dataclass(frozen=True)
class _MeanAlong:
    """Mean weight on the keys `distances` before the queries from `first` on."""

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
    """What each head looks at in the second half of `repeated_sequences`.

    Args:
      model: a decoder or an encoder.
      sequences: [B, 2 · length], or one more with a first token.
      length: of what is repeated.

    Raises:
      InputError: sequences of another length, or as `observe`.
    """
    total = np.shape(sequences)[-1]
    if length < 2 or total - 2 * length not in (0, 1):
        raise InputError(
            f"sequences have {total} tokens: twice length, {2 * length}, or one more is needed, "
            "and length must be at least 2."
        )
    hook_point, _ = place_of(model, None)
    keep = _MeanAlong((1, length - 1, length), total - length)
    means = observe(model, sequences, {hook_point: keep}).captured[hook_point]
    return HeadScores(*jnp.moveaxis(means, -1, 0))
