"""Layers one after another, scanned or unrolled: the same code, the same parameters.

The parameters of L equal layers are stacked along a leading axis. Where layers of p kinds take
turns (`attention="full,local"`), there are p stacks of L / p layers.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import InputError, TransformerConfig
from gptjax.layers.attention.flash import Sight
from gptjax.layers.attention.module import KVCache, attention_mask, compressed_mask
from gptjax.layers.block import Block, BlockCache, View
from gptjax.layers.embedding import Embedding
from gptjax.layers.hooks import Capture, Intervention, Taps
from gptjax.layers.moe import RouterLosses
from gptjax.layers.norms import build_norm
from gptjax.layers.positions import RELATIVE_BUCKETS, alibi_bias, relative_buckets, rotary_angles
from gptjax.parallel.pipeline import run_stages, stages

Edits = Mapping[str, Intervention] | None
"""Interventions by place, of all layers [L, ...] or of one."""
RunLayer = Callable[
    [int, Any, jax.Array, Any, Any, jax.Array | None, Edits], tuple[jax.Array, Any, Any]
]
"""(kind, the layer's parameters, x, what belongs to x's rows, the layer's cache, its key, its
interventions) → (x, its cache, its other outputs)."""

SAVED = ("attention", "feedforward")
"""What the policy "names" keeps: what a query read, and what the activation is computed of."""
REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names(*SAVED),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["residual"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What stays of a block between the passes; the rest is computed again (Chen et al. 2016)."""


class StackOutput(NamedTuple):
    """What a stack of blocks returns."""

    hidden: jax.Array
    """[B, T, D], normalised by the final norm where there is one."""
    cache: Any
    """The cache with these tokens in it, where one was given."""
    captured: dict[str, jax.Array]
    """The intermediates asked for, stacked over layers: [L, ...]."""
    router_losses: RouterLosses | None
    """Of a mixture of experts, summed over layers."""


def stacked(build: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules with parameters of their own, as one whose leaves are [count, ...]."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap
    def built(rngs: nnx.Rngs) -> nnx.Module:
        return build(rngs)

    return built(rngs)


def unstacked(stacks: Sequence[Any], depth: int) -> list[Any]:
    """The `depth` layers' trees of p stacks of [L / p, ...] arrays, in order.

    `jax.lax.split` has a concatenation for its gradient; indexing would add up L padded arrays.
    """
    count = depth // len(stacks)
    by_kind = []
    for stack in stacks:
        leaves, structure = jax.tree.flatten(stack)
        slices = [
            [part.squeeze(0) for part in jax.lax.split(leaf, [1] * count, axis=0)]
            for leaf in leaves
        ]
        by_kind.append(
            [jax.tree.unflatten(structure, layer) for layer in zip(*slices, strict=True)]
        )
    return [layer for turn in zip(*by_kind, strict=True) for layer in turn]


def run_layers(
    run: RunLayer,
    stacks: Sequence[Any],
    x: jax.Array,
    rows: Any,
    *,
    config: TransformerConfig,
    depth: int,
    cache: Any,
    key: jax.Array | None,
    edits: Edits = None,
    layers: Sequence[Any] | None = None,
) -> tuple[jax.Array, Any, Any]:
    """Thread x through `depth` layers: scanned or not, recomputed or not, as `config` says.

    Where the program is parted into the stages of a pipeline, they are its stages, always scanned.

    Args:
      run: one layer.
      stacks: the parameters [L / p, ...] of each of the p kinds.
      x: what enters the first layer.
      rows: what every layer is told of the rows of x, arrays [B, ...] or [1, ...].
      config: its `scan_layers` and `remat` count here.
      depth: L.
      cache: of each layer: a tree of [L, ...] arrays if scanned, else a list of L trees; or None.
      key: dropout key, from which each layer gets its own.
      edits: interventions, of which each layer gets its own; not in a pipeline.
      layers: the parameters as `unstacked` gives them, where the caller has them so; a loop over
        the layers does not use them.

    Returns:
      What leaves the last layer, the cache in the form in which it came, and the other outputs,
      [L, ...].

    Raises:
      InputError: interventions in a pipeline.
    """
    policy, grouped = REMAT_POLICIES.get(config.remat), config.remat_layers > 1
    if config.remat != "none" and not grouped:
        run = jax.checkpoint(run, static_argnums=0, policy=policy)
    kinds = len(stacks)
    keys = None if key is None else jax.random.split(key, depth)
    edits = _of_layers(edits, depth)
    staged = cache is None and stages() > 1
    if staged and edits:
        raise InputError("mesh.pipeline must be 1 for interventions: its stages take none.")
    if not (staged or config.scan_layers):
        layers = layers or unstacked(stacks, depth)
        return _unrolled(run, kinds, x, rows, layers, cache, keys, edits)

    together = max(kinds, config.remat_layers)

    def turn(
        params: Any, x: jax.Array, rows: Any, cache: Any, keys: Any, edits: Edits
    ) -> tuple[jax.Array, Any]:
        """Layers of each kind; parameters are [...], or [layers of the kind, ...] in groups.

        A part that is taken out of them would be kept for the backward pass beside the whole; what
        is recomputed takes it again.
        """
        outputs = []
        for index in range(together):
            own = params[index % kinds]
            if grouped:
                own = jax.tree.map(lambda leaf, at=index // kinds: leaf[at], own)
            given = jax.tree.map(lambda leaf, at=index: leaf[at], (cache, keys, edits))
            x, *output = run(index % kinds, own, x, rows, *given)
            outputs.append(output)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    if config.remat != "none" and grouped:
        turn = jax.checkpoint(turn, policy=policy)
    params = _grouped(list(stacks), together // kinds) if grouped else list(stacks)
    by_turn = _grouped((cache, keys, edits), together)
    if staged:
        x, outputs = run_stages(
            lambda params, x, rows, keys: turn(params, x, rows, None, keys, None),
            params,
            x,
            rows,
            by_turn[1],
            asked=config.microbatches,
        )
    else:
        x, outputs = jax.lax.scan(
            lambda x, given: turn(given[0], x, rows, *given[1]), x, (params, by_turn)
        )
    cache, outputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
    return x, cache, outputs


def _grouped(tree: Any, size: int) -> Any:
    """[n, ...] → [n / size, size, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), tree)


def _of_layers(edits: Edits, depth: int) -> Edits:
    """Interventions whose axis L is `depth` long, not 1."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (depth, *leaf.shape[1:])), edits)


def _unrolled(run: RunLayer, kinds: int, x, rows, layers: Sequence[Any], cache, keys, edits):
    """The layers one after another; the results as `run_layers` gives them."""
    caches, outputs = [], []
    for index, params in enumerate(layers):
        own_cache = None if cache is None else cache[index]
        given = jax.tree.map(lambda leaf, at=index: leaf[at], (keys, edits))
        x, own_cache, output = run(index % kinds, params, x, rows, own_cache, *given)
        caches.append(own_cache)
        outputs.append(output)
    outputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
    return x, None if cache is None else caches, outputs


def stacked_caches(config: TransformerConfig, caches: Sequence[Any]) -> Any:
    """The caches of L layers in the form that `run_layers` takes."""
    if config.scan_layers:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
    return list(caches)


class BlockStack(nnx.Module):
    """The blocks of a decoder or an encoder, and what they share."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        depth: int,
        causal: bool,
        cross: bool = False,
        rngs: nnx.Rngs,
    ):
        pattern = config.attention_pattern
        stacks = [
            stacked(
                functools.partial(_build_block, config, kind, cross), depth // len(pattern), rngs
            )
            for kind in pattern
        ]
        self.blocks = stacks[0] if len(pattern) == 1 else nnx.List(stacks)
        self.norm = build_norm(config) if config.final_norm else None
        if config.positions == "relative":
            self.relative = Embedding(RELATIVE_BUCKETS, config.heads, axes="-N", rngs=rngs)
        self.config = config
        self.depth = depth
        self.causal = causal

    def __call__(
        self,
        x: jax.Array,
        *,
        valid: jax.Array | None = None,
        documents: jax.Array | None = None,
        positions: jax.Array | None = None,
        memory: jax.Array | None = None,
        memory_valid: jax.Array | None = None,
        cache: Any = None,
        start: jax.Array | int = 0,
        key: jax.Array | None = None,
        capture: Capture = (),
        edits: Edits = None,
        layers: Sequence[Any] | None = None,
    ) -> StackOutput:
        """Run the blocks.

        Args:
          x: [B, T, D].
          valid: [B, S], False at keys that are padding; S is T, or the cache's length.
          documents: [B, T], which of its row's documents each token is of, where rows are packed;
            none looks at another's. The tokens of a document stand side by side.
          positions: [B, T], the place of each token in its document; None counts from `start`.
          memory: [B, S', D], what cross-attention looks at.
          memory_valid: [B, S'], False at its padding.
          cache: from `empty_cache`; None attends within x alone.
          start: the place of x's first token in its sequence, a number or [B].
          key: dropout key; None drops nothing.
          capture: what to return of `taps`' places.
          edits: interventions at them.
          layers: the blocks' parameters as `unstacked` gives them, where a caller that runs many
            times has them so; unrolled only.

        Raises:
          InputError: documents for a stack that cannot keep them apart.
        """
        config = self.config
        if documents is not None:
            self._check_packed(cache)
        keys = x.shape[1] if cache is None else _cache_length(cache)
        places = jnp.atleast_1d(start)[:, None] + jnp.arange(x.shape[1])
        positions = places if positions is None else positions
        views = self._views(places, positions, keys, valid, documents, memory_valid)
        graphdefs, params = self._split()

        def run(
            kind: int, params: Any, x: jax.Array, rows: Any, cache: Any, key: Any, edits: Edits
        ):
            views, memory = rows
            taps = Taps(capture, edits)
            x, cache, losses = nnx.merge(graphdefs[kind], params)(
                x,
                views[config.attention_pattern[kind]],
                memory=memory,
                cache=cache,
                start=start,
                key=key,
                taps=taps,
            )
            return x, cache, (taps.captured, losses)

        x, cache, (captured, losses) = run_layers(
            run,
            params,
            x,
            (views, memory),
            config=config,
            depth=self.depth,
            cache=cache,
            key=key,
            edits=edits,
            layers=layers,
        )
        losses = jax.tree.map(lambda leaf: leaf.sum(axis=0), losses)
        hidden = x if self.norm is None else self.norm(x)
        return StackOutput(hidden, cache, captured, losses)

    def empty_cache(self, batch_size: int, memory: jax.Array | None = None) -> Any:
        """A cache of `context` places for each block, with what it will read of `memory`."""
        config = self.config
        shape = (batch_size, config.key_value_heads, config.context, config.head_width)

        def block_cache(block: Block) -> BlockCache:
            own = KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
            if memory is None or block.cross_attention is None:
                return BlockCache(own, None)
            return BlockCache(own, block.cross_attention.keys_values(memory).swapped())

        graphdefs, params = self._split()
        caches = [
            block_cache(nnx.merge(graphdefs[index % len(graphdefs)], layer))
            for index, layer in enumerate(unstacked(params, self.depth))
        ]
        return stacked_caches(config, caches)

    def layers(self) -> list[Any]:
        """The parameters of each block, for callers that run the stack many times."""
        return unstacked(self._split()[1], self.depth)

    def each(self) -> list[Block]:
        """The blocks one by one, with the parameters that they have now."""
        graphdefs = self._split()[0]
        return [
            nnx.merge(graphdefs[index % len(graphdefs)], params)
            for index, params in enumerate(self.layers())
        ]

    def _split(self) -> tuple[list[nnx.GraphDef], list[Any]]:
        """Structure and parameters of each kind's stack."""
        blocks = self.blocks
        stacks = list(blocks) if isinstance(blocks, nnx.List) else [blocks]
        parts = [nnx.split(stack, nnx.Param) for stack in stacks]
        return [graphdef for graphdef, _ in parts], [params for _, params in parts]

    def _check_packed(self, cache: Any) -> None:
        if "compressed" in self.config.attention_pattern:
            raise InputError(
                "TransformerConfig.attention is "
                f"{self.config.attention!r}: compressed attention joins neighbouring tokens of "
                "different documents, so that a row takes one document."
            )
        if cache is not None:
            raise InputError("A cache is of one document a row: give it no documents.")

    def _views(self, places, positions, keys, valid, documents, memory_valid) -> dict[str, View]:
        """What each kind of attention is told."""
        config = self.config
        # Two tokens of one document are as far apart in their row as in the document, and of two
        # documents none sees the other: a distance is the same for all rows, packed or not.
        distance = places[..., None] - jnp.arange(keys)
        bias = angles = None
        if config.positions == "alibi":
            bias = alibi_bias(distance, config.heads)
        if config.positions == "relative":
            buckets = relative_buckets(distance, bidirectional=not self.causal)
            bias = jnp.moveaxis(self.relative(buckets), -1, 1)
        if config.positions == "rotary":
            angles = rotary_angles(positions, config.rotary_width, config.rotary_base)
        memory_mask = None if memory_valid is None else memory_valid[:, None]
        memory_sight = Sight(causal=False, valid=memory_valid)
        views = {}
        for kind in config.attention_pattern:
            sight = None
            if kind == "compressed":
                mask = compressed_mask(places, keys, config.compression)
            else:
                window = config.window if kind == "local" else 0
                sight = Sight(self.causal, window, valid, documents)
                mask = attention_mask(distance, **vars(sight))
            views[kind] = View(mask, bias, angles, memory_mask, sight, memory_sight)
        return views


def _build_block(config: TransformerConfig, kind: str, cross: bool, rngs: nnx.Rngs) -> Block:
    return Block(config, attention=kind, cross=cross, rngs=rngs)


def _cache_length(cache: Any) -> int:
    return jax.tree.leaves(cache)[0].shape[-2]
