"""GPT-2 as its paper has it: read this first, then decoder.py.

The Transformer's decoder (Vaswani et al. 2017) with the norms before the layers and one more at the
end (Radford et al. 2019, section 2.3). The parameters are those of `Decoder`, and so are the
logits: `python -m gptjax certify gpt2` measures the difference. B rows, T tokens, D channels of the
residual stream, N heads of H channels, V tokens in the vocabulary; blocks are stacked along L.
"""

import jax
import jax.numpy as jnp


def gpt2(params: dict, tokens: jax.Array) -> jax.Array:
    """Tokens [B, T] → logits [B, T, V] of the token that follows each."""
    embedding, positions = params["embedding"]["table"], params["positions"]["table"]
    x = embedding[tokens] + positions[: tokens.shape[1]]
    blocks = params["decoder"]["blocks"]
    for layer in range(len(blocks["mlp"]["up"]["kernel"])):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
        x = x + attention(block["attention"], layer_norm(block["attention_norm"], x))
        x = x + mlp(block["mlp"], layer_norm(block["mlp_norm"], x))
    return layer_norm(params["decoder"]["norm"], x) @ embedding.T


def attention(params: dict, x: jax.Array) -> jax.Array:
    """Causal multi-head attention: softmax(Q Kᵀ / √H) V in each head, [B, T, D] → [B, T, D]."""
    query, key, value = (
        jnp.einsum("btd,dnh->btnh", x, params[name]["kernel"]) + params[name]["bias"]
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) / query.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    z = jnp.einsum("bnts,bsnh->btnh", weights, value)
    return jnp.einsum("btnh,nhd->btd", z, params["output"]["kernel"]) + params["output"]["bias"]


def mlp(params: dict, x: jax.Array) -> jax.Array:
    """Position by position, [B, T, D] → [B, T, D]."""
    hidden = jax.nn.gelu(x @ params["up"]["kernel"] + params["up"]["bias"], approximate=True)
    return hidden @ params["down"]["kernel"] + params["down"]["bias"]


def layer_norm(params: dict, x: jax.Array) -> jax.Array:
    """Each token's channels with mean 0 and variance 1, scaled and shifted, [B, T, D]."""
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5)
    return params["scale"] * centred / deviation + params["bias"]
