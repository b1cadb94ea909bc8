"""The assemblies: embeddings, a stack of blocks, a head.

Models are Flax NNX modules that are used functionally:

    model = Decoder(config, rngs=nnx.Rngs(0))
    graphdef, params = split(model)
    logits = nnx.merge(graphdef, params)(tokens)

`params` is a nested dict of arrays; the blocks' leaves are stacked along a leading axis L.
"""

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import InputError, TransformerConfig, near_names
from gptjax.layers.attention import KVCache, causal_mask
from gptjax.layers.block import CAPTURES, Block
from gptjax.layers.dropout import dropout, split_key
from gptjax.layers.linear import Embedding
from gptjax.layers.norms import NORMS
from gptjax.layers.positions import rotary_angles

Params = dict[str, Any]


class Output(NamedTuple):
    """What a stack of blocks returns."""

    hidden: jax.Array
    """[B, T, D], normalised: what the head reads."""
    cache: KVCache | None
    """The cache with these tokens in it, where one was given."""
    captured: dict[str, jax.Array]
    """The intermediates asked for, stacked over layers: [L, ...]."""


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A model as its static structure and its parameters, a nested dict of arrays."""
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


class Decoder(nnx.Module):
    """A decoder-only Transformer: GPT (Radford et al. 2018, 2019).

    Raises:
      InputError: a config without a vocabulary size.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        if config.vocab_size == 0:
            raise InputError("TransformerConfig.vocab_size is 0: a model needs at least 1 token.")

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width, rngs=rngs)
        if config.positions == "learned":
            self.positions = Embedding(config.context, config.width, rngs=rngs)
        self.blocks = stacked_blocks(rngs)
        self.norm = NORMS[config.norm](config.width, bias=config.bias, rngs=rngs)
        if not config.tied:
            self.head = Embedding(config.vocab_size, config.width, rngs=rngs)

    def __call__(self, tokens: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Tokens [B, T] → logits [B, T, V] of the token that follows each."""
        return self.unembed(self.hidden(tokens, key=key).hidden)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """[..., D] → logits [..., V], float32."""
        table = self.unembedding.astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)

    @property
    def unembedding(self) -> jax.Array:
        """The head's matrix [V, D]; the token embedding itself when tied (Press & Wolf 2017)."""
        return (self.embedding if self.config.tied else self.head).table[...]

    def hidden(
        self,
        tokens: jax.Array,
        *,
        cache: KVCache | None = None,
        position: jax.Array | int = 0,
        key: jax.Array | None = None,
        capture: Collection[str] = (),
    ) -> Output:
        """Everything before the head.

        Args:
          tokens: [B, T].
          cache: from `empty_cache`, for decoding; None attends within `tokens` alone.
          position: of the first token in the sequence.
          key: dropout key; None drops nothing.
          capture: intermediates to return, from `CAPTURES`; those not named are never kept.

        Raises:
          InputError: more tokens than `context`, or an unknown name in `capture`.
        """
        config, length = self.config, tokens.shape[1]
        if length > config.context:
            raise InputError(f"The sequence has {length} tokens; context allows {config.context}.")
        for name in capture:
            if name not in CAPTURES:
                raise InputError(f"Unknown intermediate {name!r}: {near_names(name, CAPTURES)}")

        embedding_key, blocks_key = split_key(key, 2)
        positions = position + jnp.arange(length)
        x = self.embedding(tokens)
        if config.positions == "learned":
            x += self.positions(positions)
        x = dropout(x.astype(config.dtype), config.dropout, embedding_key)

        rotary = config.positions == "rotary"
        key_positions = jnp.arange(length if cache is None else cache.key.shape[2])
        run_block = functools.partial(
            _run_block,
            mask=causal_mask(positions, key_positions),
            angles=rotary_angles(positions, config.head_width) if rotary else None,
            position=position,
            capture=capture,
        )
        x, cache, captured = self._run_blocks(run_block, x, cache, blocks_key)
        return Output(self.norm(x), cache, captured)

    def _run_blocks(self, run_block, x, cache, key):
        """Thread x through the stack, scanned or unrolled: the same code, the same parameters."""
        graphdef, params = split(self.blocks)
        run_block = functools.partial(run_block, graphdef)
        if self.config.remat:
            run_block = jax.checkpoint(run_block)
        keys = None if key is None else jax.random.split(key, self.config.depth)
        layers = (params, cache, keys)
        if self.config.scan_layers:
            x, (cache, captured) = jax.lax.scan(run_block, x, layers)
            return x, cache, captured
        outputs = []
        for layer in _unstack(layers, self.config.depth):
            x, output = run_block(x, layer)
            outputs.append(output)
        cache, captured = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
        return x, cache, captured


def _run_block(graphdef, x, layer, *, mask, angles, position, capture):
    """One layer of the stack, in the form that `jax.lax.scan` asks for."""
    params, cache, key = layer
    block = nnx.merge(graphdef, params)
    x, cache, captured = block(
        x, mask=mask, angles=angles, cache=cache, position=position, key=key, capture=capture
    )
    return x, (cache, captured)


def _unstack(tree: Any, length: int) -> list[Any]:
    """A tree of [L, ...] arrays as L trees.

    `jax.lax.split` has a concatenation for its gradient; indexing would add up L padded arrays.
    """
    leaves, structure = jax.tree.flatten(tree)
    slices = [
        [part.squeeze(0) for part in jax.lax.split(leaf, [1] * length, axis=0)] for leaf in leaves
    ]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*slices, strict=True)]


def empty_cache(config: TransformerConfig, batch_size: int) -> KVCache:
    """A cache [L, B, S, N, H] for `batch_size` sequences of up to `context` tokens."""
    shape = (config.depth, batch_size, config.context, config.heads, config.head_width)
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
