"""Flash attention with dropout on GPUs: FlashAttention-2 (Dao 2023) in Pallas, for Triton.

No kernel of a library that JAX reaches drops attention weights reproducibly from a key. These do:
`gptjax.layers.dropout.kept` gives every block of weights its part of the mask, forwards and again
backwards, so that neither weights nor masks are ever in memory.

The backward pass is two kernels, over blocks of keys and over blocks of queries, each of which
computes the weights again from the logarithm of each query's sum.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton
from jaxtyping import Array, Float, Int

from gptjax.layers.attention.reference import MASKED
from gptjax.layers.dropout import Dropout, kept

LOG2_E = math.log2(math.e)


class Blocks(NamedTuple):
    """Block sizes of a kernel, and how Triton compiles it."""

    queries: int
    keys: int
    warps: int
    stages: int


FORWARD, WIDE_FORWARD, BACKWARD = Blocks(128, 64, 4, 3), Blocks(128, 32, 8, 3), Blocks(64, 64, 4, 2)
"""Those of the forward kernel, of it with heads of 128, and of both backward kernels.

Compiled for an H200 by jax 0.10.2 they take at most 97 KiB of shared memory, with heads of 128, of
the 99 that a block has on the smallest GPUs (compute capabilities 8.6 and 8.9).
"""
MULTIPLE = 128
"""Lengths are padded to multiples of this, which all block sizes divide."""


class Rule(NamedTuple):
    """What all blocks share."""

    scale: float
    causal: bool
    window: int
    keys: int
    """Keys from here on are padding; 0: none are."""
    rate: float


def attend_with_dropout(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    segments: tuple[Int[Array | np.ndarray, "B T"], Int[Array | np.ndarray, "B S"]] | None,
    dropout: Dropout | None,
    *,
    scale: float,
    causal: bool,
    window: int,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`attend` on one GPU, with dropout of the attention weights [B, N, T, S].

    The backward pass's residuals are named "attention" for `jax.checkpoint`'s policies. A query
    whose keys are all masked gets a finite output, which is meaningless; its gradient is 0.

    Args:
      query: queries; H is a power of 2, at least 16.
      key: keys.
      value: values.
      segments: of queries and keys; a query attends to the keys of its segment.
      dropout: None drops nothing.
      scale: of the scores.
      causal: whether later keys are masked.
      window: keys at this distance or farther are masked; 0: no window.
      interpret: run the kernels in Pallas's interpreter, which works on any platform, slowly.
    """
    queries, keys = query.shape[1], key.shape[1]
    rate = 0.0 if dropout is None else dropout.rate
    rule = Rule(scale, causal, window, keys if keys % MULTIPLE else 0, rate)
    words = None if dropout is None else _padded(dropout.words, axis=3)
    if segments is not None:
        segments = _padded(segments[0], axis=1), _padded(segments[1], axis=1)
    query, key, value = (_padded(x, axis=1) for x in (query, key, value))
    z: Any = _attend(query, key, value, segments, words, rule, interpret)
    return z[:, :queries]


def _padded(x: jax.Array | np.ndarray, axis: int) -> jax.Array:
    missing = -x.shape[axis] % MULTIPLE
    widths = [(0, missing if each == axis else 0) for each in range(x.ndim)]
    return jnp.pad(x, widths) if missing else jnp.asarray(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(query, key, value, segments, words, rule, interpret) -> jax.Array:
    return _attend_forward(query, key, value, segments, words, rule, interpret)[0]


def _attend_forward(query, key, value, segments, words, rule, interpret):
    batch, queries, heads, _ = query.shape
    blocks = FORWARD if query.shape[3] <= 64 else WIDE_FORWARD
    specs = _by_query(query, key, blocks.queries)
    log_sums = jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32)
    z, log_sums = _call(
        _forward_kernel,
        (query, key, value, segments, words),
        (specs.queries, specs.keys, specs.keys, specs.segments, specs.words),
        rule,
        blocks,
        (queries // blocks.queries, batch * heads),
        (query, log_sums),
        (specs.queries, specs.row),
        interpret,
    )
    z, log_sums = (checkpoint_name(x, "attention") for x in (z, log_sums))
    return z, (query, key, value, segments, words, z, log_sums)


def _attend_backward(rule, interpret, residuals, gradient):
    query, key, value, segments, words, z, log_sums = residuals
    (batch, queries, heads, _), (keys, kv_heads) = query.shape, key.shape[1:3]
    # The softmax's gradient subtracts Σ_s weights · their gradient, which equals Σ_h z · gradient.
    means = jnp.einsum("btnh,btnh->bnt", z, gradient, preferred_element_type=jnp.float32)
    given = query, key, value, segments, words, gradient, log_sums, means

    def gradients(kernel, specs, grid, of, out_specs):
        of_keys, of_queries = (specs.keys, specs.keys), (specs.queries, specs.row, specs.row)
        in_specs = specs.queries, *of_keys, specs.segments, specs.words, *of_queries
        return _call(kernel, given, in_specs, rule, BACKWARD, grid, of, out_specs, interpret)

    specs = _by_key(query, key, BACKWARD.keys)
    grid = keys // BACKWARD.keys, batch * kv_heads
    of_keys = gradients(_keys_kernel, specs, grid, (key, value), (specs.keys, specs.keys))
    specs = _by_query(query, key, BACKWARD.queries)
    grid = queries // BACKWARD.queries, batch * heads
    of_queries = gradients(_queries_kernel, specs, grid, query, specs.queries)
    return of_queries, *of_keys, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _call(kernel, given, in_specs, rule, blocks: Blocks, grid, of, out_specs, interpret):
    """The kernel's outputs, of the shapes and dtypes of `of`."""
    return pl.pallas_call(
        functools.partial(kernel, rule=rule, blocks=blocks),
        grid=grid,
        in_specs=[None if x is None else spec for x, spec in zip(given, in_specs, strict=True)],
        out_specs=out_specs,
        out_shape=of,
        compiler_params=pallas_triton.CompilerParams(
            num_warps=blocks.warps, num_stages=blocks.stages
        ),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*given)


class Specs(NamedTuple):
    """What a program (block, row and head) sees of each array."""

    queries: pl.BlockSpec
    keys: pl.BlockSpec
    row: pl.BlockSpec
    """Of [B, N, T]."""
    words: pl.BlockSpec
    segments: tuple[pl.BlockSpec, pl.BlockSpec]


def _by_query(query: jax.Array, key: jax.Array, size: int) -> Specs:
    """A program sees a block of one head's queries, and all keys of that head."""
    (heads, width), (keys, kv_heads) = query.shape[2:], key.shape[1:3]

    def spec(shape: tuple[int | None, ...], place: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(
            shape, lambda block, pair: place(block, lax.div(pair, heads), lax.rem(pair, heads))
        )

    group = heads // kv_heads
    return Specs(
        spec((None, size, None, width), lambda block, row, head: (row, block, head, 0)),
        spec((None, keys, None, width), lambda _, row, head: (row, 0, lax.div(head, group), 0)),
        spec((None, None, size), lambda block, row, head: (row, head, block)),
        spec((2, None, None, size), lambda block, row, head: (0, row, head, block)),
        (
            spec((None, size), lambda block, row, _: (row, block)),
            spec((None, keys), lambda _, row, __: (row, 0)),
        ),
    )


def _by_key(query: jax.Array, key: jax.Array, size: int) -> Specs:
    """A program sees a block of one head's keys, and all queries of its group of heads."""
    (_, queries, heads, width), kv_heads = query.shape, key.shape[2]

    def spec(shape: tuple[int | None, ...], place: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(
            shape,
            lambda block, pair: place(block, lax.div(pair, kv_heads), lax.rem(pair, kv_heads)),
        )

    group = heads // kv_heads
    return Specs(
        spec((None, queries, group, width), lambda _, row, head: (row, 0, head, 0)),
        spec((None, size, None, width), lambda block, row, head: (row, block, head, 0)),
        spec((None, group, queries), lambda _, row, head: (row, head, 0)),
        spec((2, None, group, queries), lambda _, row, head: (0, row, head, 0)),
        (
            spec((None, queries), lambda _, row, __: (row, 0)),
            spec((None, size), lambda block, row, _: (row, block)),
        ),
    )


def _forward_kernel(
    query_ref, key_ref, value_ref, segments, words_ref, z_ref, sums_ref, *, rule, blocks
):
    start = pl.program_id(0) * blocks.queries
    query, rows = query_ref[...], start + jnp.arange(blocks.queries)[:, None]

    def add(block: Any, carry: Any) -> Any:
        z, top, total = carry
        here = pl.ds(block * blocks.keys, blocks.keys)
        columns = block * blocks.keys + jnp.arange(blocks.keys)[None]
        scores = (rule.scale * LOG2_E) * _dot(query, key_ref[here, :].T)
        ids = None if segments is None else (segments[0][...][:, None], segments[1][here][None])
        scores = jnp.where(_visible(rule, rows, columns, ids), scores, MASKED)
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights = jnp.exp2(scores - new_top[:, None])
        shrunk = jnp.exp2(top - new_top)
        total = shrunk * total + weights.sum(axis=1)
        if words_ref is not None:
            keep = kept(words_ref[0][:, None], words_ref[1][:, None], columns, rule.rate)
            weights = jnp.where(keep, weights, 0.0)
        value = value_ref[here, :]
        return shrunk[:, None] * z + _dot(weights.astype(value.dtype), value), new_top, total

    empty = jnp.zeros(query.shape, jnp.float32)
    top, total = jnp.full(len(query), MASKED), jnp.zeros(len(query), jnp.float32)
    bounds = _reach(start, blocks.queries, *_limits(rule), blocks.keys, key_ref.shape[0])
    z, top, total = lax.fori_loop(*bounds, add, (empty, top, total))
    total = jnp.maximum(total, 1e-30)  # Of a query without any block of keys it is 0.
    z_ref[...] = (z / ((1 - rule.rate) * total[:, None])).astype(z_ref.dtype)
    sums_ref[...] = top + jnp.log2(total)


def _keys_kernel(
    query_ref,
    key_ref,
    value_ref,
    segments,
    words_ref,
    gradient_ref,
    sums_ref,
    means_ref,
    key_gradient_ref,
    value_gradient_ref,
    *,
    rule,
    blocks,
):
    start = pl.program_id(0) * blocks.keys
    key, value = key_ref[...], value_ref[...]
    columns = start + jnp.arange(blocks.keys)[:, None]
    before, after = _limits(rule)
    # The queries that see a key at most `before` before them are at most so far after it.
    bounds = _reach(start, blocks.keys, after, before, blocks.queries, query_ref.shape[0])

    def add_head(head: Any, carry: Any) -> Any:
        def add(block: Any, carry: Any) -> Any:
            key_gradient, value_gradient = carry
            here = pl.ds(block * blocks.queries, blocks.queries)
            rows = block * blocks.queries + jnp.arange(blocks.queries)[None]
            query, gradient = query_ref[here, head, :], gradient_ref[here, head, :]
            ids = None if segments is None else (segments[0][here][None], segments[1][...][:, None])
            scores = (rule.scale * LOG2_E) * _dot(key, query.T)
            weights = jnp.exp2(scores - sums_ref[head, here][None])
            weights = jnp.where(_visible(rule, rows, columns, ids), weights, 0.0)
            dropped, weights_gradient = weights, _dot(value, gradient.T)
            if words_ref is not None:
                first, second = (words_ref[n, head, here][None] for n in (0, 1))
                keep = kept(first, second, columns, rule.rate)
                dropped = jnp.where(keep, weights / (1 - rule.rate), 0.0)
                weights_gradient = jnp.where(keep, weights_gradient / (1 - rule.rate), 0.0)
            scores_gradient = weights * (weights_gradient - means_ref[head, here][None])
            return (
                key_gradient + _dot(scores_gradient.astype(query.dtype), query),
                value_gradient + _dot(dropped.astype(gradient.dtype), gradient),
            )

        return lax.fori_loop(*bounds, add, carry)

    empty = jnp.zeros(key.shape, jnp.float32)
    key_gradient, value_gradient = lax.fori_loop(0, query_ref.shape[1], add_head, (empty, empty))
    key_gradient_ref[...] = (rule.scale * key_gradient).astype(key.dtype)
    value_gradient_ref[...] = value_gradient.astype(value.dtype)


def _queries_kernel(
    query_ref,
    key_ref,
    value_ref,
    segments,
    words_ref,
    gradient_ref,
    sums_ref,
    means_ref,
    query_gradient_ref,
    *,
    rule,
    blocks,
):
    start = pl.program_id(0) * blocks.queries
    query, gradient = query_ref[...], gradient_ref[...]
    sums, means = sums_ref[...][:, None], means_ref[...][:, None]
    rows = start + jnp.arange(blocks.queries)[:, None]

    def add(block: Any, query_gradient: Any) -> Any:
        here = pl.ds(block * blocks.keys, blocks.keys)
        columns = block * blocks.keys + jnp.arange(blocks.keys)[None]
        key, value = key_ref[here, :], value_ref[here, :]
        ids = None if segments is None else (segments[0][...][:, None], segments[1][here][None])
        weights = jnp.exp2((rule.scale * LOG2_E) * _dot(query, key.T) - sums)
        weights = jnp.where(_visible(rule, rows, columns, ids), weights, 0.0)
        weights_gradient = _dot(gradient, value.T)
        if words_ref is not None:
            keep = kept(words_ref[0][:, None], words_ref[1][:, None], columns, rule.rate)
            weights_gradient = jnp.where(keep, weights_gradient / (1 - rule.rate), 0.0)
        scores_gradient = weights * (weights_gradient - means)
        return query_gradient + _dot(scores_gradient.astype(key.dtype), key)

    bounds = _reach(start, blocks.queries, *_limits(rule), blocks.keys, key_ref.shape[0])
    query_gradient = lax.fori_loop(*bounds, add, jnp.zeros(query.shape, jnp.float32))
    query_gradient_ref[...] = (rule.scale * query_gradient).astype(query.dtype)


def _dot(a: Any, b: Any) -> Any:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _visible(rule: Rule, rows: Any, columns: Any, segments: tuple[Any, Any] | None) -> Any:
    """Whether the queries `rows` attend to the keys `columns`; all broadcast."""
    visible = jnp.full(jnp.broadcast_shapes(rows.shape, columns.shape), True)
    if rule.keys:
        visible &= columns < rule.keys
    if rule.causal:
        visible &= rows >= columns
    if rule.window:
        visible &= jnp.abs(rows - columns) < rule.window
    return visible if segments is None else visible & (segments[0] == segments[1])


def _limits(rule: Rule) -> tuple[int | None, int | None]:
    """How far before a query and after it the keys are that it sees; None: without limit."""
    distance = rule.window - 1 if rule.window else None
    return distance, 0 if rule.causal else distance


def _reach(
    start: Any, size: int, before: int | None, after: int | None, block: int, length: int
) -> tuple[Any, Any]:
    """The range of the blocks of the other side that `size` positions from `start` on attend to."""
    lower = 0 if before is None else lax.div(jnp.maximum(start - before, 0), block)
    upper = length // block
    if after is not None:
        upper = jnp.minimum(lax.div(start + size + after + block - 1, block), upper)
    return lower, upper
