"""GPT-2 in plain JAX, as in its paper: read this first, then decoder.py.

The Transformer's decoder (Vaswani et al. 2017) with pre-norm and a final norm (Radford et al. 2019,
section 2.3). The parameters are those of `Decoder`, and so are the logits: `python -m gptjax
certify gpt2` measures the difference. Axes: B batch, T tokens, D model width, N heads, H head dim,
V vocabulary; blocks are stacked along L.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def gpt2(params: dict, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """The logits of the next token at each position."""
    embedding, positions = params["embedding"]["table"], params["positions"]["table"]
    x = embedding[tokens] + positions[: tokens.shape[1]]
    blocks = params["decoder"]["blocks"]
    for layer in range(len(blocks["mlp"]["up"]["kernel"])):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
        x = x + attention(block["attention"], layer_norm(block["attention_norm"], x))
        x = x + mlp(block["mlp"], layer_norm(block["mlp_norm"], x))
    return layer_norm(params["decoder"]["norm"], x) @ embedding.T


def attention(params: dict, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Causal multi-head attention: softmax(Q Kᵀ / √H) V in each head."""
    query, key, value = (
        jnp.einsum("btd,dnh->btnh", x, params[name]["kernel"]) + params[name]["bias"]
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) / query.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    z = jnp.einsum("bnts,bsnh->btnh", weights, value)
    return jnp.einsum("btnh,nhd->btd", z, params["output"]["kernel"]) + params["output"]["bias"]


def mlp(params: dict, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The position-wise MLP with a GELU."""
    hidden = jax.nn.gelu(x @ params["up"]["kernel"] + params["up"]["bias"], approximate=True)
    return hidden @ params["down"]["kernel"] + params["down"]["bias"]


def layer_norm(params: dict, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Each token's channels normalised to mean 0 and variance 1, then scaled and shifted."""
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5)
    return params["scale"] * centred / deviation + params["bias"]
