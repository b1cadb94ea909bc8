"""Flash attention: kernels that never materialise the scores [B, N, T, S].

| `attention_kernel` | platform | implementation |
|---|---|---|
| xla | any | `attend` |
| splash | TPU | FlashAttention-2 (Dao 2023) in Pallas, skipping fully masked blocks |
| cudnn | GPU | FlashAttention-2 in cuDNN, by `jax.nn.dot_product_attention` |
| triton | GPU | FlashAttention-2 with dropout, our own (triton.py) |

Kernels take masks as a rule (`MaskRule`), not as an array. kernels.py chooses one for the devices.
Four of GPT-2's layers, 8 x 1024 tokens per device in bfloat16, compiled for v5e:4x4 with their
backward pass, have a peak memory of 1.42 GiB with splash and of 2.97 with XLA.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptjax.config.values import AttentionKernel
from gptjax.layers.attention.masks import MaskRule
from gptjax.layers.dropout import Dropout
from gptjax.parallel.sharding import auto_mesh, mesh_axes, spec

MOST_HEADS = 65_535
"""CUDA's limit on the second axis of a grid, over which Triton's programs have a row's head."""
LANES = 128
"""Splash takes lengths that are multiples of this, a TPU's vector width."""
BLOCK = 512
"""Splash's maximum block size, of queries and of keys.

Compiled for v5e by libtpu 0.0.42, attention of GPT-2 124M forward and backward (8 x 1024 tokens, 12
heads of 64, bfloat16) peaks at 174 MiB with blocks of 128, 512 and 1024 alike, and compiles in 2 s,
with 1024 in 4 s. Blocks of 1024 do not fit into a core's memory with float32 heads of 256.
"""
MAX_FUSED_BLOCKS = 2
"""The most blocks of keys for which splash's backward pass is one fused kernel instead of two.

The fused kernel computes the scores once, but holds a gradient of the queries per block of keys.
With 2 blocks its peak memory is the one above; with the 4 of 4 x 2048 tokens it is 216 MiB where
two kernels have 174, and with the 16 of 8192 tokens 504 where two have 180.
"""


def takes(
    kernel: AttentionKernel,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    rule: MaskRule,
    dropout: Dropout | None = None,
) -> bool:
    """Whether `kernel` supports the lengths of query and key, with this mask and dropout.

    `resolve_kernel` knows only the maximum length; prompts and batches of pairs may be shorter.
    """
    if dropout is not None and kernel != "triton":
        return False
    match kernel:
        case "splash":
            queries = query.shape[1] // _query_shards(query)
            return queries % LANES == 0 and key.shape[1] % LANES == 0
        case "cudnn":  # JAX refuses odd lengths in training, also where there is no bias.
            return query.shape[1] % 2 == key.shape[1] % 2 == 0
        case "triton":
            return query.shape[0] * query.shape[2] <= MOST_HEADS
        case "auto" | "xla":
            return False
        case unknown:
            assert_never(unknown)


def attend_by(
    kernel: str,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    rule: MaskRule,
    scale: float,
    cap: float,
    dropout: Dropout | None = None,
) -> Float[Array, "B T N H"]:
    """`attend` by the kernel of that name; see `splash`."""
    if kernel == "splash":
        return splash(query, key, value, rule, scale, cap)
    if kernel == "triton":
        return triton(query, key, value, rule, scale, dropout)
    return cudnn(query, key, value, rule, scale)


def splash(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    rule: MaskRule,
    scale: float,
    cap: float = 0.0,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`attend` on a TPU, by splash attention.

    On a mesh rows, heads and queries are sharded, and each device has all keys of its rows. The
    backward pass's residuals are named "attention" for `jax.checkpoint`'s policies. A query whose
    keys are all masked gets a finite output, which is meaningless, as is its gradient.

    Args:
      query: queries; T is a multiple of 128 on each device.
      key: keys; S is a multiple of 128.
      value: values.
      rule: the mask.
      scale: of the scores.
      cap: scores become cap · tanh(score / cap); 0 leaves them.
      interpret: run the kernel in Pallas's interpreter, which works on any platform, slowly.
    """
    # Importing Pallas takes 0.1 s, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds, make_splash_mha

    (_, queries, heads, _), keys = query.shape, key.shape[1]
    shards = _query_shards(query)
    kernel = make_splash_mha(
        _splash_mask(rule, heads, queries, keys),
        block_sizes=_splash_blocks(queries // shards, keys),
        attn_logits_soft_cap=cap or None,
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    segments = _segments(rule, queries)

    def attend_by_head(kernel: Any, query: Any, key: Any, value: Any, segments: Any) -> jax.Array:
        by_head = (x.swapaxes(1, 2) for x in (query, key, value))
        ids = None if segments is None else SegmentIds(*segments)
        return jax.vmap(kernel)(*by_head, ids).swapaxes(1, 2)

    # Splash has no scale. Head dim 64's, 1 / 8, is exact in bfloat16; others round the queries.
    args = kernel, scale * query, key, value, segments
    mesh = auto_mesh()
    if mesh is None:
        return attend_by_head(*args)
    query_spec = rows, positions, sharded_heads, _ = spec("BTNH", query.shape)
    specs = (
        kernel.manual_sharding_spec(NamedSharding(mesh, P(None, positions))),
        query_spec,
        P(rows, None, sharded_heads),
        P(rows, None, sharded_heads),
        None if segments is None else (P(rows, positions), P(rows)),
    )
    return _on_each_device(mesh, attend_by_head, specs, query_spec)(*args)


def _segments(
    rule: MaskRule, queries: int
) -> tuple[Int[Array | np.ndarray, "B T"], Int[Array | np.ndarray, "B S"]] | None:
    """Segment ids of queries and keys: a query attends to the keys of its id."""
    padding_mask, segment_ids = rule.padding_mask, rule.segment_ids
    if padding_mask is None:
        return None if segment_ids is None else (segment_ids, segment_ids)
    if segment_ids is None:
        zeros = jnp.zeros((len(padding_mask), queries), jnp.int32)
        return zeros, jnp.where(padding_mask, 0, -1)
    return segment_ids, jnp.where(padding_mask, segment_ids, -1)


def _splash_mask(rule: MaskRule, heads: int, queries: int, keys: int) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        CausalMask,
        FullMask,
        LocalMask,
        MultiHeadMask,
    )

    shape = queries, keys
    if rule.window:
        later = 0 if rule.causal else rule.window - 1
        mask = LocalMask(shape, (rule.window - 1, later), offset=0)
    else:
        mask = CausalMask(shape) if rule.causal else FullMask(shape)
    return MultiHeadMask([mask] * heads)


def _splash_blocks(queries: int, keys: int) -> Any:
    """Splash's block sizes for one device's queries and all keys."""
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes

    block_q, block_kv = (math.gcd(length, BLOCK) for length in (queries, keys))
    fused = keys // block_kv <= MAX_FUSED_BLOCKS
    return BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )


def cudnn(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    rule: MaskRule,
    scale: float,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """`attend` on a GPU, by cuDNN.

    Padding and documents are passed to cuDNN as a bias [B, 1, T, S], causality and windows as
    arguments. On a mesh rows and heads are sharded. Compiling needs the cuDNN library.

    Args:
      query: queries, bfloat16.
      key: keys.
      value: values.
      rule: the mask.
      scale: of the scores.
      implementation: of `jax.nn.dot_product_attention`; "xla" runs on any platform.
    """

    def attend_rows(query: Any, key: Any, value: Any, rule: MaskRule) -> jax.Array:
        mask = jnp.ones((query.shape[0], 1, query.shape[1], key.shape[1]), bool)
        if rule.segment_ids is not None:
            mask &= rule.segment_ids[:, None, :, None] == rule.segment_ids[:, None, None]
        if rule.padding_mask is not None:
            mask &= rule.padding_mask[:, None, None]
        unmasked = rule.segment_ids is None and rule.padding_mask is None
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=None if unmasked else mask,
            scale=scale,
            is_causal=rule.causal,
            local_window_size=(rule.window - 1, 0) if rule.window else None,
            implementation=implementation,
        )

    mesh = auto_mesh()
    if mesh is None:
        return attend_rows(query, key, value, rule)
    rows, _, heads, _ = spec("BTNH", query.shape)
    by_head = P(rows, None, heads)
    return _on_each_device(mesh, attend_rows, (by_head, by_head, by_head, P(rows)), by_head)(
        query, key, value, rule
    )


def triton(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    rule: MaskRule,
    scale: float,
    dropout: Dropout | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`attend` on a GPU with dropout, by our own kernels (`attend_with_dropout`).

    On a mesh rows and heads are sharded; what is dropped does not depend on the mesh.
    """
    # Importing Pallas takes 0.1 s, and only GPUs with dropout need it.
    from gptjax.layers.attention.triton import attend_with_dropout

    attend_rows = functools.partial(
        attend_with_dropout,
        scale=scale,
        causal=rule.causal,
        window=rule.window,
        interpret=interpret,
    )
    args = query, key, value, _segments(rule, query.shape[1]), dropout
    mesh = auto_mesh()
    if mesh is None:
        return attend_rows(*args)
    rows, _, heads, _ = spec("BTNH", query.shape)
    by_head = P(rows, None, heads)
    words = None if dropout is None else P(None, rows, heads)
    specs = by_head, by_head, by_head, P(rows), words
    return _on_each_device(mesh, attend_rows, specs, by_head)(*args)


def _query_shards(query: Float[Array, "B T N H"]) -> int:
    """The number of shards of the query positions T."""
    mesh = auto_mesh()
    if mesh is None:
        return 1
    sharded = mesh_axes(P(spec("BTNH", query.shape)[1]))
    return math.prod(dict(mesh.shape)[name] for name in sharded)


def _on_each_device(
    mesh: AbstractMesh, attend: Callable[..., jax.Array], in_specs: Any, out_specs: Any
) -> Callable[..., jax.Array]:
    """`attend` on each device's shard, since the compiler cannot partition a kernel."""
    return jax.shard_map(
        attend,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(mesh.auto_axes),
        check_vma=False,
    )
