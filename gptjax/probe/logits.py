"""Logits: loss per token, the logit lens, and direct logit attribution."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gptjax.config import InputError
from gptjax.layers.attention.module import Attention
from gptjax.layers.block import Block
from gptjax.layers.hooks import CROSS
from gptjax.layers.norms import LayerNorm
from gptjax.models.build import LanguageModel, split
from gptjax.probe.observation import as_arrays, observe, run


def token_loss(
    model: LanguageModel, tokens: Any, targets: Any = None, **inputs: Any
) -> Float[Array, "B T"]:
    """The cross-entropy -log p of each token, nats.

    Args:
      model: of any family.
      tokens: [B, T].
      targets: [B, T], the token to predict at each position; None is the next token.
      inputs: as `observe`.

    Returns:
      [B, T], or without targets [B, T - 1], of the tokens 1 … T - 1.

    Raises:
      InputError: as `observe`.
    """
    logits = observe(model, tokens, **inputs).logits
    if targets is None:
        logits, targets = logits[:, :-1], jnp.asarray(tokens)[:, 1:]
    chosen = jnp.asarray(targets)[..., None]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]


def logit_lens(model: LanguageModel, tokens: Any, **inputs: Any) -> Float[Array, "L+1 B T V"]:
    """The logit lens: log-probabilities from the residual stream at each layer.

    The stream that enters each block goes through the final norm and the unembedding
    (nostalgebraist 2020).

    Args:
      model: of any family; of an encoder-decoder, the decoder's stream is read.
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
    observed = run(model, tokens, ("residual",), {}, inputs)
    streams, norm = observed.captured["residual"], model.final_norm
    ends = streams if norm is None else norm(streams)
    logits = jnp.concatenate([model.unembed(model.readout(ends)), observed.logits[None]])
    return jax.nn.log_softmax(logits)


class Attribution(NamedTuple):
    """The direct contribution of each part to one logit at each position; they sum to it.

    Effects through later layers are excluded; the norms' divisors are those of this run,
    constants.
    """

    embedding: Float[Array, "B T"]
    """Of the stream that enters the first block."""
    heads: Float[Array, "L N B T"]
    """Of each attention head."""
    cross_heads: Float[Array, "L N B T"] | None
    """Of each cross-attention head."""
    mlp: Float[Array, "L B T"]
    """Of each MLP."""
    bias: Float[Array, "B T"]
    """Of the biases of attention's outputs, of norms, and of the head."""

    @property
    def total(self) -> Float[Array, "B T"]:
        """The sum of all parts: the logit, before `logit_softcap`."""
        total = self.embedding + self.heads.sum((0, 1)) + self.mlp.sum(0) + self.bias
        return total if self.cross_heads is None else total + self.cross_heads.sum((0, 1))


def attribution(model: LanguageModel, tokens: Any, answer: Any, **inputs: Any) -> Attribution:
    """Direct logit attribution of one token (Elhage et al. 2021, "Logit attribution").

    For the difference of two logits, subtract the attributions of the two answers.

    Args:
      model: with attention, and a head that is linear.
      tokens: [B, T].
      answer: the token whose logit is attributed, a number or [B, T].
      inputs: as `observe`.

    Raises:
      InputError: an LSTM, which has no residual sum; BERT's masked-LM head; or as `observe`.
    """
    config = model.config
    if config.family == "recurrent":
        raise InputError("An LSTM's layers replace the stream: its logits are no sum over layers.")
    if config.encoder_heads in ("masked_lm", "pretraining"):
        raise InputError(
            f"TransformerConfig.encoder_heads is {config.encoder_heads!r}: a head that is not "
            "linear, so its logits are no sum of parts."
        )
    tokens, inputs = as_arrays(model, tokens, inputs)
    answer = jnp.broadcast_to(jnp.asarray(answer), tokens.shape)
    graphdef, params = split(model)
    return _attribution(graphdef, params, tokens, answer, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _attribution(graphdef, params, tokens, answer, inputs) -> Attribution:
    model = nnx.merge(graphdef, params)
    stack = model.encoder if model.config.family == "encoder" else model.decoder
    has_cross = model.config.family == "encoder_decoder"
    points = ["residual", "z", "attention_output", "mlp_output"]
    if has_cross:
        points += [CROSS + "z", CROSS + "attention_output"]
    captured = run(model, tokens, points, {}, inputs).captured

    # Backwards from the logit: its gradient with respect to the stream, norms' divisors constant.
    gradient = model.config.logit_scale * model.unembedding[answer].astype(jnp.float32)
    bias = jnp.zeros(tokens.shape, jnp.float32)
    if model.unembedding_bias is not None:
        bias += model.unembedding_bias[answer]
    blocks = stack.each()
    if stack.norm is not None:
        last = {name: x[-1] for name, x in captured.items()}
        gradient, added = _through_norm(stack.norm, _BlockStreams(blocks[-1], last).after, gradient)
        bias += added
    heads, cross_heads, mlp = [], [], []
    for layer in reversed(range(len(blocks))):
        parts = _BlockStreams(blocks[layer], {name: x[layer] for name, x in captured.items()})
        gradient, contributions, added = parts.attributed(gradient)
        bias += added
        heads.insert(0, contributions[0])
        cross_heads.insert(0, contributions[1])
        mlp.insert(0, contributions[2])
    return Attribution(
        (captured["residual"][0] * gradient).sum(-1),
        jnp.stack(heads),
        jnp.stack(cross_heads) if has_cross else None,
        jnp.stack(mlp),
        bias,
    )


class _BlockStreams:
    """The residual stream before and after each layer of a block, from its captured arrays."""

    def __init__(self, block: Block, captured: dict[str, jax.Array]):
        self._block = block
        self._captured = captured
        self._layers = [("attention", "attention_output")]
        if block.cross_attention is not None:
            self._layers.append(("cross_attention", CROSS + "attention_output"))
        self._layers.append(("mlp", "mlp_output"))
        x = captured["residual"]
        self._before = []
        for layer, output in self._layers:
            self._before.append(x)
            x = block.residual(layer).add(x, captured[output])
        self.after = x

    def attributed(self, gradient: jax.Array):
        """Attribute the logit to the block's parts, going backwards through it.

        Args:
          gradient: [B, T, D], of the logit with respect to the stream after the block.

        Returns:
          The gradient with respect to the stream before the block; the contributions of its heads
          [N, B, T], of its cross-attention's heads or None, and of its MLP [B, T]; and those of its
          biases [B, T].
        """
        block, captured = self._block, self._captured
        contributions: dict[str, Any] = {"cross_attention": None}
        bias = jnp.zeros(gradient.shape[:-1], jnp.float32)
        for (layer, output), x in reversed(list(zip(self._layers, self._before, strict=True))):
            gradient, of_layer, norm_bias = self._gradients(gradient, x, layer, captured[output])
            bias += norm_bias
            if layer == "mlp":
                contributions[layer] = (captured[output] * of_layer).sum(-1)
            else:
                z = captured[output.replace("attention_output", "z")]
                contributions[layer], output_bias = _of_heads(getattr(block, layer), z, of_layer)
                bias += output_bias
        return (
            gradient,
            (contributions["attention"], contributions["cross_attention"], contributions["mlp"]),
            bias,
        )

    def _gradients(self, gradient: jax.Array, x: jax.Array, layer: str, output: jax.Array):
        """Gradients with respect to the stream x before a layer and to the layer's output; bias."""
        placement, norm, norm_after = self._block.residual(layer)
        bias = jnp.zeros(gradient.shape[:-1], jnp.float32)
        if placement.of_sum:
            of_layer = norm_after(output) if placement.after else output
            gradient, bias = _through_norm(norm, x + of_layer, gradient)
        if not placement.after:
            return gradient, gradient, bias
        of_layer, norm_bias = _through_norm(norm_after, output, gradient)
        return gradient, of_layer, bias + norm_bias


def _through_norm(norm: Any, x: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradient before a norm, given `gradient` after it, and the contribution of its bias.

    The norm's divisor is that of x, taken as a constant, which makes the norm linear.
    """
    x = x.astype(jnp.float32)
    scaled = gradient * norm.scale[...]
    bias = jnp.zeros(gradient.shape[:-1], jnp.float32)
    if isinstance(norm, LayerNorm):
        scaled -= scaled.mean(axis=-1, keepdims=True)
        if norm.bias is not None:
            bias = (gradient * norm.bias[...]).sum(-1)
        x -= x.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + norm.epsilon)
    return scaled * inverse, bias


def _of_heads(
    attention: Attention, z: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Contributions of each head [N, B, T], and of attention's output bias [B, T]."""
    output = attention.output
    heads = jnp.einsum("btnh,nhd,btd->nbt", z, output.kernel[...], gradient)
    if output.bias is None:
        return heads, jnp.zeros(gradient.shape[:-1], jnp.float32)
    return heads, (gradient * output.bias[...]).sum(-1)
