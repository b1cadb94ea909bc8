"""Small models whose every parameter is random, and their tokens."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from gptjax import TransformerConfig, build, split

TINY = TransformerConfig(vocab_size=11, context_length=8, depth=3, width=16, heads=2)
TOKENS = np.array([[1, 5, 3, 2, 9, 0, 4, 7], [3, 3, 8, 1, 10, 6, 2, 5]])
OTHER = np.array([[9, 2, 2, 7, 1, 10, 3, 6], [4, 0, 5, 5, 8, 2, 1, 9]])
SOURCE = np.array([[4, 8, 1, 1, 6], [2, 7, 0, 10, 3]])
VARIANTS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "scanned": {"scan_layers": True, "remat": "full"},
    "post": {"norm_placement": "post", "final_norm": False, "norm": "rmsnorm"},
    "parallel": {
        "norm_placement": "parallel_shared",
        "position_embedding": "rotary",
        "kv_heads": 1,
    },
    "sandwich": {
        "norm_placement": "sandwich",
        "attention_softcap": 2.0,
        "position_embedding": "alibi",
    },
    "pattern": {"attention": "full,local,full", "window": 3, "position_embedding": "relative"},
    "compressed": {"attention": "full,local,compressed", "window": 3},
    "num_experts": {
        "num_experts": 3,
        "qk_norm": True,
        "bias": False,
        "tie_embeddings": False,
        "logit_scale": 2.0,
    },
    "encoder": {"family": "encoder", "token_types": 2, "head_bias": True, "logit_scale": 0.5},
    "encoder_decoder": {"family": "encoder_decoder", "encoder_depth": 2, "head_bias": True},
    "recurrent": {"family": "recurrent", "position_embedding": "none"},
}
"""Every family, norm placement and kind of attention, at least once."""


def config(name: str) -> TransformerConfig:
    return dataclasses.replace(TINY, **VARIANTS[name])


@functools.cache
def model(name: str) -> Any:
    """One for all tests that ask for it; none of them changes it."""
    graphdef, params = split(build(config(name), rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, moved))


def inputs(name: str) -> dict[str, Any]:
    return {"source": SOURCE} if name == "encoder_decoder" else {}


def shape_of(hook_point: str) -> tuple[int, int]:
    """[B, T] of the tokens at a place of the encoder-decoder."""
    of_source = hook_point.startswith("encoder_") or hook_point in ("cross_key", "cross_value")
    return SOURCE.shape if of_source else TOKENS.shape
