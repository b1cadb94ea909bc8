"""How a token knows where it stands.

| `positions` | what it does | source |
|---|---|---|
| learned | a trained vector a position, added to the embedding | GPT-1 (Radford et al. 2018) |
| rotary | rotates query and key by an angle that grows with position | RoFormer (Su et al. 2021) |
| none | only the causal mask tells order | Haviv et al. 2022 |
"""

import jax
import jax.numpy as jnp

ROTARY_BASE = 10_000.0


def rotary_angles(positions: jax.Array, head_width: int) -> jax.Array:
    """The angle by which each pair of a head's channels turns: [T] → [T, H / 2], radians.

    Pair i turns by position · base^(-2i / H) (RoFormer, equation 15).
    """
    exponents = jnp.arange(0, head_width, 2) / head_width
    return positions[:, None] * ROTARY_BASE**-exponents


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn the channel pairs of `x` [B, T, N, H] by `angles` [T, H / 2].

    Channel i is paired with channel i + H / 2, as GPT-NeoX and Llama do; the RoFormer paper and
    GPT-J pair neighbours. The two differ by a fixed permutation of the channels.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
