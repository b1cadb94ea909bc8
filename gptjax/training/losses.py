"""Cross-entropy, and the loss of each way of training.

A loss returns sums over tokens, not means, so that a batch computed in parts adds up to the very
value of the whole batch whatever the parts' weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.data.pipeline import Batch


class LossSums(NamedTuple):
    """Sums over the tokens of a batch."""

    loss: jax.Array
    """What is minimised: cross-entropy with smoothing and z-loss, weighted. Nats."""
    cross_entropy: jax.Array
    """-log p(target), weighted. Nats."""
    weight: jax.Array
    """The tokens' weights."""


class LossFunction(Protocol):
    """(params, batch, dropout key or None) → sums."""

    def __call__(self, params: Any, batch: Batch, key: jax.Array | None) -> LossSums:
        """Sums over the batch's tokens."""
        ...


def causal_loss(
    graphdef: nnx.GraphDef,
    *,
    chunk: int = 0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossFunction:
    """The loss of predicting each token's successor, for a model with `hidden` and `unembedding`.

    Args:
      graphdef: the model's structure.
      chunk: tokens whose logits exist at a time; 0 takes all at once.
      label_smoothing: see `cross_entropy`.
      z_loss: see `cross_entropy`.
    """

    def loss(params: Any, batch: Batch, key: jax.Array | None) -> LossSums:
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(batch.tokens, key=key).hidden
        return cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            model.unembedding,
            jnp.ravel(batch.targets),
            jnp.ravel(batch.weights),
            chunk=chunk,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )

    return loss


def cross_entropy(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int = 0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossSums:
    """Cross-entropy of softmax(hidden · unembeddingᵀ), in chunks of tokens.

    Logits and their gradient exist for one chunk at a time: the gradients with respect to `hidden`
    and `unembedding` are formed in the forward pass, chunk by chunk, and only scaled in the
    backward pass, so that nothing of size [tokens, V] is kept or computed twice.

    Args:
      hidden: [M, D], M tokens.
      unembedding: [V, D].
      targets: [M].
      weights: [M].
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

    chunks = _Chunk(chunked(hidden), chunked(targets), chunked(weights))
    loss, plain = _cross_entropy(*chunks, unembedding, label_smoothing, z_loss)
    return LossSums(loss, jax.lax.stop_gradient(plain), weights.sum())


class _Chunk(NamedTuple):
    """M tokens on their way to the loss, or C chunks of them along a leading axis."""

    hidden: jax.Array
    """[M, D]."""
    targets: jax.Array
    """[M]."""
    weights: jax.Array
    """[M]."""


def _cross_entropy_value(hidden, targets, weights, unembedding, label_smoothing, z_loss):
    """Loss and plain cross-entropy, summed over chunks."""

    def add_chunk(sums, chunk):
        loss, plain, _ = _chunk_loss(chunk, unembedding, label_smoothing, z_loss)
        return (sums[0] + loss, sums[1] + plain), None

    chunks = _Chunk(hidden, targets, weights)
    return _over_chunks(add_chunk, (jnp.zeros(()), jnp.zeros(())), chunks)[0]


def _cross_entropy_forward(hidden, targets, weights, unembedding, label_smoothing, z_loss):
    def add_chunk(sums, chunk: _Chunk):
        loss, plain, slope = _chunk_loss(chunk, unembedding, label_smoothing, z_loss)
        slope = slope.astype(chunk.hidden.dtype)
        hidden_gradient = slope @ unembedding.astype(slope.dtype)
        table_gradient = jnp.einsum(
            "mv,md->vd", slope, chunk.hidden, preferred_element_type=jnp.float32
        )
        return (sums[0] + loss, sums[1] + plain, sums[2] + table_gradient), hidden_gradient

    chunks = _Chunk(hidden, targets, weights)
    start = (jnp.zeros(()), jnp.zeros(()), jnp.zeros(unembedding.shape))
    (loss, plain, table_gradient), hidden_gradient = _over_chunks(add_chunk, start, chunks)
    return (loss, plain), (hidden_gradient, table_gradient.astype(unembedding.dtype))


def _cross_entropy_backward(label_smoothing, z_loss, residuals, gradients):
    hidden_gradient, table_gradient = residuals
    scale = gradients[0]
    scaled = hidden_gradient * scale.astype(hidden_gradient.dtype)
    return scaled, None, None, table_gradient * scale.astype(table_gradient.dtype)


_cross_entropy = jax.custom_vjp(_cross_entropy_value, nondiff_argnums=(4, 5))
_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _over_chunks(add_chunk: Callable, start: Any, chunks: _Chunk) -> tuple[Any, Any]:
    """Scan `add_chunk` over the chunks; a single one needs no loop."""
    if chunks.targets.shape[0] > 1:
        return jax.lax.scan(add_chunk, start, chunks)
    sums, output = add_chunk(start, jax.tree.map(lambda array: array[0], chunks))
    return sums, jax.tree.map(lambda array: array[None], output)


def _chunk_loss(chunk: _Chunk, unembedding, label_smoothing, z_loss):
    """One chunk's loss, plain cross-entropy, and the gradient of the loss by its logits [M, V]."""
    hidden, targets, weights = chunk
    table = unembedding.astype(hidden.dtype)
    logits = jnp.einsum("md,vd->mv", hidden, table, preferred_element_type=jnp.float32)
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
    return (loss * weights).sum(), (plain * weights).sum(), slope * weights[:, None]
