"""Logits: what they cost, when they are known, and what they are made of."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import InputError
from gptjax.layers.attention.module import Attention
from gptjax.layers.block import Block
from gptjax.layers.hooks import CROSS
from gptjax.layers.norms import LayerNorm
from gptjax.models.build import LanguageModel, split
from gptjax.probe.observation import as_arrays, observe, run


def token_loss(model: LanguageModel, tokens: Any, targets: Any = None, **inputs: Any) -> jax.Array:
    """-log p of each token, nats.

    Args:
      model: of any family.
      tokens: [B, T].
      targets: [B, T], what is to be predicted at each place; None is the token after each.
      inputs: as `observe`.

    Returns:
      [B, T], or without targets [B, T - 1]: of the tokens 1 … T - 1.

    Raises:
      InputError: as `observe`.
    """
    logits = observe(model, tokens, **inputs).logits
    if targets is None:
        logits, targets = logits[:, :-1], jnp.asarray(tokens)[:, 1:]
    chosen = jnp.asarray(targets)[..., None]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]


def logit_lens(model: LanguageModel, tokens: Any, **inputs: Any) -> jax.Array:
    """What the model would say if it ended before each layer (nostalgebraist 2020).

    The stream that enters each block goes through the final norm and the head.

    Args:
      model: of any family; of an encoder-decoder it is the decoder's stream.
      tokens: [B, T].
      inputs: as `observe`.

    Returns:
      Log-probabilities [L + 1, B, T, V]; the last are the model's own.

    Raises:
      InputError: as `observe`.
    """
    tokens, inputs = as_arrays(model, tokens, inputs)
    graphdef, params = split(model)
    return _logit_lens(graphdef, params, tokens, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _logit_lens(graphdef, params, tokens, inputs):
    model = nnx.merge(graphdef, params)
    seen = run(model, tokens, ("residual",), {}, inputs)
    streams, norm = seen.captured["residual"], model.final_norm
    ends = streams if norm is None else norm(streams)
    logits = jnp.concatenate([model.unembed(model.readout(ends)), seen.logits[None]])
    return jax.nn.log_softmax(logits)


class Attribution(NamedTuple):
    """What each part adds to one logit at each place; all of it together is the logit.

    It is what a part adds directly, not through the layers behind it; norms count as the division
    that they were in this run.
    """

    embedding: jax.Array
    """[B, T]: of what enters the first block."""
    heads: jax.Array
    """[L, N, B, T]."""
    cross_heads: jax.Array | None
    """[L, N, B, T], of cross-attention."""
    feedforward: jax.Array
    """[L, B, T]."""
    bias: jax.Array
    """[B, T]: of attention's outputs, of norms, of the head."""

    @property
    def total(self) -> jax.Array:
        """[B, T], the logit; before `logit_cap`."""
        total = self.embedding + self.heads.sum((0, 1)) + self.feedforward.sum(0) + self.bias
        return total if self.cross_heads is None else total + self.cross_heads.sum((0, 1))


def attribution(model: LanguageModel, tokens: Any, answer: Any, **inputs: Any) -> Attribution:
    """Direct logit attribution (Elhage et al. 2021, "Logit attribution").

    For the difference of two logits, subtract the attributions of the two answers.

    Args:
      model: with attention, and a head that is linear.
      tokens: [B, T].
      answer: the token whose logit it is, a number or [B, T].
      inputs: as `observe`.

    Raises:
      InputError: an LSTM, whose layers add nothing up; BERT's masked-LM head; or as `observe`.
    """
    config = model.config
    if config.family == "recurrent":
        raise InputError("An LSTM's layers replace the stream: no sum of them makes the logits.")
    if config.encoder_heads in ("masked_lm", "pretraining"):
        raise InputError(
            f"TransformerConfig.encoder_heads is {config.encoder_heads!r}: a head that is not "
            "linear, so that no sum of parts makes its logits."
        )
    tokens, inputs = as_arrays(model, tokens, inputs)
    answer = jnp.broadcast_to(jnp.asarray(answer), tokens.shape)
    graphdef, params = split(model)
    return _attribution(graphdef, params, tokens, answer, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _attribution(graphdef, params, tokens, answer, inputs) -> Attribution:
    model = nnx.merge(graphdef, params)
    stack = model.encoder if model.config.family == "encoder" else model.decoder
    crossed = model.config.family == "encoder_decoder"
    places = ["residual", "mixture", "attention_output", "feedforward"]
    if crossed:
        places += [CROSS + "mixture", CROSS + "attention_output"]
    seen = run(model, tokens, places, {}, inputs).captured

    # From the logit backwards: what one unit of each channel of the stream adds to it.
    share = model.config.logit_scale * model.unembedding[answer].astype(jnp.float32)
    bias = jnp.zeros(tokens.shape, jnp.float32)
    if model.unembedding_bias is not None:
        bias += model.unembedding_bias[answer]
    blocks = stack.each()
    if stack.norm is not None:
        last = {name: x[-1] for name, x in seen.items()}
        share, added = _before_norm(stack.norm, _Streams(blocks[-1], last).after, share)
        bias += added
    heads, cross_heads, feedforward = [], [], []
    for layer in reversed(range(len(blocks))):
        parts = _Streams(blocks[layer], {name: x[layer] for name, x in seen.items()})
        share, of_layer, added = parts.attributed(share)
        bias += added
        heads.insert(0, of_layer[0])
        cross_heads.insert(0, of_layer[1])
        feedforward.insert(0, of_layer[2])
    return Attribution(
        (seen["residual"][0] * share).sum(-1),
        jnp.stack(heads),
        jnp.stack(cross_heads) if crossed else None,
        jnp.stack(feedforward),
        bias,
    )


class _Streams:
    """The stream on its way through a block, put together from what was captured of it."""

    def __init__(self, block: Block, seen: dict[str, jax.Array]):
        self._block = block
        self._seen = seen
        self._placement = block.config.norm_placement
        self._attended = self._sum(
            seen["residual"], block.attention_norm, block.attention_norm_after, "attention_output"
        )
        self._crossed = self._attended
        if block.cross_attention is not None:
            self._crossed = self._sum(
                self._attended, block.cross_norm, block.cross_norm_after, CROSS + "attention_output"
            )
        self.after = self._sum(
            self._crossed, block.feedforward_norm, block.feedforward_norm_after, "feedforward"
        )

    def _sum(self, x, norm, norm_after, name: str) -> jax.Array:
        added = self._seen[name]
        if self._placement == "post":
            return norm(x + added)
        return x + (added if norm_after is None else norm_after(added))

    def attributed(self, share: jax.Array):
        """Backwards through the block.

        Args:
          share: [B, T, D], what a unit of each channel behind the block adds to the logit.

        Returns:
          The same before the block; what its heads [N, B, T], its cross-attention's heads or None,
          and its feed-forward layer [B, T] add; and what its biases do [B, T].
        """
        block, seen = self._block, self._seen
        share, of_part, bias = self._shares(
            share,
            self._crossed,
            block.feedforward_norm,
            block.feedforward_norm_after,
            "feedforward",
        )
        fed = (seen["feedforward"] * of_part).sum(-1)
        crossed = None
        if block.cross_attention is not None:
            name = CROSS + "attention_output"
            share, of_part, added = self._shares(
                share, self._attended, block.cross_norm, block.cross_norm_after, name
            )
            crossed, from_bias = _of_heads(block.cross_attention, seen[CROSS + "mixture"], of_part)
            bias += added + from_bias
        share, of_part, added = self._shares(
            share,
            seen["residual"],
            block.attention_norm,
            block.attention_norm_after,
            "attention_output",
        )
        heads, from_bias = _of_heads(block.attention, seen["mixture"], of_part)
        return share, (heads, crossed, fed), bias + added + from_bias

    def _shares(self, share: jax.Array, x: jax.Array, norm, norm_after, name: str):
        """What a unit before the sum of x and a part, and one of the part, add to the logit."""
        added = self._seen[name]
        if self._placement == "post":
            share, bias = _before_norm(norm, x + added, share)
            return share, share, bias
        if norm_after is None:
            return share, share, jnp.zeros(share.shape[:-1], jnp.float32)
        of_part, bias = _before_norm(norm_after, added, share)
        return share, of_part, bias


def _before_norm(norm: Any, x: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a unit before a norm adds to the logit, if one behind it adds `share`; and its bias.

    The norm's division is the one of x, a constant, so that the norm is linear.
    """
    x = x.astype(jnp.float32)
    scaled = share * norm.scale[...]
    bias = jnp.zeros(share.shape[:-1], jnp.float32)
    if isinstance(norm, LayerNorm):
        scaled -= scaled.mean(axis=-1, keepdims=True)
        if norm.bias is not None:
            bias = (share * norm.bias[...]).sum(-1)
        x -= x.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + norm.epsilon)
    return scaled * inverse, bias


def _of_heads(
    attention: Attention, mixture: jax.Array, share: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What each head adds [N, B, T], and attention's output bias [B, T]."""
    output = attention.output
    heads = jnp.einsum("btnh,nhd,btd->nbt", mixture, output.kernel[...], share)
    if output.bias is None:
        return heads, jnp.zeros(share.shape[:-1], jnp.float32)
    return heads, (share * output.bias[...]).sum(-1)
