"""Attention's fast paths: a platform's own kernels, which never hold the scores [B, N, T, S].

| `attention_kernel` | on | what computes |
|---|---|---|
| xla | any platform | `attend` |
| splash | TPU | FlashAttention-2 (Dao 2023) in Pallas, without the blocks that no query sees |
| cudnn | GPU | FlashAttention-2 in cuDNN, by `jax.nn.dot_product_attention` |

They take masks that are a rule (`MaskRule`) and not an array. `resolve_kernel` chooses one for the
platform that a program is compiled for; what a kernel cannot compute, XLA does. Four of GPT-2's
layers, 8 x 1024 tokens per device in bfloat16, compiled for v5e:4x4 with their backward pass, peak
at 1.42 GiB with splash and at 2.97 with XLA.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, assert_never

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import InputError, TransformerConfig
from gptjax.config.values import AttentionKernel
from gptjax.layers.attention.masks import MaskRule
from gptjax.parallel.sharding import auto_mesh, mesh_axes, spec

PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}
"""Where each kernel runs, in the words of `jax.Device.platform`."""
NAMES = {"splash": "the splash kernel", "cudnn": "cuDNN"}
LANES = 128
"""Splash takes lengths that are multiples of this, the width of a TPU's vectors."""
BLOCK = 512
"""The most queries, and the most keys, that splash works on at once.

Compiled for v5e by libtpu 0.0.42, attention of GPT-2 124M forward and backward (8 x 1024 tokens, 12
heads of 64, bfloat16) peaks at 174 MiB with blocks of 128, 512 and 1024 alike, and compiles in 2 s,
with 1024 in 4 s. Blocks of 1024 do not fit into a core's memory with float32 heads of 256.
"""
MOST_FUSED_BLOCKS = 2
"""Blocks of keys up to which splash's backward pass is one kernel instead of two.

One kernel computes the scores once, but holds a gradient of the queries for each block of keys. The
peak above is the same with 2 blocks; with the 4 of 4 x 2048 tokens it is 216 MiB where two kernels
have 174, and with the 16 of 8192 tokens 504 where two have 180.
"""


def resolve_kernel(
    config: TransformerConfig, platform: str, *, sequence: int = 1
) -> tuple[TransformerConfig, list[str]]:
    """The config with the kernel that its attention takes, and lines that say which and why.

    Args:
      config: its `attention_kernel` is the choice; to a model, "auto" is "xla".
      platform: of the devices that the program is compiled for: "tpu", "gpu" or "cpu".
      sequence: devices that share one sequence, the mesh axis of that name.

    Raises:
      InputError: a kernel that is asked for by name does not run there, or cannot compute this.
    """
    on_xla = dataclasses.replace(config, attention_kernel="xla")
    asked = config.attention_kernel
    own = next((kernel for kernel, where in PLATFORMS.items() if where == platform), "xla")
    kernel = own if asked == "auto" else asked
    if config.family == "recurrent":
        return on_xla, ["Attention: none in an LSTM."]
    if kernel == "xla":
        return on_xla, ["Attention: XLA."]
    why = obstacle(config, kernel, sequence)
    if kernel != own:
        why = f"{NAMES[kernel]} runs on a {PLATFORMS[kernel].upper()}, not on a {platform.upper()}"
    if why and asked != "auto":
        raise InputError(
            f"TransformerConfig.attention_kernel is {asked!r}: it must be auto or xla here, since "
            f"{why}."
        )
    if why:
        return on_xla, [f"Attention: XLA, since {why}."]
    lines = [f"Attention: {NAMES[kernel]} on {platform.upper()}."]
    if "compressed" in config.attention_pattern:
        lines.append("Compressed attention: XLA, since its keys are groups of tokens.")
    if kernel == "splash" and config.family == "encoder_decoder":
        lines.append(f"Attention in rows that are no multiple of {LANES} tokens: XLA.")
    return dataclasses.replace(config, attention_kernel=kernel), lines


def obstacle(config: TransformerConfig, kernel: str, sequence: int = 1) -> str | None:
    """Why `kernel` cannot be attention's, as a clause; None if it can."""
    backwards = config.window == 0 or config.family == "decoder"
    obstacles = [
        (
            config.position_embedding in ("alibi", "relative"),
            f"{config.position_embedding} positions add to scores",
        ),
        (
            config.attention_normalizer != "softmax",
            f"a kernel's weights are a softmax, not {config.attention_normalizer}",
        ),
        (config.dropout > 0, f"dropout {config.dropout:g} falls on weights that no kernel keeps"),
        (set(config.attention_pattern) == {"compressed"}, "its keys are groups of tokens"),
    ]
    if kernel == "splash":
        multiple = LANES * sequence
        aligned = config.context_length % multiple == 0
        obstacles += [
            (not aligned, f"context {config.context_length} is no multiple of {multiple}")
        ]
    else:
        fits = config.actual_head_dim <= 128 and config.actual_head_dim % 8 == 0
        obstacles += [
            (config.dtype != "bfloat16", f"cuDNN takes bfloat16, not {config.dtype}"),
            (config.attention_softcap > 0, "cuDNN bounds no scores softly"),
            (not fits, f"cuDNN takes heads of 8, 16 ... 128, not of {config.actual_head_dim}"),
            (not backwards, "cuDNN's windows look back, not ahead"),
            (sequence > 1, "cuDNN does not share a sequence among devices"),
        ]
    return next((why for holds, why in obstacles if holds), None)


def takes(kernel: AttentionKernel, query: jax.Array, key: jax.Array) -> bool:
    """Whether `kernel` takes query [B, T, N, H] and key [B, S, K, H].

    `resolve_kernel` knows the longest row only: prompts and batches of pairs may be shorter.
    """
    match kernel:
        case "splash":
            queries = query.shape[1] // _sharers(query)
            return queries % LANES == 0 and key.shape[1] % LANES == 0
        case "cudnn":
            return True
        case "auto" | "xla":
            return False
        case unknown:
            assert_never(unknown)


def attend_by(
    kernel: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rule: MaskRule,
    scale: float,
    cap: float,
) -> jax.Array:
    """`attend` by a kernel that takes these shapes; see `splash`."""
    if kernel == "splash":
        return splash(query, key, value, rule, scale, cap)
    return cudnn(query, key, value, rule, scale)


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rule: MaskRule,
    scale: float,
    cap: float = 0.0,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`attend` on a TPU, [B, T, N, H].

    On a mesh each device takes its rows, heads and queries, and all the keys of its rows. What the
    backward pass needs is named "attention" for `jax.checkpoint`'s policies. A query that sees no
    key gets something finite, and its gradient, too, is of no use.

    Args:
      query: [B, T, N, H]; T is a multiple of 128 on each device.
      key: [B, S, K, H]; S is a multiple of 128.
      value: [B, S, K, H].
      rule: the mask.
      scale: of the scores.
      cap: scores are bounded by cap · tanh(score / cap); 0 does not.
      interpret: the kernel as plain JAX, which runs anywhere, slowly.
    """
    # Pallas takes a tenth of a second to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds, make_splash_mha

    (_, queries, heads, _), keys = query.shape, key.shape[1]
    sharers = _sharers(query)
    kernel = make_splash_mha(
        _splash_mask(rule, heads, queries, keys),
        block_sizes=_splash_blocks(queries // sharers, keys),
        attn_logits_soft_cap=cap or None,
        head_shards=1,
        q_seq_shards=sharers,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    segments = _segments(rule, queries)

    def attend_by_head(kernel: Any, query: Any, key: Any, value: Any, segments: Any) -> jax.Array:
        by_head = (x.swapaxes(1, 2) for x in (query, key, value))
        ids = None if segments is None else SegmentIds(*segments)
        return jax.vmap(kernel)(*by_head, ids).swapaxes(1, 2)

    # Splash has no scale. That of heads of 64, 1 / 8, is exact in bfloat16; others round queries.
    given = kernel, scale * query, key, value, segments
    mesh = auto_mesh()
    if mesh is None:
        return attend_by_head(*given)
    parts = rows, places, parted_heads, _ = spec("BTNH", query.shape)
    specs = (
        kernel.manual_sharding_spec(NamedSharding(mesh, P(None, places))),
        parts,
        P(rows, None, parted_heads),
        P(rows, None, parted_heads),
        None if segments is None else (P(rows, places), P(rows)),
    )
    return _on_each_device(mesh, attend_by_head, specs, parts)(*given)


def _segments(rule: MaskRule, queries: int) -> tuple[jax.Array, jax.Array] | None:
    """Numbers of queries [B, T] and keys [B, S], of which equal ones see each other."""
    valid, documents = rule.padding_mask, rule.segment_ids
    if valid is None:
        return None if documents is None else (documents, documents)
    if documents is None:
        return jnp.zeros((len(valid), queries), jnp.int32), jnp.where(valid, 0, -1)
    return documents, jnp.where(valid, documents, -1)


def _splash_mask(rule: MaskRule, heads: int, queries: int, keys: int) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        CausalMask,
        FullMask,
        LocalMask,
        MultiHeadMask,
    )

    shape = queries, keys
    if rule.window:
        ahead = 0 if rule.causal else rule.window - 1
        mask = LocalMask(shape, (rule.window - 1, ahead), offset=0)
    else:
        mask = CausalMask(shape) if rule.causal else FullMask(shape)
    return MultiHeadMask([mask] * heads)


def _splash_blocks(queries: int, keys: int) -> Any:
    """The sizes of the blocks of `queries` of one device and of all the `keys`."""
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes

    block_q, block_kv = (math.gcd(length, BLOCK) for length in (queries, keys))
    fused = keys // block_kv <= MOST_FUSED_BLOCKS
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
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rule: MaskRule,
    scale: float,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`attend` on a GPU, [B, T, N, H].

    Padding and documents reach cuDNN as a bias [B, 1, T, S], causality and windows as such. On a
    mesh each device takes its rows and heads. To compile it needs cuDNN itself.

    Args:
      query: [B, T, N, H], bfloat16.
      key: [B, S, K, H].
      value: [B, S, K, H].
      rule: the mask.
      scale: of the scores.
      implementation: of `jax.nn.dot_product_attention`; "xla" runs anywhere.
    """

    def attend_rows(query: Any, key: Any, value: Any, rule: MaskRule) -> jax.Array:
        shown = jnp.ones((query.shape[0], 1, query.shape[1], key.shape[1]), bool)
        if rule.segment_ids is not None:
            shown &= rule.segment_ids[:, None, :, None] == rule.segment_ids[:, None, None]
        if rule.padding_mask is not None:
            shown &= rule.padding_mask[:, None, None]
        everything = rule.segment_ids is None and rule.padding_mask is None
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=None if everything else shown,
            scale=scale,
            is_causal=rule.causal,
            local_window_size=(rule.window - 1, 0) if rule.window else None,
            implementation=implementation,
        )

    mesh = auto_mesh()
    if mesh is None:
        return attend_rows(query, key, value, rule)
    rows, _, heads, _ = spec("BTNH", query.shape)
    whole = P(rows, None, heads)
    return _on_each_device(mesh, attend_rows, (whole, whole, whole, P(rows)), whole)(
        query, key, value, rule
    )


def _sharers(query: jax.Array) -> int:
    """Devices among which the places of queries [B, T, N, H] are parted."""
    mesh = auto_mesh()
    if mesh is None:
        return 1
    parted = mesh_axes(P(spec("BTNH", query.shape)[1]))
    return math.prod(dict(mesh.shape)[name] for name in parted)


def _on_each_device(
    mesh: AbstractMesh, attend: Callable[..., jax.Array], in_specs: Any, out_specs: Any
) -> Callable[..., jax.Array]:
    """`attend` of each device's part, since the compiler cannot part a kernel."""
    return jax.shard_map(
        attend,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(mesh.auto_axes),
        check_vma=False,
    )
