"""Position embeddings.

| `position_embedding` | what it does | source |
|---|---|---|
| learned | adds a trained vector per position to the embedding | GPT-1 (Radford et al. 2018) |
| sinusoidal | adds fixed sines and cosines to the embedding | Vaswani et al. 2017, section 3.5 |
| rotary | rotates queries and keys by angles proportional to position | RoFormer (Su et al. 2021) |
| alibi | subtracts the head's slope times the distance from a score | Press et al. 2022 |
| relative | adds a bias per head and bucket of distances to a score | T5 (Raffel et al. 2020) |
| none | nothing; only the causal mask carries order | Haviv et al. 2022 |

`pairing` chooses the channels that form a pair: `interleaved` (2i and 2i + 1) in Vaswani et al.,
RoFormer and GPT-J; `half` (i and i + half) in GPT-NeoX, Llama and Marian.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptjax.config.values import RELATIVE_BUCKETS, Pairing, exhaustive

SINUSOIDAL_BASE = 10_000.0
RELATIVE_MAX_DISTANCE = 128
"""T5's (its released configurations)."""


def sinusoidal(
    positions: Int[Array | np.ndarray, "*shape"], width: int, pairing: str
) -> Float[Array, "*shape D"]:
    """The sinusoidal embeddings of `positions`: a sine and a cosine per pair of channels.

    Vaswani et al. 2017, section 3.5.
    """
    angles = rotary_angles(positions, width, SINUSOIDAL_BASE)
    _, join = PAIRINGS[pairing]
    return join(jnp.sin(angles), jnp.cos(angles))


def rotary_angles(
    positions: Int[Array | np.ndarray, "*shape"], width: int, base: float
) -> Float[Array, "*shape pairs"]:
    """The rotary angles of the width / 2 pairs of channels, in radians.

    Pair i is rotated by position · base^(-2i / width) (RoFormer, equation 15).
    """
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    return base**-exponents * positions[..., None]


def rotate(
    x: Float[Array, "B T N H"], angles: Float[Array, "#B T pairs"], pairing: str
) -> Float[Array, "B T N H"]:
    """x with the first 2 · pairs channels of each head rotated by `angles` (RoPE)."""
    rotary_dim = 2 * angles.shape[-1]
    split, join = PAIRINGS[pairing]
    first, second = split(x[..., :rotary_dim].astype(jnp.float32))
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    rotated = join(first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., rotary_dim:]], axis=-1)


def _split_halves(x: Float[Array, "*shape channels"]) -> Sequence[Float[Array, "*shape pairs"]]:
    """The first channel of each pair, and the second."""
    return jnp.split(x, 2, axis=-1)


def _join_halves(first: jax.Array, second: jax.Array) -> jax.Array:
    """The inverse of `_split_halves`."""
    return jnp.concatenate([first, second], axis=-1)


def _split_interleaved(
    x: Float[Array, "*shape channels"],
) -> Sequence[Float[Array, "*shape pairs"]]:
    """The first channel of each pair, and the second."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return pairs[..., 0], pairs[..., 1]


def _join_interleaved(first: jax.Array, second: jax.Array) -> jax.Array:
    """The inverse of `_split_interleaved`."""
    return jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)


PAIRINGS = exhaustive(
    Pairing,
    {
        "half": (_split_halves, _join_halves),
        "interleaved": (_split_interleaved, _join_interleaved),
    },
)
"""The functions that split channels into pairs, and their inverses."""


def alibi_slopes(heads: int) -> Float[Array, " N"]:
    """ALiBi's slopes, 2^(-8/n), 2^(-16/n) … for n heads, n a power of two.

    Other numbers of heads take the slopes of the next lower power, then every second one of the
    next higher power, as the authors' code and BLOOM do. Source: Press et al. 2022, section 3.
    """
    below = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * i / below) for i in range(1, below + 1)]
    between = [2.0 ** (-4 * i / below) for i in range(1, 2 * below + 1, 2)]
    return jnp.array((slopes + between)[:heads], jnp.float32)


def alibi_bias(distance: Int[Array, "B T S"], heads: int) -> Float[Array, "B N T S"]:
    """ALiBi's bias of the scores; distance is query position minus key position."""
    return -alibi_slopes(heads)[:, None, None] * distance[:, None]


def relative_buckets(
    distance: Int[Array, "*shape"], *, bidirectional: bool
) -> Int[Array, "*shape"]:
    """T5's bucket of each distance, query position minus key position.

    If bidirectional, half of the buckets are for later keys. Of the rest, one half holds one small
    distance each, the other is logarithmic up to 128. Source: Raffel et al. 2020, section 2.1, and
    T5's released code.
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
