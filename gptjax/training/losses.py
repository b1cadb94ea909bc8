"""Cross-entropy, and the loss of each way of training.

A loss returns sums over tokens, not means, so that a batch computed in parts adds up to the very
value of the whole batch whatever the parts' weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import InputError
from gptjax.data.batch import Batch


class LossSums(NamedTuple):
    """Sums over the tokens of a batch."""

    loss: jax.Array
    """What is minimised: cross-entropy with smoothing and z-loss, weighted, the losses of a mixture
    of experts and the next sentence's. Nats."""
    cross_entropy: jax.Array
    """-log p(target), weighted. Nats."""
    weight: jax.Array
    """The tokens' weights."""


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
        features = model.readout(output.hidden)
        sums = cross_entropy(
            features.reshape(-1, features.shape[-1]),
            model.unembedding,
            jnp.ravel(batch.targets),
            jnp.ravel(batch.weights),
            bias=model.unembedding_bias,
            logit_cap=model.config.logit_cap,
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
        return sums._replace(loss=sums.loss + (sum(of_rows) * batch.weights.sum(axis=1)).sum())

    return loss


def _next_sentence_loss(model: Any, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    """[B, T, D] and [B] → [B]: cross-entropy of whether the second segment follows the first."""
    heads = model.config.encoder_heads
    if heads != "pretraining":
        raise InputError(
            "The batch asks for the next sentence: TransformerConfig.encoder_heads must be "
            f"'pretraining', and is {heads!r}."
        )
    log_probability = jax.nn.log_softmax(model.next_sentence_logits(hidden))
    return -jnp.take_along_axis(log_probability, labels[:, None], axis=1)[:, 0]


def cross_entropy(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    bias: jax.Array | None = None,
    logit_cap: float = 0.0,
    chunk: int = 0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossSums:
    """Cross-entropy of softmax(hidden · unembeddingᵀ + bias), in chunks of tokens.

    Logits and their gradient exist for one chunk at a time: the gradients with respect to `hidden`
    and `unembedding` are formed in the forward pass, chunk by chunk, and only scaled in the
    backward pass, so that nothing of size [tokens, V] is kept or computed twice.

    Args:
      hidden: [M, D], M tokens.
      unembedding: [V, D].
      targets: [M].
      weights: [M].
      bias: [V], or None.
      logit_cap: logits are bounded by cap · tanh(logit / cap); 0 does not.
      chunk: tokens a chunk; 0 takes all M. The last chunk may be shorter.
      label_smoothing: ε of Szegedy et al. 2016, section 7: the target gets 1 - ε, and ε is spread
        evenly over the vocabulary, the target included.
      z_loss: weight of log² Z, Z the softmax's denominator (PaLM, section 5).
    """
    tokens = targets.shape[0]
    chunk = min(chunk or tokens, tokens)
    padding = -tokens % chunk

    def chunked(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, ((0, padding),) + ((0, 0),) * (array.ndim - 1))
        return padded.reshape(-1, chunk, *array.shape[1:])

    chunks = (chunked(hidden), chunked(targets), chunked(weights))
    options = _Options(logit_cap, label_smoothing, z_loss)
    loss, plain = _cross_entropy(chunks, unembedding, bias, options)
    return LossSums(loss, jax.lax.stop_gradient(plain), weights.sum())


class _Options(NamedTuple):
    """What `cross_entropy` is told."""

    logit_cap: float
    label_smoothing: float
    z_loss: float


class _Chunk(NamedTuple):
    """M tokens on their way to the loss, or C chunks of them along a leading axis."""

    hidden: jax.Array
    """[M, D]."""
    targets: jax.Array
    """[M]."""
    weights: jax.Array
    """[M]."""


def _cross_entropy_value(chunks, unembedding, bias, options):
    """Loss and plain cross-entropy, summed over chunks."""

    def add_chunk(sums, chunk):
        loss, plain, _ = _chunk_loss(chunk, unembedding, bias, options)
        return (sums[0] + loss, sums[1] + plain), None

    return _over_chunks(add_chunk, (jnp.zeros(()), jnp.zeros(())), _Chunk(*chunks))[0]


def _cross_entropy_forward(chunks, unembedding, bias, options):
    def add_chunk(sums, chunk: _Chunk):
        loss, plain, slope = _chunk_loss(chunk, unembedding, bias, options)
        bias_gradient = None if bias is None else slope.sum(axis=0)
        slope = slope.astype(chunk.hidden.dtype)
        hidden_gradient = slope @ unembedding.astype(slope.dtype)
        table_gradient = jnp.einsum(
            "mv,md->vd", slope, chunk.hidden, preferred_element_type=jnp.float32
        )
        added = (loss, plain, table_gradient, bias_gradient)
        return jax.tree.map(jnp.add, sums, added), hidden_gradient

    start = (
        jnp.zeros(()),
        jnp.zeros(()),
        jnp.zeros(unembedding.shape),
        None if bias is None else jnp.zeros(bias.shape),
    )
    sums, hidden_gradient = _over_chunks(add_chunk, start, _Chunk(*chunks))
    loss, plain, table_gradient, bias_gradient = sums
    table_gradient = table_gradient.astype(unembedding.dtype)
    return (loss, plain), (hidden_gradient, table_gradient, bias_gradient)


def _cross_entropy_backward(_, residuals, gradients):
    scaled = jax.tree.map(lambda leaf: leaf * gradients[0].astype(leaf.dtype), residuals)
    hidden_gradient, table_gradient, bias_gradient = scaled
    return (hidden_gradient, None, None), table_gradient, bias_gradient


_cross_entropy = jax.custom_vjp(_cross_entropy_value, nondiff_argnums=(3,))
_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _over_chunks(add_chunk: Callable, start: Any, chunks: _Chunk) -> tuple[Any, Any]:
    """Scan `add_chunk` over the chunks; a single one needs no loop."""
    if chunks.targets.shape[0] > 1:
        return jax.lax.scan(add_chunk, start, chunks)
    sums, output = add_chunk(start, jax.tree.map(lambda array: array[0], chunks))
    return sums, jax.tree.map(lambda array: array[None], output)


def _chunk_loss(chunk: _Chunk, unembedding, bias, options: _Options):
    """One chunk's loss, plain cross-entropy, and the gradient of the loss by its logits [M, V]."""
    hidden, targets, weights = chunk
    logit_cap, label_smoothing, z_loss = options
    table = unembedding.astype(hidden.dtype)
    logits = jnp.einsum("md,vd->mv", hidden, table, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias
    if logit_cap:
        logits = logit_cap * jnp.tanh(logits / logit_cap)
    vocab_size = logits.shape[1]
    # The exponentials are kept and summed by a product with ones, which XLA runs on all cores.
    largest = logits.max(axis=1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    denominator = exponentials @ jnp.ones((vocab_size, 1))
    log_z = (jnp.log(denominator) + largest)[:, 0]
    target_logit = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    plain = log_z - target_logit
    expected_logit = target_logit
    if label_smoothing:
        expected_logit = (1 - label_smoothing) * target_logit + label_smoothing * logits.mean(1)
    loss = log_z - expected_logit + z_loss * jnp.square(log_z)
    probability = exponentials / denominator
    is_target = jnp.arange(vocab_size) == targets[:, None]
    wanted = jnp.where(is_target, 1 - label_smoothing, 0) + label_smoothing / vocab_size
    slope = probability * (1 + 2 * z_loss * log_z[:, None]) - wanted
    if logit_cap:
        slope *= 1 - jnp.square(logits / logit_cap)
    return (loss * weights).sum(), (plain * weights).sum(), slope * weights[:, None]
