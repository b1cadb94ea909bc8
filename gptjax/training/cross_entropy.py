"""Cross-entropy in chunks of tokens, with its backward pass written out, on a device or a mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptjax.parallel.platforms import by_platform
from gptjax.parallel.sharding import auto_mesh, mesh_axes, parameter_spec, spec


class LossSums(NamedTuple):
    """Sums over the tokens of a batch."""

    loss: Float[Array, ""]
    """The training objective, nats: weighted cross-entropy with label smoothing and z-loss, plus
    the router losses of a mixture of experts and the next-sentence loss."""
    cross_entropy: Float[Array, ""]
    """Weighted -log p(target), nats."""
    weight: Float[Array, ""]
    """The sum of the tokens' weights."""


def cross_entropy(
    hidden: Float[Array, "*B D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "*B"],
    weights: Float[Array, "*B"],
    *,
    bias: Float[Array, " V"] | None = None,
    logit_softcap: float = 0.0,
    chunk: int = 0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossSums:
    """Cross-entropy of softmax(hidden · unembeddingᵀ + bias), in chunks of tokens.

    Logits and their gradient exist for one chunk at a time: the gradients with respect to `hidden`
    and `unembedding` are computed in the forward pass, chunk by chunk, and only scaled in the
    backward pass, so that nothing of size [tokens, V] is stored or computed twice. Where the
    program is sharded, each device takes chunks of its own tokens and its shard of the vocabulary:
    devices exchange a few numbers per token, never logits, and sum the gradients once.

    Args:
      hidden: [..., D]; [B, T, D] where the program is sharded.
      unembedding: [V, D].
      targets: [...].
      weights: [...].
      bias: [V], or None.
      logit_softcap: bounds logits by cap · tanh(logit / cap); 0 does not.
      chunk: tokens per chunk, on each device; 0 takes all. The last chunk may be shorter.
      label_smoothing: ε of Szegedy et al. 2016, section 7: the target gets 1 - ε, and ε is spread
        evenly over the vocabulary, the target included.
      z_loss: weight of log² Z, Z the softmax's denominator (PaLM, section 5).
    """
    options = _Options(chunk, len(unembedding), logit_softcap, label_smoothing, z_loss)
    tokens = _Tokens(hidden, targets, weights)
    loss, plain = _cross_entropy(tokens, unembedding, bias, options)
    return LossSums(loss, jax.lax.stop_gradient(plain), weights.sum())


class _Options(NamedTuple):
    """The options of `cross_entropy`."""

    chunk: int
    vocab_size: int
    logit_softcap: float
    label_smoothing: float
    z_loss: float


class _Tokens(NamedTuple):
    """The arrays of a loss that have an axis of tokens, or one leaf for each of them."""

    hidden: Any
    """[..., D]."""
    targets: Any
    """[...]."""
    weights: Any
    """[...]."""


class _MeshAxes(NamedTuple):
    """The mesh axes that shard tokens and the vocabulary; none outside of a mesh."""

    rows: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    """Axes of the vocabulary that shard tokens too; each chunk is gathered over them."""
    width: tuple[str, ...] = ()
    """Axes over which the table's gradient is reduce-scattered along D."""


def _cross_entropy_value(tokens, unembedding, bias, options):
    """Sums of the loss and of the plain cross-entropy."""
    return _over_mesh(_losses, tokens, unembedding, bias, options)[0]


def _cross_entropy_forward(tokens, unembedding, bias, options):
    """The same, and the gradients that the backward pass scales."""
    return _over_mesh(_losses_and_gradients, tokens, unembedding, bias, options)


def _cross_entropy_backward(_, residuals, gradients):
    scaled = jax.tree.map(lambda leaf: leaf * gradients[0].astype(leaf.dtype), residuals)
    hidden_gradient, table_gradient, bias_gradient = scaled
    return _Tokens(hidden_gradient, None, None), table_gradient, bias_gradient


_cross_entropy = jax.custom_vjp(_cross_entropy_value, nondiff_argnums=(3,))
_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _over_mesh(compute, tokens: _Tokens, unembedding, bias, options: _Options):
    """`compute` here, or on each device of a mesh with its shards of tokens and vocabulary.

    Returns sums, and the gradients with respect to hidden, unembedding and bias.
    """
    table = unembedding.astype(tokens.hidden.dtype)
    compute = functools.partial(compute, options=options)
    if auto_mesh() is None:
        return compute(tokens, table, bias, axes=_MeshAxes())
    rows = spec("bt", tokens.targets.shape)
    vocabulary, width = (mesh_axes(parameter_spec(letter)) for letter in "VD")
    row_axes = tuple(name for name in mesh_axes(rows) if name not in vocabulary)
    axes = _MeshAxes(
        row_axes,
        vocabulary,
        tuple(name for name in vocabulary if name in mesh_axes(rows)),
        tuple(name for name in width if name in row_axes),
    )
    return jax.shard_map(
        functools.partial(compute, axes=axes),
        in_specs=(_Tokens(P(*rows, None), rows, rows), P(vocabulary), P(vocabulary)),
        out_specs=(P(), (P(*rows, None), P(vocabulary, axes.width), P(vocabulary))),
        check_vma=False,
    )(tokens, table, bias)


def _losses(tokens: _Tokens, table, bias, *, options: _Options, axes: _MeshAxes):
    """Loss and plain cross-entropy, and no gradients."""

    def add_chunk(sums, chunk):
        loss, plain, _ = _chunk_loss(_gathered(chunk, axes), table, bias, options, axes)
        return (sums[0] + loss, sums[1] + plain), None

    start = (jnp.float32(0), jnp.float32(0))
    sums, _ = _over_chunks(add_chunk, start, _chunked(tokens, options.chunk, axes))
    return _summed(sums, axes.rows), (None, None, None)


def _losses_and_gradients(tokens: _Tokens, table, bias, *, options: _Options, axes: _MeshAxes):
    """Loss and plain cross-entropy, and their gradients with respect to hidden, table and bias."""

    def add_chunk(sums, chunk: _Tokens):
        chunk = _gathered(chunk, axes)
        loss, plain, logit_gradient = _chunk_loss(chunk, table, bias, options, axes)
        bias_gradient = None if bias is None else logit_gradient.sum(axis=0)
        logit_gradient = logit_gradient.astype(chunk.hidden.dtype)
        hidden_gradient = logit_gradient @ table
        if axes.gathered:
            hidden_gradient = jax.lax.psum_scatter(hidden_gradient, axes.gathered, tiled=True)
        table_gradient = jnp.einsum(
            "mv,md->vd", logit_gradient, chunk.hidden, preferred_element_type=jnp.float32
        )
        added = (loss, plain, table_gradient, bias_gradient)
        return jax.tree.map(jnp.add, sums, added), hidden_gradient

    start = (
        jnp.float32(0),
        jnp.float32(0),
        jnp.zeros(table.shape, jnp.float32),
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
    )
    sums, hidden_gradient = _over_chunks(add_chunk, start, _chunked(tokens, options.chunk, axes))
    loss, plain, table_gradient, bias_gradient = sums
    shape = tokens.hidden.shape
    hidden_gradient = hidden_gradient.reshape(-1, shape[-1])[: tokens.targets.size].reshape(shape)
    gradients = _reduced(hidden_gradient, table_gradient, bias_gradient, axes)
    return _summed((loss, plain), axes.rows), gradients


def _reduced(hidden_gradient, table_gradient, bias_gradient, axes: _MeshAxes):
    """The gradients summed over devices; each device keeps its shard of the table's."""
    if not axes.gathered:
        hidden_gradient = _summed(hidden_gradient, axes.vocabulary)
    if not axes.rows:
        return hidden_gradient, table_gradient, bias_gradient
    # As with other matmuls' gradients: accumulated in float32 here, sent in the compute dtype.
    table_gradient = table_gradient.astype(hidden_gradient.dtype)
    if axes.width:
        table_gradient = jax.lax.psum_scatter(
            table_gradient, axes.width, scatter_dimension=1, tiled=True
        )
    others = tuple(name for name in axes.rows if name not in axes.width)
    table_gradient = _summed(table_gradient, others)
    # The layers' backward pass waits for this sum, so that their peak memory does not coincide with
    # the whole table's gradient, [V, D] in float32.
    hidden_gradient, table_gradient, bias_gradient = jax.lax.optimization_barrier(
        (hidden_gradient, table_gradient, _summed(bias_gradient, axes.rows))
    )
    return hidden_gradient, table_gradient.astype(jnp.float32), bias_gradient


def _summed(tree: Any, axes: tuple[str, ...]) -> Any:
    """The tree summed over mesh axes, where there are any."""
    return jax.lax.psum(tree, axes) if axes else tree


def _gathered(chunk: _Tokens, axes: _MeshAxes) -> _Tokens:
    """The chunks of all devices that shard the vocabulary, gathered."""
    return jax.lax.all_gather(chunk, axes.gathered, tiled=True) if axes.gathered else chunk


def _chunked(tokens: _Tokens, chunk: int, axes: _MeshAxes) -> _Tokens:
    """The tokens in chunks along a leading axis, the last one padded."""
    count = tokens.targets.size
    if axes.gathered:
        chunk = -(-chunk // jax.lax.axis_size(axes.gathered))
    chunk = min(chunk or count, count)
    padding = -count % chunk

    def chunks(array: jax.Array) -> jax.Array:
        rows = array.reshape(count, *array.shape[tokens.targets.ndim :])
        padded = jnp.pad(rows, ((0, padding),) + ((0, 0),) * (rows.ndim - 1))
        return padded.reshape(-1, chunk, *rows.shape[1:])

    return jax.tree.map(chunks, tokens)


def _over_chunks(add_chunk: Callable, start: Any, chunks: _Tokens) -> tuple[Any, Any]:
    """Scan `add_chunk` over the chunks; a single one needs no loop."""
    if chunks.targets.shape[0] > 1:
        return jax.lax.scan(add_chunk, start, chunks)
    sums, output = add_chunk(start, jax.tree.map(lambda array: array[0], chunks))
    return sums, jax.tree.map(lambda array: array[None], output)


def _chunk_loss(chunk: _Tokens, table, bias, options: _Options, axes: _MeshAxes):
    """A chunk's loss, plain cross-entropy, and the loss's gradient with respect to logits [M, V].

    On GPUs logits are kept in the compute dtype and their exponentials computed again for the
    gradient; elsewhere both are kept in float32. Sums are of float32 everywhere.
    """
    compute = functools.partial(_loss_of_logits, options=options, axes=axes)
    return by_platform(
        chunk,
        table,
        bias,
        gpu=functools.partial(compute, keep_float32=False),
        other=functools.partial(compute, keep_float32=True),
    )


def _loss_of_logits(
    chunk: _Tokens, table, bias, *, options: _Options, axes: _MeshAxes, keep_float32: bool
):
    """`_chunk_loss`, with logits and exponentials kept in float32, or logits in hidden's dtype.

    Where the vocabulary is sharded, devices exchange each row's maximum and its sums alone.
    """
    hidden, targets, weights = chunk
    _, vocab_size, logit_softcap, label_smoothing, z_loss = options
    kept = jnp.float32 if keep_float32 else hidden.dtype
    logits = jnp.einsum("md,vd->mv", hidden, table, preferred_element_type=kept)
    logits = logits.astype(jnp.float32)
    if bias is not None:
        logits += bias
    if logit_softcap:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    local_vocab = logits.shape[1]
    largest = logits.max(axis=1, keepdims=True)
    if axes.vocabulary:
        largest = jax.lax.pmax(largest, axes.vocabulary)
        targets = targets - local_vocab * jax.lax.axis_index(axes.vocabulary)
    exponentials = jnp.exp(logits - largest)
    if keep_float32:  # Summed by a product with ones, which XLA runs on all cores.
        denominator = exponentials @ jnp.ones((local_vocab, 1), jnp.float32)
    else:
        denominator = exponentials.sum(axis=1, keepdims=True)
    denominator = _summed(denominator, axes.vocabulary)
    log_z = (jnp.log(denominator) + largest)[:, 0]
    is_target = jnp.arange(local_vocab) == targets[:, None]
    if axes.vocabulary:
        target_logit = _summed(jnp.where(is_target, logits, 0).sum(axis=1), axes.vocabulary)
    else:
        target_logit = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    plain = log_z - target_logit
    expected_logit = target_logit
    if label_smoothing:
        mean_logit = _summed(logits.sum(axis=1), axes.vocabulary) / vocab_size
        expected_logit = (1 - label_smoothing) * target_logit + label_smoothing * mean_logit
    loss = log_z - expected_logit + z_loss * jnp.square(log_z)
    probability = exponentials / denominator if keep_float32 else jnp.exp(logits - log_z[:, None])
    expected_probability = jnp.where(is_target, jnp.float32(1 - label_smoothing), 0)
    expected_probability += label_smoothing / vocab_size
    logit_gradient = probability * (1 + 2 * z_loss * log_z[:, None]) - expected_probability
    if logit_softcap:
        logit_gradient *= 1 - jnp.square(logits / logit_softcap)
    return (loss * weights).sum(), (plain * weights).sum(), logit_gradient * weights[:, None]
