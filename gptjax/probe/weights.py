"""Attention weights: who looks at whom."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptjax.config import InputError
from gptjax.layers.hooks import CROSS, ENCODER
from gptjax.models.build import LanguageModel, split
from gptjax.probe.interventions import check_numbers
from gptjax.probe.observation import as_arrays, run


class TopAttention(NamedTuple):
    """The keys that each query looks at most."""

    weights: jax.Array
    """[L', B, N', T', k], falling."""
    places: jax.Array
    """[L', B, N', T', k], places of the keys."""


@dataclasses.dataclass(frozen=True)
class _Selection:
    """What is kept of the weights; hashable, so that its program is found again."""

    hook_point: str
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    rows: tuple[int, ...] | None
    top: int

    def __call__(self, weights: jax.Array) -> Any:
        """In a layer: [B, N, T, S] → [B, N', T', S], or the best of it."""
        if self.heads is not None:
            weights = weights[:, np.array(self.heads)]
        if self.rows is not None:
            weights = weights[:, :, np.array(self.rows)]
        return TopAttention(*jax.lax.top_k(weights, self.top)) if self.top else weights

    def of_layers(self, captured: dict[str, Any]) -> Any:
        """Of all layers: those that are chosen; one by one, so that no other is ever stacked."""

        def chosen(leaf: jax.Array) -> jax.Array:
            return jnp.stack([leaf[layer] for layer in self.layers])

        return jax.tree.map(chosen, captured[self.hook_point])


def attention(
    model: LanguageModel,
    tokens: Any,
    *,
    part: str | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    top: int = 0,
    block: int = 0,
    **inputs: Any,
) -> Any:
    """Attention weights of chosen layers, heads and queries; rows sum to 1.

    What is not chosen is dropped inside each layer, so that of a long text no [L, B, N, T, S] is
    ever held. A decoder's [B, N, T, S] of one layer is not held either if it takes the text `block`
    queries at a time, as decoding does.

    Args:
      model: with attention.
      tokens: [B, T].
      part: "decoder", "encoder" or "cross" (a decoder's to an encoder); None is the model's own.
      layers: their numbers, from 0; None is all.
      heads: as `layers`.
      rows: places of the queries; None is all.
      top: keys of each query to return, those with the largest weights; 0 returns all weights.
      block: queries at a time, of a decoder; 0 takes all at once.
      inputs: as `observe`.

    Returns:
      [L', B, N', T', S], float32; or with `top` a `TopAttention`.

    Raises:
      InputError: a part, layer, head or row that is not there, or as `observe`.
    """
    hook_point, depth = place_of(model, part)
    length = inputs["source"].shape[1] if hook_point.startswith(ENCODER) else np.shape(tokens)[-1]
    columns = inputs["source"].shape[1] if hook_point.startswith((ENCODER, CROSS)) else length
    layers = range(depth) if layers is None else check_numbers("layers", layers, depth)
    if heads is not None:
        heads = check_numbers("heads", heads, model.config.heads)
    if rows is not None:
        rows = check_numbers("rows", rows, length)
    if not 0 <= top <= columns:
        raise InputError(f"top is {top}: it must be at most the {columns} tokens looked at.")
    if not block:
        keep = _Selection(hook_point, tuple(layers), _hashable(heads), _hashable(rows), top)
        graphdef, params = split(model)
        return _whole(graphdef, keep, params, *as_arrays(model, tokens, inputs))
    if model.config.family != "decoder" or inputs:
        raise InputError(
            "block must be 0: only a decoder, given nothing but tokens, reads them in blocks."
        )
    keep = _Selection(hook_point, tuple(layers), _hashable(heads), None, top)
    blocks = _by_blocks(model, tokens, keep, block)
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=3), *blocks)
    return whole if rows is None else jax.tree.map(lambda leaf: leaf[..., np.array(rows), :], whole)


def by_word(weights: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Attention between words, of that between their tokens: [..., T, T] → [..., W, W].

    The weights on the tokens of a word are summed, and the mean is taken over the tokens that
    attend, so that rows sum to 1 as before (Clark et al. 2019, section 4.1).

    Args:
      weights: of one sequence to itself.
      starts: [T], bool: the token begins a word (`Vocabulary.word_starts`); the first one does.
    """
    begins = np.flatnonzero(starts)
    lengths = np.diff(begins, append=len(starts))
    onto = np.add.reduceat(weights, begins, axis=-1)
    return np.add.reduceat(onto, begins, axis=-2) / lengths[:, None]


def _hashable(numbers: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if numbers is None else tuple(numbers)


def place_of(model: LanguageModel, part: str | None) -> tuple[str, int]:
    """The place of the weights of a part of the model, and its layers; None is its own attention.

    Raises:
      InputError: a part that it has not.
    """
    config = model.config
    if config.family == "recurrent":
        raise InputError("A model of the family recurrent has no attention.")
    parts = {config.family: ("attention", config.depth)}
    if config.family == "encoder_decoder":
        parts = {
            "decoder": ("attention", config.depth),
            "encoder": (ENCODER + "attention", config.encoder_depth or config.depth),
            "cross": (CROSS + "attention", config.depth),
        }
    part = part or next(iter(parts))
    if part not in parts:
        raise InputError(
            f"part is {part!r}: a model of the family {config.family} has {' and '.join(parts)}."
        )
    return parts[part]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _whole(graphdef, keep: _Selection, params, tokens, inputs):
    seen = run(nnx.merge(graphdef, params), tokens, {keep.hook_point: keep}, {}, inputs)
    return keep.of_layers(seen.captured)


def _by_blocks(model: LanguageModel, tokens: Any, keep: _Selection, block: int) -> list[Any]:
    """The weights of `block` queries at a time, which see what came before in a cache."""
    tokens, _ = as_arrays(model, tokens, {})
    batch, length = tokens.shape
    graphdef, params = split(model)
    cache, blocks = model.empty_cache(batch), []
    for start in range(0, length, block):
        cache, seen = _block(graphdef, keep, params, tokens[:, start : start + block], cache, start)
        blocks.append(seen if keep.top else seen[..., :length])
    return blocks


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _block(graphdef, keep: _Selection, params, tokens, cache, start):
    model = nnx.merge(graphdef, params)
    output = model.hidden(tokens, cache=cache, cache_index=start, capture={keep.hook_point: keep})
    return output.cache, keep.of_layers(output.captured)
