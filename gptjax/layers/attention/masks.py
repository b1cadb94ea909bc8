"""Masking: which keys each query attends to.

| `attention` | a query attends to | source |
|---|---|---|
| full | every key; the earlier ones where it is causal | Vaswani et al. 2017, section 3.2 |
| local | the keys of a window that ends at (or, if not causal, surrounds) it | Child et al. 2019 |
| compressed | joined groups of earlier keys | Liu et al. 2018, section 4.2.3 (DMCA) |
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskRule:
    """A mask as the rule that it follows, for flash kernels, which hold no array [T, S].

    The first query and the first key have the same position.
    """

    causal: bool = dataclasses.field(metadata={"static": True})
    """Whether later keys are masked."""
    window: int = dataclasses.field(default=0, metadata={"static": True})
    """Keys at this distance and more are masked; 0 masks none."""
    padding_mask: jax.Array | None = None
    """[B, S], False at keys that are padding."""
    segment_ids: jax.Array | None = None
    """[B, S], S being T: the document of each token; keys of other documents are masked."""


class AttentionMask(NamedTuple):
    """Which keys each query attends to."""

    array: jax.Array | None
    """[B or 1, T, S], True where the query attends to the key; None masks nothing."""
    rule: MaskRule | None = None
    """The same as a rule; None in decoding and for compressed attention, which have none."""


def attention_mask(distance: jax.Array, rule: MaskRule) -> jax.Array:
    """The rule written out, [B or 1, T, S].

    Args:
      distance: [B or 1, T, S], position of the query minus position of the key.
      rule: what it masks.
    """
    mask = distance >= 0 if rule.causal else jnp.ones_like(distance, bool)
    if rule.window:
        mask &= jnp.abs(distance) < rule.window
    if rule.segment_ids is not None:
        mask &= rule.segment_ids[:, :, None] == rule.segment_ids[:, None]
    return mask if rule.padding_mask is None else mask & rule.padding_mask[:, None]


def compressed_mask(positions: jax.Array, keys: int, compression: int) -> jax.Array:
    """Queries at `positions` [B or 1, T] attend to the groups that end at or before them.

    Of `keys` keys, each `compression` form a group; an empty key that all may attend to comes
    first, so that the first queries have one. [B or 1, T, 1 + keys // compression].
    """
    last = jnp.arange(keys // compression) * compression + compression - 1
    last = jnp.concatenate([jnp.full(1, -1), last])
    return positions[..., None] >= last
