"""The loss of each way of training.

A loss returns sums over tokens, not means, so that a batch computed in parts adds up to the very
value of the whole batch whatever the parts' weights.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import InputError, TrainConfig
from gptjax.config.values import ENCODER_HEADS
from gptjax.data.batch import Batch
from gptjax.training.cross_entropy import LossSums, cross_entropy


class LossFunction(Protocol):
    """(params, batch, dropout key or None) → sums."""

    def __call__(self, params: Any, batch: Batch, key: jax.Array | None) -> LossSums:
        """Sums over the batch's tokens."""
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
    """The loss of predicting `batch.targets`, whatever the family and the objective.

    A decoder's targets are the tokens' successors (causal), an encoder's the tokens that were
    masked, an encoder-decoder's the target sentence (teacher forcing): the batch says which.
    Where the batch has `next_sentence`, BERT's loss of it is added (Devlin et al. 2018, appendix
    A.2: the sum of both means; here rows count as much as they have tokens to be found).

    The loss raises `InputError` for such a batch and a model without the head.

    Args:
      graphdef: the model's structure.
      chunk: tokens whose logits exist at a time; 0 takes all at once.
      label_smoothing: see `cross_entropy`.
      z_loss: see `cross_entropy`.
      balance_loss: weight of the balancing loss of a mixture of experts.
      router_z_loss: weight of its router's z-loss.
    """

    def loss(params: Any, batch: Batch, key: jax.Array | None) -> LossSums:
        model = nnx.merge(graphdef, params)
        output = model.hidden(batch.tokens, key=key, **batch.inputs())
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
        # What is asked of a row as a whole counts as often as the row's tokens: divided by the
        # weights it is a mean over the rows.
        of_rows = []
        if output.router_losses is not None:
            router = output.router_losses
            of_rows.append(balance_loss * router.balance + router_z_loss * router.z)
        if batch.next_sentence is not None:
            labels = jnp.asarray(batch.next_sentence)
            of_rows.append(_next_sentence_loss(model, output.hidden, labels))
        if not of_rows:
            return sums
        return sums._replace(loss=sums.loss + (sum(of_rows) * batch.loss_weights.sum(axis=1)).sum())

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


def _next_sentence_loss(model: Any, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    """[B, T, D] and [B] → [B]: cross-entropy of whether the second segment follows the first."""
    heads = model.config.encoder_heads
    if "next_sentence" not in ENCODER_HEADS[heads]:
        raise InputError(
            "The batch asks for the next sentence: TransformerConfig.encoder_heads must be "
            f"'pretraining', and is {heads!r}."
        )
    log_probability = jax.nn.log_softmax(model.next_sentence_logits(hidden))
    return -jnp.take_along_axis(log_probability, labels[:, None], axis=1)[:, 0]
