"""A stack of layers, scanned or unrolled with the same code and parameters.

The parameters of L equal layers are stacked along a leading axis. If p kinds of layers alternate
(`attention="full,local"`), there are p stacks of L / p layers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from gptjax.config import InputError, TransformerConfig
from gptjax.config.values import RELATIVE_BUCKETS, AttentionKind, Remat, exhaustive
from gptjax.layers.attention.cache import KVCache
from gptjax.layers.attention.masks import AttentionMask, MaskRule, attention_mask, compressed_mask
from gptjax.layers.attention.module import AttentionInputs
from gptjax.layers.block import Block, BlockCache, BlockInputs
from gptjax.layers.embedding import Embedding
from gptjax.layers.hooks import Hooks, Interventions
from gptjax.layers.inputs import Cache, Inputs
from gptjax.layers.moe import RouterLosses
from gptjax.layers.norms import build_norm
from gptjax.layers.positions import alibi_bias, relative_buckets, rotary_angles
from gptjax.parallel.pipeline import run_stages, stages


class LayerInputs(NamedTuple):
    """The inputs that differ by layer; of all layers, each array has a leading axis L."""

    layer_index: Int[Array, "*L"] | int
    """Counted from 0."""
    cache: PyTree
    """Of earlier tokens, or None."""
    key: Key[Array, "*L"] | None
    """Dropout key; None: no dropout."""
    interventions: Interventions
    """At the layer's hook points."""


RunLayer = Callable[[int, PyTree, jax.Array, PyTree, LayerInputs], tuple[jax.Array, PyTree, PyTree]]
"""(kind, the layer's parameters, x, the inputs shared by all layers, the layer's own inputs) → (x,
the layer's cache, its other outputs)."""

SAVED = ("attention", "mlp")
"""What the policy "names" saves: the heads' weighted values, and the MLP's pre-activations."""
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
"""Policies of rematerialisation: what a block saves for its backward pass; the rest is recomputed
(Chen et al. 2016)."""


class StackOutput(NamedTuple):
    """The outputs of a stack of blocks."""

    hidden: Float[Array, "B T D"]
    """After the final norm, if there is one."""
    cache: Cache | None
    """The updated cache, if one was given."""
    captured: dict[str, jax.Array]
    """The captured hook points, stacked over layers: [L, ...]."""
    router_losses: RouterLosses | None
    """Of a mixture of experts, summed over layers."""


def stacked(build: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` independently initialised modules, as one whose leaves are [count, ...]."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap
    def built(rngs: nnx.Rngs) -> nnx.Module:
        return build(rngs)

    return built(rngs)


def unstacked(stacks: Sequence[PyTree], depth: int) -> list[PyTree]:
    """The parameters of each of `depth` layers, in order, from p stacks of [L / p, ...] arrays.

    The gradient of `jax.lax.split` is a concatenation; that of indexing adds L padded arrays.
    """
    count = depth // len(stacks)
    by_kind = []
    for stack in stacks:
        leaves, structure = jax.tree.flatten(stack)
        slices = [
            [part.squeeze(0) for part in jax.lax.split(leaf, [1] * count, axis=0)]
            for leaf in leaves
        ]
        layers = zip(*slices, strict=True)
        by_kind.append([jax.tree.unflatten(structure, layer) for layer in layers])
    return [layer for group in zip(*by_kind, strict=True) for layer in group]


def run_layers(
    run: RunLayer,
    stacks: Sequence[PyTree],
    x: Float[Array, "B T D"],
    shared: PyTree,
    *,
    config: TransformerConfig,
    depth: int,
    cache: Cache | None,
    key: Key[Array, ""] | None,
    interventions: Interventions = None,
    layers: Sequence[PyTree] | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None, PyTree]:
    """Apply `depth` layers to x: scanned or unrolled, with or without rematerialisation.

    In a program with pipeline stages the layers are scanned within each stage.

    Args:
      run: one layer.
      stacks: the parameters [L / p, ...] of each of the p kinds.
      x: the first layer's input.
      shared: further inputs, the same for all layers: arrays [B, ...] or [1, ...].
      config: its `scan_layers` and `remat` apply here.
      depth: L.
      cache: of each layer: a tree of [L, ...] arrays if scanned, else a list of L trees; or None.
      key: dropout key, split over the layers.
      interventions: [L, ...] or [1, ...] by hook point; not in a pipeline.
      layers: the parameters as returned by `unstacked`, if the caller has them; used by unrolled
        layers only.

    Returns:
      The last layer's output, the cache in its given form, and the other outputs, [L, ...].

    Raises:
      InputError: interventions in a pipeline.
    """
    policy, grouped = REMAT_POLICIES[config.remat], config.remat_layers > 1
    if config.remat != "none" and not grouped:
        run = jax.checkpoint(run, static_argnums=0, policy=policy)
    kinds = len(stacks)
    by_layer = LayerInputs(
        jnp.arange(depth),
        cache,
        None if key is None else jax.random.split(key, depth),
        # If their axis L is 1, they apply to every layer.
        jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (depth, *leaf.shape[1:])), interventions),
    )
    staged = cache is None and stages() > 1
    if staged and interventions:
        raise InputError("mesh.pipeline must be 1 for interventions: its stages take none.")
    if not (staged or config.scan_layers):
        return _unrolled(run, kinds, x, shared, layers or unstacked(stacks, depth), by_layer)

    size = max(kinds, config.remat_layers)

    def run_group(params: PyTree, x: jax.Array, shared: PyTree, by_layer: LayerInputs):
        """`size` consecutive layers; parameters are [...], or [size / p, ...] if grouped.

        They are indexed inside the rematerialised function: a slice taken outside would be saved
        for the backward pass besides the whole.
        """
        outputs = []
        for index in range(size):
            layer = params[index % kinds]
            if grouped:
                layer = jax.tree.map(lambda leaf, at=index // kinds: leaf[at], layer)
            of_layer = jax.tree.map(lambda leaf, at=index: leaf[at], by_layer)
            x, *output = run(index % kinds, layer, x, shared, of_layer)
            outputs.append(output)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    if config.remat != "none" and grouped:
        run_group = jax.checkpoint(run_group, policy=policy)
    params = _in_groups(list(stacks), size // kinds) if grouped else list(stacks)
    by_group = _in_groups(by_layer, size)
    if staged:
        x, outputs = run_stages(
            run_group, params, x, shared, by_group, requested=config.microbatches
        )
    else:
        x, outputs = jax.lax.scan(
            lambda x, group: run_group(group[0], x, shared, group[1]), x, (params, by_group)
        )
    cache, outputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
    return x, cache, outputs


def _in_groups(tree: PyTree, size: int) -> PyTree:
    """[n, ...] → [n / size, size, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), tree)


def _unrolled(run: RunLayer, kinds: int, x, shared, layers: Sequence[PyTree], own: LayerInputs):
    """`run_layers` as a Python loop; `own` is of all layers."""
    caches, outputs = [], []
    for index, params in enumerate(layers):
        key, interventions = jax.tree.map(
            lambda leaf, at=index: leaf[at], (own.key, own.interventions)
        )
        cache = None if own.cache is None else own.cache[index]
        of_layer = LayerInputs(index, cache, key, interventions)
        x, cache, output = run(index % kinds, params, x, shared, of_layer)
        caches.append(cache)
        outputs.append(output)
    outputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
    return x, None if own.cache is None else caches, outputs


def stacked_caches(config: TransformerConfig, caches: Sequence[PyTree]) -> Cache:
    """The caches of L layers, stacked if the config scans layers, else as a list."""
    if config.scan_layers:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
    return list(caches)


class BlockStack(nnx.Module):
    """The blocks of a decoder or an encoder, their final norm and their relative positions."""

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

        def build(kind: AttentionKind, rngs: nnx.Rngs) -> Block:
            return Block(config, attention=kind, cross=cross, rngs=rngs)

        per_kind = depth // len(pattern)
        stacks = [stacked(functools.partial(build, kind), per_kind, rngs) for kind in pattern]
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
        x: Float[Array, "B T D"],
        inputs: Inputs,
        *,
        key: Key[Array, ""] | None,
        memory: Float[Array, "B S D"] | None = None,
    ) -> StackOutput:
        """The output of the last block for the embeddings x, after the final norm.

        `key` is the blocks' dropout key, None for no dropout; `memory` is the encoder's output for
        `inputs.source`, None with a cache.

        Raises:
          InputError: packed rows for a stack that cannot separate documents.
        """
        graphdefs, params = self._split()

        def run(kind: int, params: PyTree, x: jax.Array, shared: PyTree, own: LayerInputs):
            of_block: BlockInputs = shared[self.config.attention_pattern[kind]]
            attention = of_block.attention._replace(
                cache_index=inputs.cache_index, layer=own.layer_index
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
            self._block_inputs(x, inputs, memory),
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

    def empty_cache(self, batch_size: int, memory: Float[Array, "B S D"] | None = None) -> Cache:
        """A cache of `context_length` zeros per block, with the keys and values of `memory`."""
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

    def layers(self) -> list[PyTree]:
        """The parameters of each block, for callers that run the stack many times."""
        return unstacked(self._split()[1], self.depth)

    def each(self) -> list[Block]:
        """The blocks as separate modules, with the current parameters."""
        graphdefs = self._split()[0]
        return [
            nnx.merge(graphdefs[index % len(graphdefs)], params)
            for index, params in enumerate(self.layers())
        ]

    def _split(self) -> tuple[list[nnx.GraphDef], list[nnx.State]]:
        """The structure and the parameters of each kind's stack."""
        blocks = self.blocks
        stacks = list(blocks) if isinstance(blocks, nnx.List) else [blocks]
        parts = [nnx.split(stack, nnx.Param) for stack in stacks]
        return [graphdef for graphdef, _ in parts], [params for _, params in parts]

    def _check_packed(self, inputs: Inputs) -> None:
        if inputs.segment_ids is None:
            return
        if "compressed" in self.config.attention_pattern:
            raise InputError(
                f"TransformerConfig.attention is {self.config.attention!r}: compressed attention "
                "merges neighbouring tokens of different documents: a row may hold only one."
            )
        if inputs.cache is not None:
            raise InputError("A cache holds one document per row: segment_ids must be None.")

    def _block_inputs(
        self, x: jax.Array, inputs: Inputs, memory: jax.Array | None
    ) -> dict[str, BlockInputs]:
        """The inputs of the blocks besides the residual stream, by kind of attention."""
        self._check_packed(inputs)
        config, cached = self.config, inputs.cache is not None
        keys = jax.tree.leaves(inputs.cache)[0].shape[-2] if cached else x.shape[1]
        slots = jnp.atleast_1d(inputs.cache_index)[:, None] + jnp.arange(x.shape[1])
        # Distances do not depend on packing: within a document they are the same in the row as in
        # the document, and across documents they are masked.
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
            case "learned" | "sinusoidal" | "none":  # Added to the embeddings, or none at all.
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
            None if source_mask is None else jnp.expand_dims(source_mask, 1),
            MaskRule(causal=False, padding_mask=source_mask),
        )
        return {
            kind: BlockInputs(
                AttentionInputs(mask(kind), bias, angles), AttentionInputs(cross), memory
            )
            for kind in config.attention_pattern
        }
