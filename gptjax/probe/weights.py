"""Attention weights of chosen layers, heads and queries, in texts of any length."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gptjax.config import InputError
from gptjax.layers.hooks import CROSS, ENCODER
from gptjax.models.build import LanguageModel, split
from gptjax.probe.interventions import check_numbers
from gptjax.probe.observation import as_arrays, run


class TopAttention(NamedTuple):
    """The k keys with the largest attention weights of each query."""

    weights: Float[Array, "L B N T k"]
    """Of the chosen layers, heads and queries, in descending order."""
    positions: Int[Array, "L B N T k"]
    """Of the keys."""


@dataclasses.dataclass(frozen=True)
class _Selection:
    """The selection of weights to keep; hashable, so that jit caches its program."""

    hook_point: str
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    rows: tuple[int, ...] | None
    top: int

    def __call__(self, weights: jax.Array) -> Any:
        """Select in a layer: [B, N, T, S] → [B, N', T', S], or its top k."""
        if self.heads is not None:
            weights = weights[:, np.array(self.heads)]
        if self.rows is not None:
            weights = weights[:, :, np.array(self.rows)]
        return TopAttention(*jax.lax.top_k(weights, self.top)) if self.top else weights

    def of_layers(self, captured: dict[str, Any]) -> Any:
        """Stack the chosen layers, one by one, so that no other layer is ever stacked."""

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

    The selection is made inside each layer, so that no [L, B, N, T, S] is ever held of a long text.
    A decoder that reads the text `block` queries at a time, with a cache as in decoding, does not
    hold one layer's [B, N, T, S] either.

    Args:
      model: any with attention.
      tokens: [B, T].
      part: "decoder", "encoder" or "cross" (a decoder's to an encoder); None is the model's own.
      layers: their numbers, from 0; None is all.
      heads: as `layers`.
      rows: positions of the queries; None is all.
      top: the number of keys to return per query, those with the largest weights; 0 returns all.
      block: queries at a time, for a decoder; 0 takes all at once.
      inputs: as `observe`.

    Returns:
      [L', B, N', T', S], float32; or with `top` a `TopAttention`.

    Raises:
      InputError: a part, layer, head or row that does not exist, or as `observe`.
    """
    hook_point, depth = attention_hook_point(model, part)
    length = inputs["source"].shape[1] if hook_point.startswith(ENCODER) else np.shape(tokens)[-1]
    columns = inputs["source"].shape[1] if hook_point.startswith((ENCODER, CROSS)) else length
    layers = range(depth) if layers is None else check_numbers("layers", layers, depth)
    if heads is not None:
        heads = check_numbers("heads", heads, model.config.heads)
    if rows is not None:
        rows = check_numbers("rows", rows, length)
    if not 0 <= top <= columns:
        raise InputError(f"top is {top}: it must be from 0 to the number of keys, {columns}.")
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


def by_word(
    weights: Float[np.ndarray, "*B T T"], starts: Bool[np.ndarray, " T"]
) -> Float[np.ndarray, "*B W W"]:
    """Attention between words, from attention between tokens: [..., T, T] → [..., W, W].

    Weights are summed over the key tokens of a word and averaged over its query tokens, so that
    rows still sum to 1 (Clark et al. 2019, section 4.1).

    Args:
      weights: self-attention.
      starts: True where a token begins a word (`Vocabulary.word_starts`), as the first does.
    """
    first = np.flatnonzero(starts)
    lengths = np.diff(first, append=len(starts))
    to_words = np.add.reduceat(weights, first, axis=-1)
    return np.add.reduceat(to_words, first, axis=-2) / lengths[:, None]


def _hashable(numbers: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if numbers is None else tuple(numbers)


def attention_hook_point(model: LanguageModel, part: str | None) -> tuple[str, int]:
    """The hook point of a part's attention weights, and its depth; None is the model's own part.

    Raises:
      InputError: a part that the model does not have.
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
    observed = run(nnx.merge(graphdef, params), tokens, {keep.hook_point: keep}, {}, inputs)
    return keep.of_layers(observed.captured)


def _by_blocks(model: LanguageModel, tokens: Any, keep: _Selection, block: int) -> list[Any]:
    """The weights of `block` queries at a time, with a cache of the keys before them."""
    tokens, _ = as_arrays(model, tokens, {})
    batch, length = tokens.shape
    graphdef, params = split(model)
    cache, blocks = model.empty_cache(batch), []
    for start in range(0, length, block):
        chunk = tokens[:, start : start + block]
        cache, weights = _block(graphdef, keep, params, chunk, cache, start)
        blocks.append(weights if keep.top else weights[..., :length])
    return blocks


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _block(graphdef, keep: _Selection, params, tokens, cache, start):
    model = nnx.merge(graphdef, params)
    output = model.hidden(tokens, cache=cache, cache_index=start, capture={keep.hook_point: keep})
    return output.cache, keep.of_layers(output.captured)
