"""The training losses: next-token, masked and sequence-to-sequence cross-entropy, and BERT's.

A loss returns sums over tokens, not means, so that with gradient accumulation the sums of the
microbatches give exactly the value of the whole batch, whatever their weights.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gptjax.config import InputError, TrainConfig
from gptjax.config.values import ENCODER_HEADS
from gptjax.data.batch import Batch
from gptjax.training.cross_entropy import LossSums, cross_entropy

Params = dict[str, Any]
"""A model's parameters: a nested dict of float32 arrays."""


class LossFunction(Protocol):
    """(params, batch, dropout key or None) → sums over tokens."""

    def __call__(self, params: Params, batch: Batch, key: jax.Array | None) -> LossSums:
        """Sums over the tokens of the batch; without a key there is no dropout."""
        ...


def token_loss(
    graphdef: nnx.GraphDef,
    *,
    chunk: int = 0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    balance_loss: float = 0.0,
    router_z_loss: float = 0.0,
) -> LossFunction:
    """The cross-entropy of `batch.targets`, for every model family and objective.

    The targets are the next tokens of a decoder (causal), the masked tokens of an encoder, the
    target sentence of an encoder-decoder (teacher forcing), as the batch has them. Where the batch
    has `next_sentence`, BERT's next-sentence loss is added (Devlin et al. 2018, appendix A.2: the
    sum of both means; here each row weighs as much as it has masked tokens).

    The loss raises `InputError` for such a batch and a model without that head.

    Args:
      graphdef: the model's structure.
      chunk: tokens whose logits exist at a time; 0 takes all at once.
      label_smoothing: see `cross_entropy`.
      z_loss: see `cross_entropy`.
      balance_loss: weight of the balancing loss of a mixture of experts.
      router_z_loss: weight of its router's z-loss.
    """

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> LossSums:
        model = nnx.merge(graphdef, params)
        output = model.hidden(batch.tokens, key=key, **batch.inputs())
        with jax.named_scope("loss"):
            sums = cross_entropy(
                model.readout(output.hidden),
                model.unembedding,
                jnp.asarray(batch.targets),
                jnp.asarray(batch.loss_weights),
                bias=model.unembedding_bias,
                logit_softcap=model.config.logit_softcap,
                chunk=chunk,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
            )
            # A loss of a whole row counts once per token of the row: divided by the sum of weights
            # it is a mean over rows.
            row_losses = []
            if output.router_losses is not None:
                router = output.router_losses
                row_losses.append(balance_loss * router.balance + router_z_loss * router.z)
            if batch.next_sentence is not None:
                labels = jnp.asarray(batch.next_sentence)
                row_losses.append(_next_sentence_loss(model, output.hidden, labels))
            if not row_losses:
                return sums
            added = (sum(row_losses) * batch.loss_weights.sum(axis=1)).sum()
            return sums._replace(loss=sums.loss + added)

    return loss


def training_loss(graphdef: nnx.GraphDef, config: TrainConfig) -> LossFunction:
    """`token_loss` with the weights of `config`."""
    return token_loss(
        graphdef,
        chunk=config.loss_chunk,
        label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
        balance_loss=config.balance_loss,
        router_z_loss=config.router_z_loss,
    )


def _next_sentence_loss(
    model: Any, hidden: Float[Array, "B T D"], labels: Int[Array, " B"]
) -> Float[Array, " B"]:
    """BERT's next-sentence loss: cross-entropy of whether segment B follows segment A, nats."""
    heads = model.config.encoder_heads
    if "next_sentence" not in ENCODER_HEADS[heads]:
        raise InputError(
            "The batch has next_sentence labels: TransformerConfig.encoder_heads must be "
            f"'pretraining', and is {heads!r}."
        )
    log_probability = jax.nn.log_softmax(model.next_sentence_logits(hidden))
    return -jnp.take_along_axis(log_probability, labels[:, None], axis=1)[:, 0]
