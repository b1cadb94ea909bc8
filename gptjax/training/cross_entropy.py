"""Cross-entropy in chunks of tokens, with its own backward pass, on one device or over a mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptjax.parallel.sharding import auto_mesh, mesh_axes, parameter_spec, spec


class LossSums(NamedTuple):
    """Sums over the tokens of a batch."""

    loss: jax.Array
    """What is minimised: cross-entropy with smoothing and z-loss, weighted, the losses of a mixture
    of experts and the next sentence's. Nats."""
    cross_entropy: jax.Array
    """-log p(target), weighted. Nats."""
    weight: jax.Array
    """The tokens' weights."""


def cross_entropy(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    bias: jax.Array | None = None,
    logit_softcap: float = 0.0,
    chunk: int = 0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> LossSums:
    """Cross-entropy of softmax(hidden · unembeddingᵀ + bias), in chunks of tokens.

    Logits and their gradient exist for one chunk at a time: the gradients with respect to `hidden`
    and `unembedding` are formed in the forward pass, chunk by chunk, and only scaled in the
    backward pass, so that nothing of size [tokens, V] is kept or computed twice. Where the program
    is parted among devices, each takes chunks of its own tokens and its part of the vocabulary:
    they exchange numbers per token, never logits, and add up the gradients once.

    Args:
      hidden: [..., D]; [B, T, D] where the program is parted.
      unembedding: [V, D].
      targets: [...].
      weights: [...].
      bias: [V], or None.
      logit_cap: logits are bounded by cap · tanh(logit / cap); 0 does not.
      chunk: tokens a chunk, on each device; 0 takes all. The last chunk may be shorter.
      label_smoothing: ε of Szegedy et al. 2016, section 7: the target gets 1 - ε, and ε is spread
        evenly over the vocabulary, the target included.
      z_loss: weight of log² Z, Z the softmax's denominator (PaLM, section 5).
    """
    options = _Options(chunk, len(unembedding), logit_softcap, label_smoothing, z_loss)
    tokens = _Tokens(hidden, targets, weights)
    loss, plain = _cross_entropy(tokens, unembedding, bias, options)
    return LossSums(loss, jax.lax.stop_gradient(plain), weights.sum())


class _Options(NamedTuple):
    """What `cross_entropy` is told."""

    chunk: int
    vocab_size: int
    logit_softcap: float
    label_smoothing: float
    z_loss: float


class _Tokens(NamedTuple):
    """Arrays of tokens on their way to the loss, or of each what belongs to it."""

    hidden: Any
    """[..., D]."""
    targets: Any
    """[...]."""
    weights: Any
    """[...]."""


class _Shares(NamedTuple):
    """The mesh axes over which tokens and the vocabulary are parted; none outside of a mesh."""

    rows: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    """Axes of the vocabulary over which tokens are parted too, and come together by chunks."""
    width: tuple[str, ...] = ()
    """Over which the table's gradient is parted along D as it is summed."""


def _cross_entropy_value(tokens, unembedding, bias, options):
    """Loss and plain cross-entropy, summed."""
    return _on_shares(_losses, tokens, unembedding, bias, options)[0]


def _cross_entropy_forward(tokens, unembedding, bias, options):
    """The same, and the gradients that the backward pass scales."""
    return _on_shares(_losses_and_gradients, tokens, unembedding, bias, options)


def _cross_entropy_backward(_, residuals, gradients):
    scaled = jax.tree.map(lambda leaf: leaf * gradients[0].astype(leaf.dtype), residuals)
    hidden_gradient, table_gradient, bias_gradient = scaled
    return _Tokens(hidden_gradient, None, None), table_gradient, bias_gradient


_cross_entropy = jax.custom_vjp(_cross_entropy_value, nondiff_argnums=(3,))
_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _on_shares(compute, tokens: _Tokens, unembedding, bias, options: _Options):
    """`compute` here, or on each device of a mesh with its tokens and its part of the vocabulary.

    It returns sums, and gradients by hidden, unembedding and bias.
    """
    table = unembedding.astype(tokens.hidden.dtype)
    compute = functools.partial(compute, options=options)
    if auto_mesh() is None:
        return compute(tokens, table, bias, shares=_Shares())
    rows = spec("bt", tokens.targets.shape)
    vocabulary, width = (mesh_axes(parameter_spec(letter)) for letter in "VD")
    row_axes = tuple(name for name in mesh_axes(rows) if name not in vocabulary)
    shares = _Shares(
        row_axes,
        vocabulary,
        tuple(name for name in vocabulary if name in mesh_axes(rows)),
        tuple(name for name in width if name in row_axes),
    )
    return jax.shard_map(
        functools.partial(compute, shares=shares),
        in_specs=(_Tokens(P(*rows, None), rows, rows), P(vocabulary), P(vocabulary)),
        out_specs=(P(), (P(*rows, None), P(vocabulary, shares.width), P(vocabulary))),
        check_vma=False,
    )(tokens, table, bias)


def _losses(tokens: _Tokens, table, bias, *, options: _Options, shares: _Shares):
    """Loss and plain cross-entropy, and no gradients."""

    def add_chunk(sums, chunk):
        loss, plain, _ = _chunk_loss(_together(chunk, shares), table, bias, options, shares)
        return (sums[0] + loss, sums[1] + plain), None

    start = (jnp.float32(0), jnp.float32(0))
    sums, _ = _over_chunks(add_chunk, start, _chunked(tokens, options.chunk, shares))
    return _summed(sums, shares.rows), (None, None, None)


def _losses_and_gradients(tokens: _Tokens, table, bias, *, options: _Options, shares: _Shares):
    """Loss and plain cross-entropy, and the gradients by hidden, table and bias."""

    def add_chunk(sums, chunk: _Tokens):
        chunk = _together(chunk, shares)
        loss, plain, slope = _chunk_loss(chunk, table, bias, options, shares)
        bias_gradient = None if bias is None else slope.sum(axis=0)
        slope = slope.astype(chunk.hidden.dtype)
        hidden_gradient = slope @ table
        if shares.gathered:
            hidden_gradient = jax.lax.psum_scatter(hidden_gradient, shares.gathered, tiled=True)
        table_gradient = jnp.einsum(
            "mv,md->vd", slope, chunk.hidden, preferred_element_type=jnp.float32
        )
        added = (loss, plain, table_gradient, bias_gradient)
        return jax.tree.map(jnp.add, sums, added), hidden_gradient

    start = (
        jnp.float32(0),
        jnp.float32(0),
        jnp.zeros(table.shape, jnp.float32),
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
    )
    sums, hidden_gradient = _over_chunks(add_chunk, start, _chunked(tokens, options.chunk, shares))
    loss, plain, table_gradient, bias_gradient = sums
    shape = tokens.hidden.shape
    hidden_gradient = hidden_gradient.reshape(-1, shape[-1])[: tokens.targets.size].reshape(shape)
    gradients = _added_up(hidden_gradient, table_gradient, bias_gradient, shares)
    return _summed((loss, plain), shares.rows), gradients


def _added_up(hidden_gradient, table_gradient, bias_gradient, shares: _Shares):
    """The gradients summed over devices, each device keeping its part of the table's."""
    if not shares.gathered:
        hidden_gradient = _summed(hidden_gradient, shares.vocabulary)
    if not shares.rows:
        return hidden_gradient, table_gradient, bias_gradient
    # As the gradients of other products: added up in float32 here, sent as the products' type.
    table_gradient = table_gradient.astype(hidden_gradient.dtype)
    if shares.width:
        table_gradient = jax.lax.psum_scatter(
            table_gradient, shares.width, scatter_dimension=1, tiled=True
        )
    others = tuple(name for name in shares.rows if name not in shares.width)
    table_gradient = _summed(table_gradient, others)
    # The backward pass of the layers waits for the table's sum, so that it does not run beside the
    # whole table's gradient: [V, D] in float32.
    hidden_gradient, table_gradient, bias_gradient = jax.lax.optimization_barrier(
        (hidden_gradient, table_gradient, _summed(bias_gradient, shares.rows))
    )
    return hidden_gradient, table_gradient.astype(jnp.float32), bias_gradient


def _summed(tree: Any, axes: tuple[str, ...]) -> Any:
    """Summed over mesh axes, where there are any."""
    return jax.lax.psum(tree, axes) if axes else tree


def _together(chunk: _Tokens, shares: _Shares) -> _Tokens:
    """A chunk of the tokens of all devices that share the vocabulary."""
    return jax.lax.all_gather(chunk, shares.gathered, tiled=True) if shares.gathered else chunk


def _chunked(tokens: _Tokens, chunk: int, shares: _Shares) -> _Tokens:
    """The tokens as C chunks along a leading axis, the last one padded."""
    count = tokens.targets.size
    if shares.gathered:
        chunk = -(-chunk // jax.lax.axis_size(shares.gathered))
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


def _chunk_loss(chunk: _Tokens, table, bias, options: _Options, shares: _Shares):
    """One chunk's loss, plain cross-entropy, and the gradient of the loss by its logits [M, V].

    What a device lacks of a row of logits it gets as a number: the row's largest, its sums.
    """
    hidden, targets, weights = chunk
    _, vocab_size, logit_softcap, label_smoothing, z_loss = options
    logits = jnp.einsum("md,vd->mv", hidden, table, preferred_element_type=jnp.float32)
    if bias is not None:
        logits += bias
    if logit_softcap:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    here = logits.shape[1]
    largest = logits.max(axis=1, keepdims=True)
    if shares.vocabulary:
        largest = jax.lax.pmax(largest, shares.vocabulary)
        targets = targets - here * jax.lax.axis_index(shares.vocabulary)
    # The exponentials are kept and summed by a product with ones, which XLA runs on all cores.
    exponentials = jnp.exp(logits - largest)
    denominator = _summed(exponentials @ jnp.ones((here, 1), jnp.float32), shares.vocabulary)
    log_z = (jnp.log(denominator) + largest)[:, 0]
    is_target = jnp.arange(here) == targets[:, None]
    if shares.vocabulary:
        target_logit = _summed(jnp.where(is_target, logits, 0).sum(axis=1), shares.vocabulary)
    else:
        target_logit = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    plain = log_z - target_logit
    expected_logit = target_logit
    if label_smoothing:
        mean_logit = _summed(logits.sum(axis=1), shares.vocabulary) / vocab_size
        expected_logit = (1 - label_smoothing) * target_logit + label_smoothing * mean_logit
    loss = log_z - expected_logit + z_loss * jnp.square(log_z)
    probability = exponentials / denominator
    wanted = jnp.where(is_target, jnp.float32(1 - label_smoothing), 0)
    wanted += label_smoothing / vocab_size
    slope = probability * (1 + 2 * z_loss * log_z[:, None]) - wanted
    if logit_softcap:
        slope *= 1 - jnp.square(logits / logit_softcap)
    return (loss * weights).sum(), (plain * weights).sum(), slope * weights[:, None]
