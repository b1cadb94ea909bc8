"""How a token knows where it stands.

| `position_embedding` | what it does | source |
|---|---|---|
| learned | a trained vector per position, added to the embedding | GPT-1 (Radford et al. 2018) |
| sinusoidal | fixed sines and cosines, added to the embedding | Vaswani et al. 2017, section 3.5 |
| rotary | rotates query and key by an angle that grows with position | RoFormer (Su et al. 2021) |
| alibi | lowers a score by the distance times the head's slope | Press et al. 2022 |
| relative | adds a number a head and bucket of distances to a score | T5 (Raffel et al. 2020) |
| none | only the causal mask tells order | Haviv et al. 2022 |

`pairing` says which two channels share an angle: `interleaved` (2i and 2i + 1) in Vaswani et al.,
RoFormer and GPT-J; `half` (i and i + half) in GPT-NeoX, Llama and Marian.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gptjax.config.values import RELATIVE_BUCKETS, Pairing, exhaustive

SINUSOIDAL_BASE = 10_000.0
RELATIVE_MAX_DISTANCE = 128
"""T5's (its released configurations)."""


def sinusoidal(positions: jax.Array, width: int, pairing: str) -> jax.Array:
    """Vaswani et al. 2017, section 3.5: positions [...] → [..., D], a sine and a cosine a pair."""
    angles = rotary_angles(positions, width, SINUSOIDAL_BASE)
    _, join = PAIRINGS[pairing]
    return join(jnp.sin(angles), jnp.cos(angles))


def rotary_angles(positions: jax.Array, width: int, base: float) -> jax.Array:
    """The angle by which each pair of `width` channels turns: [...] → [..., width / 2], radians.

    Pair i turns by position · base^(-2i / width) (RoFormer, equation 15).
    """
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    return positions[..., None] * base**-exponents


def rotate(x: jax.Array, angles: jax.Array, pairing: str) -> jax.Array:
    """Turn the first R channels of `x` [B, T, N, H] in pairs by `angles` [B or 1, T, R / 2]."""
    turning = 2 * angles.shape[-1]
    split, join = PAIRINGS[pairing]
    first, second = split(x[..., :turning].astype(jnp.float32))
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    turned = join(first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([turned.astype(x.dtype), x[..., turning:]], axis=-1)


def _split_halves(x: jax.Array) -> Sequence[jax.Array]:
    """[..., R] → the first channel of each pair and the second, [..., R / 2] each."""
    return jnp.split(x, 2, axis=-1)


def _join_halves(first: jax.Array, second: jax.Array) -> jax.Array:
    """Its inverse."""
    return jnp.concatenate([first, second], axis=-1)


def _split_interleaved(x: jax.Array) -> Sequence[jax.Array]:
    """[..., R] → the first channel of each pair and the second, [..., R / 2] each."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return pairs[..., 0], pairs[..., 1]


def _join_interleaved(first: jax.Array, second: jax.Array) -> jax.Array:
    """Its inverse."""
    return jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)


PAIRINGS = exhaustive(
    Pairing,
    {
        "half": (_split_halves, _join_halves),
        "interleaved": (_split_interleaved, _join_interleaved),
    },
)
"""How channels are split into pairs, and joined again."""


def alibi_slopes(heads: int) -> jax.Array:
    """[N]: 2^(-8/n), 2^(-16/n) … for n heads, n a power of two (Press et al. 2022, section 3).

    Other numbers of heads take the slopes of the power below and every second one of the power
    above, as the authors' code and BLOOM do.
    """
    below = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * i / below) for i in range(1, below + 1)]
    between = [2.0 ** (-4 * i / below) for i in range(1, 2 * below + 1, 2)]
    return jnp.array((slopes + between)[:heads], jnp.float32)


def alibi_bias(distance: jax.Array, heads: int) -> jax.Array:
    """What is added to the scores: distance [B or 1, T, S] to the key → [B or 1, N, T, S]."""
    return -alibi_slopes(heads)[:, None, None] * distance[:, None]


def relative_buckets(distance: jax.Array, *, bidirectional: bool) -> jax.Array:
    """The bucket of each distance query - key: small ones alone, larger ones on a log scale.

    Raffel et al. 2020, section 2.1, and T5's released code: half of the buckets are for later keys
    where there are any; of the rest one half is exact, the other logarithmic up to 128.
    """
    buckets = RELATIVE_BUCKETS
    offset = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance < 0, buckets, 0)
        distance = jnp.abs(distance)
    distance = jnp.maximum(distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    ratio /= math.log(RELATIVE_MAX_DISTANCE / exact)
    logarithmic = exact + (ratio * (buckets - exact)).astype(distance.dtype)
    bucket = jnp.where(distance < exact, distance, jnp.minimum(logarithmic, buckets - 1))
    return offset + bucket
