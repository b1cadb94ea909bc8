"""Layers one after another, scanned or unrolled: the same code, the same parameters.

The parameters of L equal layers are stacked along a leading axis. Where layers of p kinds take
turns (`attention="full,local"`), there are p stacks of L / p layers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import InputError, TransformerConfig
from gptjax.config.values import RELATIVE_BUCKETS, AttentionKind, Remat, exhaustive
from gptjax.layers.attention.cache import KVCache
from gptjax.layers.attention.masks import AttentionMask, MaskRule, attention_mask, compressed_mask
from gptjax.layers.attention.module import AttentionInputs
from gptjax.layers.block import Block, BlockCache, BlockInputs
from gptjax.layers.embedding import Embedding
from gptjax.layers.hooks import Hooks, Interventions
from gptjax.layers.inputs import Inputs
from gptjax.layers.moe import RouterLosses
from gptjax.layers.norms import build_norm
from gptjax.layers.positions import alibi_bias, relative_buckets, rotary_angles
from gptjax.parallel.pipeline import run_stages, stages


class LayerInputs(NamedTuple):
    """What is a layer's own, beside its parameters."""

    number: Any
    """From 0."""
    cache: Any
    """Of the tokens before, or None."""
    key: jax.Array | None
    """Of its dropout; None drops nothing."""
    interventions: Interventions
    """At its hook points."""


RunLayer = Callable[[int, Any, jax.Array, Any, LayerInputs], tuple[jax.Array, Any, Any]]
"""(kind, the layer's parameters, x, what belongs to x's rows, what is the layer's own) → (x, its
cache, its other outputs)."""

SAVED = ("attention", "mlp")
"""What the policy "names" keeps: the heads' weighted values, and what the activation takes."""
REMAT_POLICIES = exhaustive(
    Remat,
    {
        "none": jax.checkpoint_policies.everything_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "names": jax.checkpoint_policies.save_only_these_names(*SAVED),
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["residual"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    },
)
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
    interventions: Interventions = None,
    layers: Sequence[Any] | None = None,
) -> tuple[jax.Array, Any, Any]:
    """Thread x through `depth` layers: scanned or not, recomputed or not, as `config` says.

    Where the program is split into the stages of a pipeline, they are its stages, always scanned.

    Args:
      run: one layer.
      stacks: the parameters [L / p, ...] of each of the p kinds.
      x: what enters the first layer.
      rows: what every layer takes beside the rows of x, arrays [B, ...] or [1, ...].
      config: its `scan_layers` and `remat` count here.
      depth: L.
      cache: of each layer: a tree of [L, ...] arrays if scanned, else a list of L trees; or None.
      key: dropout key, from which each layer gets its own.
      interventions: at hook points, of which each layer gets its own; not in a pipeline.
      layers: the parameters as `unstacked` gives them, where the caller has them so; a loop over
        the layers does not use them.

    Returns:
      What leaves the last layer, the cache in the form in which it came, and the other outputs,
      [L, ...].

    Raises:
      InputError: interventions in a pipeline.
    """
    policy, grouped = REMAT_POLICIES[config.remat], config.remat_layers > 1
    if config.remat != "none" and not grouped:
        run = jax.checkpoint(run, static_argnums=0, policy=policy)
    kinds = len(stacks)
    own = LayerInputs(
        jnp.arange(depth),
        cache,
        None if key is None else jax.random.split(key, depth),
        # Those whose axis L is 1 are of every layer.
        jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (depth, *leaf.shape[1:])), interventions),
    )
    staged = cache is None and stages() > 1
    if staged and interventions:
        raise InputError("mesh.pipeline must be 1 for interventions: its stages take none.")
    if not (staged or config.scan_layers):
        return _unrolled(run, kinds, x, rows, layers or unstacked(stacks, depth), own)

    together = max(kinds, config.remat_layers)

    def turn(params: Any, x: jax.Array, rows: Any, own: LayerInputs) -> tuple[jax.Array, Any]:
        """Layers of each kind; parameters are [...], or [layers of the kind, ...] in groups.

        A part that is taken out of them would be kept for the backward pass beside the whole; what
        is recomputed takes it again.
        """
        outputs = []
        for index in range(together):
            layer = params[index % kinds]
            if grouped:
                layer = jax.tree.map(lambda leaf, at=index // kinds: leaf[at], layer)
            given = jax.tree.map(lambda leaf, at=index: leaf[at], own)
            x, *output = run(index % kinds, layer, x, rows, given)
            outputs.append(output)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    if config.remat != "none" and grouped:
        turn = jax.checkpoint(turn, policy=policy)
    params = _grouped(list(stacks), together // kinds) if grouped else list(stacks)
    by_turn = _grouped(own, together)
    if staged:
        x, outputs = run_stages(turn, params, x, rows, by_turn, asked=config.microbatches)
    else:
        x, outputs = jax.lax.scan(
            lambda x, given: turn(given[0], x, rows, given[1]), x, (params, by_turn)
        )
    cache, outputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
    return x, cache, outputs


def _grouped(tree: Any, size: int) -> Any:
    """[n, ...] → [n / size, size, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), tree)


def _unrolled(run: RunLayer, kinds: int, x, rows, layers: Sequence[Any], own: LayerInputs):
    """The layers one after another; the results as `run_layers` gives them."""
    caches, outputs = [], []
    for index, params in enumerate(layers):
        keys, interventions = jax.tree.map(
            lambda leaf, at=index: leaf[at], (own.key, own.interventions)
        )
        cache = None if own.cache is None else own.cache[index]
        given = LayerInputs(index, cache, keys, interventions)
        x, cache, output = run(index % kinds, params, x, rows, given)
        caches.append(cache)
        outputs.append(output)
    outputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
    return x, None if own.cache is None else caches, outputs


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
        if config.position_embedding == "relative":
            self.relative = Embedding(RELATIVE_BUCKETS, config.heads, axes="-N", rngs=rngs)
        self.config = config
        self.depth = depth
        self.causal = causal
        self.cross = cross

    def __call__(
        self,
        x: jax.Array,
        inputs: Inputs,
        *,
        key: jax.Array | None,
        memory: jax.Array | None = None,
    ) -> StackOutput:
        """Run the blocks.

        Args:
          x: [B, T, D], the embeddings of `inputs.tokens`.
          inputs: of the forward pass.
          key: dropout key of the blocks; None drops nothing.
          memory: [B, S, D], the encoder's output for `inputs.source`; None with a cache.

        Raises:
          InputError: packed rows for a stack that cannot keep documents apart.
        """
        rows = self._block_inputs(x, inputs, memory)
        graphdefs, params = self._split()

        def run(kind: int, params: Any, x: jax.Array, rows: Any, own: LayerInputs):
            of_block: BlockInputs = rows[self.config.attention_pattern[kind]]
            attention = of_block.attention._replace(
                cache_index=inputs.cache_index, layer=own.number
            )
            hook = Hooks(
                inputs.capture, own.interventions, dropout_rate=self.config.dropout, key=own.key
            )
            x, cache, losses = nnx.merge(graphdefs[kind], params)(
                x, of_block._replace(attention=attention), cache=own.cache, hook=hook
            )
            return x, cache, (hook.captured, losses)

        x, cache, (captured, losses) = run_layers(
            run,
            params,
            x,
            rows,
            config=self.config,
            depth=self.depth,
            cache=inputs.cache,
            key=key,
            interventions=inputs.interventions,
            layers=inputs.layers,
        )
        losses = jax.tree.map(lambda leaf: leaf.sum(axis=0), losses)
        hidden = x if self.norm is None else self.norm(x)
        return StackOutput(hidden, cache, captured, losses)

    def empty_cache(self, batch_size: int, memory: jax.Array | None = None) -> Any:
        """A cache of `context` slots for each block, with its keys and values of `memory`."""
        config = self.config
        shape = (batch_size, config.actual_kv_heads, config.context_length, config.actual_head_dim)

        def block_cache(block: Block) -> BlockCache:
            own = KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
            if memory is None or block.cross_attention is None:
                return BlockCache(own, None)
            return BlockCache(own, block.memory_kv(memory).swapped())

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

    def _check_packed(self, inputs: Inputs) -> None:
        if inputs.segment_ids is None:
            return
        if "compressed" in self.config.attention_pattern:
            raise InputError(
                "TransformerConfig.attention is "
                f"{self.config.attention!r}: compressed attention joins neighbouring tokens of "
                "different documents, so that a row takes one document."
            )
        if inputs.cache is not None:
            raise InputError("A cache holds one document per row: give it no segment_ids.")

    def _block_inputs(
        self, x: jax.Array, inputs: Inputs, memory: jax.Array | None
    ) -> dict[str, BlockInputs]:
        """What the blocks of each kind of attention take beside the stream."""
        self._check_packed(inputs)
        config, cached = self.config, inputs.cache is not None
        keys = _cache_length(inputs.cache) if cached else x.shape[1]
        slots = jnp.atleast_1d(inputs.cache_index)[:, None] + jnp.arange(x.shape[1])
        # Two tokens of one document are as far apart in their row as in the document, and none
        # attends to another document: a distance is the same for all rows, packed or not.
        distance = slots[..., None] - jnp.arange(keys)
        bias = angles = None
        match config.position_embedding:
            case "alibi":
                bias = alibi_bias(distance, config.heads)
            case "relative":
                buckets = relative_buckets(distance, bidirectional=not self.causal)
                bias = jnp.moveaxis(self.relative(buckets), -1, 1)
            case "rotary":
                positions = slots if inputs.positions is None else inputs.positions
                angles = rotary_angles(positions, config.rotary_dim, config.rope_theta)
            case "learned" | "sinusoidal" | "none":  # Added to the embeddings, or nowhere.
                pass
            case unknown:
                assert_never(unknown)
        padding_mask = None if cached else inputs.padding_mask

        def mask(kind: AttentionKind) -> AttentionMask:
            window = 0
            match kind:
                case "compressed":
                    return AttentionMask(compressed_mask(slots, keys, config.compression))
                case "local":
                    window = config.window
                case "full":
                    pass
                case unknown:
                    assert_never(unknown)
            rule = MaskRule(self.causal, window, padding_mask, inputs.segment_ids)
            return AttentionMask(attention_mask(distance, rule), None if cached else rule)

        source_mask = inputs.source_mask if self.cross else None
        cross = AttentionMask(
            None if source_mask is None else source_mask[:, None],
            MaskRule(causal=False, padding_mask=source_mask),
        )
        return {
            kind: BlockInputs(
                AttentionInputs(mask(kind), bias, angles), AttentionInputs(cross), memory
            )
            for kind in config.attention_pattern
        }


def _build_block(
    config: TransformerConfig, kind: AttentionKind, cross: bool, rngs: nnx.Rngs
) -> Block:
    return Block(config, attention=kind, cross=cross, rngs=rngs)


def _cache_length(cache: Any) -> int:
    return jax.tree.leaves(cache)[0].shape[-2]
