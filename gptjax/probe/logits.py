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
    mlp: jax.Array
    """[L, B, T]."""
    bias: jax.Array
    """[B, T]: of attention's outputs, of norms, of the head."""

    @property
    def total(self) -> jax.Array:
        """[B, T], the logit; before `logit_softcap`."""
        total = self.embedding + self.heads.sum((0, 1)) + self.mlp.sum(0) + self.bias
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
    points = ["residual", "z", "attention_output", "mlp_output"]
    if crossed:
        points += [CROSS + "z", CROSS + "attention_output"]
    seen = run(model, tokens, points, {}, inputs).captured

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
    heads, cross_heads, mlp = [], [], []
    for layer in reversed(range(len(blocks))):
        parts = _Streams(blocks[layer], {name: x[layer] for name, x in seen.items()})
        share, of_layer, added = parts.attributed(share)
        bias += added
        heads.insert(0, of_layer[0])
        cross_heads.insert(0, of_layer[1])
        mlp.insert(0, of_layer[2])
    return Attribution(
        (seen["residual"][0] * share).sum(-1),
        jnp.stack(heads),
        jnp.stack(cross_heads) if crossed else None,
        jnp.stack(mlp),
        bias,
    )


class _Streams:
    """The stream on its way through a block, put together from what was captured of it."""

    def __init__(self, block: Block, seen: dict[str, jax.Array]):
        self._block = block
        self._seen = seen
        self._layers = [("attention", "attention_output")]
        if block.cross_attention is not None:
            self._layers.append(("cross_attention", CROSS + "attention_output"))
        self._layers.append(("mlp", "mlp_output"))
        x = seen["residual"]
        self._before = []
        for layer, output in self._layers:
            self._before.append(x)
            x = block.residual(layer).add(x, seen[output])
        self.after = x

    def attributed(self, share: jax.Array):
        """Backwards through the block.

        Args:
          share: [B, T, D], what a unit of each channel behind the block adds to the logit.

        Returns:
          The same before the block; what its heads [N, B, T], its cross-attention's heads or None,
          and its MLP [B, T] add; and what its biases do [B, T].
        """
        block, seen = self._block, self._seen
        added: dict[str, Any] = {"cross_attention": None}
        bias = jnp.zeros(share.shape[:-1], jnp.float32)
        for (layer, output), x in reversed(list(zip(self._layers, self._before, strict=True))):
            share, of_layer, of_norms = self._shares(share, x, layer, seen[output])
            bias += of_norms
            if layer == "mlp":
                added[layer] = (seen[output] * of_layer).sum(-1)
            else:
                z = seen[output.replace("attention_output", "z")]
                added[layer], of_output = _of_heads(getattr(block, layer), z, of_layer)
                bias += of_output
        return share, (added["attention"], added["cross_attention"], added["mlp"]), bias

    def _shares(self, share: jax.Array, x: jax.Array, layer: str, output: jax.Array):
        """What a unit of the stream x before a layer, and one of its output, add to the logit."""
        placement, norm, norm_after = self._block.residual(layer)
        bias = jnp.zeros(share.shape[:-1], jnp.float32)
        if placement.of_sum:
            of_layer = norm_after(output) if placement.after else output
            share, bias = _before_norm(norm, x + of_layer, share)
        if not placement.after:
            return share, share, bias
        of_layer, of_norm = _before_norm(norm_after, output, share)
        return share, of_layer, bias + of_norm


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


def _of_heads(attention: Attention, z: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each head adds [N, B, T], and attention's output bias [B, T]."""
    output = attention.output
    heads = jnp.einsum("btnh,nhd,btd->nbt", z, output.kernel[...], share)
    if output.bias is None:
        return heads, jnp.zeros(share.shape[:-1], jnp.float32)
    return heads, (share * output.bias[...]).sum(-1)
