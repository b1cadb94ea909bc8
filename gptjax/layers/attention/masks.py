"""Masking: which keys each query attends to.

| `attention` | a query attends to | source |
|---|---|---|
| full | all keys; if causal, itself and earlier ones | Vaswani et al. 2017, section 3.2 |
| local | a window of keys ending at it, or, if not causal, around it | Child et al. 2019 |
| compressed | earlier keys, compressed by a strided convolution | Liu et al. 2018, 4.2.3 (DMCA) |
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskRule:
    """A mask described by its rule, for flash kernels, which materialise no array [T, S].

    The first query and the first key have the same position.
    """

    causal: bool = dataclasses.field(metadata={"static": True})
    """Whether later keys are masked."""
    window: int = dataclasses.field(default=0, metadata={"static": True})
    """Keys at this distance or farther are masked; 0: no window."""
    padding_mask: Bool[Array | np.ndarray, "B S"] | None = None
    """False at keys that are padding."""
    segment_ids: Int[Array | np.ndarray, "B S"] | None = None
    """The document of each token, S being T; keys of other documents are masked."""


class AttentionMask(NamedTuple):
    """Which keys each query attends to, as an array and as a rule."""

    array: Bool[Array, "#B #T S"] | None
    """True where the query attends to the key; None masks nothing."""
    rule: MaskRule | None = None
    """The same as a rule; None in decoding and in compressed attention, which follow none."""


def attention_mask(distance: Int[Array, "#B T S"], rule: MaskRule) -> Bool[Array, "#B T S"]:
    """The mask that the rule describes, as an array.

    Args:
      distance: query position minus key position.
      rule: what is masked.
    """
    mask = distance >= 0 if rule.causal else jnp.ones_like(distance, bool)
    if rule.window:
        mask &= jnp.abs(distance) < rule.window
    if rule.segment_ids is not None:
        mask &= rule.segment_ids[:, :, None] == rule.segment_ids[:, None]
    return mask if rule.padding_mask is None else mask & rule.padding_mask[:, None]


def compressed_mask(
    positions: Int[Array, "B T"], keys: int, compression: int
) -> Bool[Array, "B T groups"]:
    """The mask of compressed attention: queries attend to groups that end at or before them.

    Every `compression` consecutive keys form a group. A zero key that all queries attend to comes
    first, so that the first queries have one: there are 1 + keys // compression groups.
    """
    last = jnp.arange(keys // compression) * compression + compression - 1
    last = jnp.concatenate([jnp.full(1, -1), last])
    return positions[..., None] >= last
