"""Properties of every variant, each a numerical check: equivalent programs agree.

A model is run in tiny shapes with random parameters and loss weights (cases.py). `scanned`,
`remat`, `chunked`, `accumulated` and `sharded` compare the train step that runs take with the
gradient of the loss; `cached` and `rounded` compare the decoding of `gptjax.generate` with the
forward pass.
"""

import contextlib
import dataclasses
import math
import tempfile
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend.core import Jaxpr, jaxprs_in_params

from gptjax.certify.cases import COMPILED_FAST, ROUNDING, ROWS, Case, difference
from gptjax.config import TransformerConfig
from gptjax.config.values import DecodingWeights
from gptjax.costs.model import model_cost
from gptjax.decoding.generate import Decoding
from gptjax.layers.attention import module
from gptjax.layers.attention.reference import attention_weights, weighted_values
from gptjax.models.build import abstract
from gptjax.models.plain import gpt2
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.leaves import shapes_of
from gptjax.training.step import State

EIGHT_BITS = 0.05
"""Tolerance of activations or weights with 8 bits; see `_rounded`."""


class NotApplicable(Exception):
    """The property does not apply to this variant; the message says why."""


class Property(NamedTuple):
    """One column of the grid."""

    claim: str
    """What equals what."""
    tolerance: float
    """The largest error that passes."""
    check: Callable[["Case"], float]
    """Case → error."""


def _mask(case: Case) -> float:
    """Masked tokens do not change the logits, and unmasked ones do.

    Causal: row t of the batch has other tokens from position t on; earlier logits must not change.
    Bidirectional: other tokens at padding change nothing; a later token changes earlier logits.
    """
    batch, positions = case.batch, np.arange(case.config.context_length)
    if batch.padding_mask is not None:
        valid = np.asarray(batch.padding_mask)
        last, nowhere = valid.sum(axis=1, keepdims=True) - 1, np.zeros_like(valid)
        error = _moves(case, batch, ~valid, unmoved=valid, moved=nowhere)
        return error + _moves(
            case, batch, positions == last, unmoved=nowhere, moved=positions == last - 1
        )
    rows = np.zeros(len(positions), int)
    batch = jax.tree.map(lambda array: array[rows], batch)
    later = positions >= positions[:, None]
    error = _moves(case, batch, later, unmoved=~later, moved=positions == positions[:, None])
    if batch.source is not None:
        hidden = ~batch.source_mask
        everywhere, nowhere = np.ones_like(later), np.zeros_like(later)
        error += _moves(case, batch, hidden, unmoved=everywhere, moved=nowhere, of="source")
        error += _moves(case, batch, ~hidden, unmoved=nowhere, moved=everywhere, of="source")
    return error


def _moves(case, batch, changed, *, unmoved, moved, of="tokens") -> float:
    """Returns how far logits at `unmoved` [B, T] change with the tokens at `changed` [B, T].

    Infinite if a logit at `moved` [B, T] does not change.
    """
    tokens = getattr(batch, of)
    others = np.where(changed, (tokens + 1) % case.config.vocab_size, tokens)
    before, after = case.logits(batch), case.logits(batch._replace(**{of: others}))
    moves = np.abs(after - before).max(axis=-1) / np.abs(before).max()
    if (moves[moved] <= ROUNDING).any() or not np.isfinite(moves).all():
        return math.inf
    return float(moves[unmoved].max(initial=0.0))


def _packed(case: Case) -> float:
    """Two packed documents and padding in a row, against one of them alone in a row.

    Other tokens in the other document change nothing.
    """
    config, batch, positions = (
        case.config,
        case.batch,
        np.arange(case.config.context_length, dtype=np.int32),
    )
    if config.family == "encoder_decoder":
        raise NotApplicable("an encoder-decoder takes one document per row")
    if "compressed" in config.attention_pattern:
        raise NotApplicable("compressed attention mixes tokens of several documents")
    first = positions < 4
    documents = np.tile(np.where(first, 1, 2 * (positions < positions[-1])), (ROWS, 1))
    restarted = np.tile(np.where(first, positions, positions - 4), (ROWS, 1))
    packed = batch._replace(padding_mask=None, segment_ids=documents, positions=restarted)
    own = 1 + np.arange(ROWS)[:, None] % 2
    in_row = documents == own
    alone = jax.tree.map(lambda rows: np.where(own == 1, rows, np.roll(rows, -4, axis=1)), batch)
    valid = positions < in_row.sum(axis=1, keepdims=True)
    alone = alone if batch.padding_mask is None else alone._replace(padding_mask=valid)
    error = difference(case.logits(packed)[in_row], case.logits(alone)[valid])
    return error + _moves(case, packed, ~in_row, unmoved=in_row, moved=~in_row)


def _scanned(case: Case) -> float:
    return case.together_or(lambda: case.gradients(scan_layers=True))


def _remat(case: Case) -> float:
    return case.together_or(lambda: case.gradients(remat="full"))


def _cached(case: Case) -> float:
    """Decoding token by token, unrolled; and with prompts of unequal lengths, scanned."""
    if case.config.family == "encoder":
        raise NotApplicable("an encoder predicts no next token")
    expected = case.logits(case.batch)
    alike, unlike = np.ones(ROWS, int), 1 + np.arange(ROWS) % 4
    return max(
        _decoded(case, alike, expected),
        _decoded(case, unlike, expected, scan_layers=True),
    )


def _decoded(
    case: Case,
    prompts: np.ndarray,
    expected: np.ndarray,
    weights: DecodingWeights = "dtype",
    measure: Callable[[Any, Any], float] = difference,
    **changes: Any,
) -> float:
    """Returns the error of the logits: a prompt of `prompts` [B] tokens, then token by token."""
    batch, source, row = case.batch, None, np.arange(ROWS)
    tokens = np.asarray(batch.tokens)
    if batch.source is not None and batch.source_mask is not None:
        lengths = batch.source_mask.sum(axis=1)
        source = [given[:size] for given, size in zip(batch.source, lengths, strict=True)]
    decoding = Decoding(case.model(**changes), ROWS, source, weights=weights)
    unread = [list(given[:size]) for given, size in zip(tokens, prompts, strict=True)]
    starts, error = np.zeros(ROWS, np.int32), 0.0
    while True:
        logits = decoding.read(unread, starts)
        starts = starts + np.array([len(given) for given in unread], np.int32)
        error = max(error, measure(logits, expected[row, starts - 1]))
        if starts.max() == case.config.context_length:
            return error
        unread = tokens[row, starts][:, None].tolist()


SIZES = ("vocab_size", "context_length", "depth", "width", "heads", "dropout", "attention_kernel")
"""Fields in which a model may differ from GPT-2 and still be what models/plain.py computes."""


def _plain(case: Case) -> float:
    """models/plain.py against the decoder; GPT-2's choices are the config's defaults."""
    for field in dataclasses.fields(TransformerConfig):
        if field.name not in SIZES and getattr(case.config, field.name) != field.default:
            raise NotApplicable("models/plain.py is GPT-2, and this is another model")
    compiled = jax.jit(gpt2, compiler_options=COMPILED_FAST)
    found = compiled(case.params, jnp.asarray(case.batch.tokens))
    return difference(found, case.logits(case.batch))


def _attention(case: Case) -> float:
    if case.config.family == "recurrent":
        raise NotApplicable("an LSTM has no attention")
    found = case.plain  # Compiled before the attention is replaced.
    with reference_attention():
        return difference(found, case.gradients())


@contextlib.contextmanager
def reference_attention() -> Iterator[None]:
    """Replace `attend` by the attention of reference.py, with autodiff's backward pass."""

    def reference(query, key, value, mask, bias, scale, softcap, normalize, dropout):
        assert dropout is None  # No check trains with it.
        how = {"scale": scale, "softcap": softcap, "normalize": normalize}
        return weighted_values(attention_weights(query, key, mask, bias, **how), value)

    fast, module.attend = module.attend, reference
    try:
        yield
    finally:
        module.attend = fast


def _chunked(case: Case) -> float:
    return case.together_or(lambda: case.gradients(chunk=case.batch.tokens.size // 3 + 1))


def _accumulated(case: Case) -> float:
    return case.together_or(lambda: case.step(grad_accumulation=2))


def _sharded(case: Case) -> float:
    if jax.device_count() == 1:
        raise NotApplicable("there is one device")
    return case.together_or(lambda: case.step(devices=ROWS))


def _rounded(case: Case) -> float:
    """Training with bfloat16 activations; and decoding with int8 weights.

    Errors are those of the gradient and of the logits as one vector each, as small entries have
    large relative errors. Of a mixture of experts only the loss: rounding may route a token to
    another expert.
    """
    (loss, found), (expected_loss, expected) = case.gradients(dtype="bfloat16"), case.plain
    error = difference(loss, expected_loss)
    if case.config.num_experts:
        return error
    if case.config.family != "encoder":
        prompts, logits = np.ones(ROWS, int), case.logits(case.batch)
        error = max(error, _decoded(case, prompts, logits, "int8", _apart))
    return max(error, _apart(found, expected))


def _apart(found: Any, expected: Any) -> float:
    """Returns how far two trees, each as one vector, are apart, over the length of the second."""
    one, other = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (found, expected)
    )
    apart = float(np.linalg.norm(one - other) / np.linalg.norm(other))
    return apart if math.isfinite(apart) else math.inf


def _restored(case: Case) -> float:
    """Parameters and both moments of AdamW, bit for bit."""
    _, gradient = case.plain
    adam, *rest = typing.cast(tuple, optax.adamw(1e-3).init(case.params))
    moments = adam._replace(mu=gradient, nu=jax.tree.map(jnp.square, gradient))
    saved = State(jnp.int32(7), case.params, (moments, *rest))
    with tempfile.TemporaryDirectory() as directory:
        with Checkpoints(Path(directory)) as checkpoints:
            checkpoints.save(saved, {})
            checkpoints.wait()
        with Checkpoints(Path(directory), read_only=True) as checkpoints:
            restored = checkpoints.restore(shapes_of(saved)).state
    return difference(restored, saved)


def _parameters(case: Case) -> float:
    """Parameter counts of the variant in its own size, by shapes alone."""
    _, params = abstract(case.real)
    built = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    return abs(built - model_cost(case.real).parameters) / built


def _flops(case: Case) -> float:
    counted, tokens = model_cost(case.config), case.batch.tokens.size
    graphdef, inputs = case.graphdef(), case.batch.inputs()

    def total(params: Any) -> jax.Array:
        return nnx.merge(graphdef, params)(case.batch.tokens, **inputs).sum()

    found = [product_flops(jax.make_jaxpr(f)(case.params).jaxpr) for f in (total, jax.grad(total))]
    expected = [tokens * counted.forward_flops, tokens * counted.training_flops]
    return max(abs(one - other) / other for one, other in zip(found, expected, strict=True))


def product_flops(jaxpr: Jaxpr) -> int:
    """Returns the FLOPs, two per multiply-add, of all matrix products in `jaxpr` and its calls.

    Row-wise inner products, [B, D] · [B, D] → [B], do not count: they cost what a norm costs. In a
    grouped product (`ragged_dot`) each row is multiplied by one group's matrix.
    """
    total = 0
    equations: list[Any] = jaxpr.eqns
    for equation in equations:
        name = equation.primitive.name
        if name in ("dot_general", "ragged_dot_general"):
            left, right = (variable.aval.shape for variable in equation.invars[:2])
            groups: tuple[int, ...] = ()
            if name == "dot_general":
                dimensions = equation.params["dimension_numbers"]
            else:
                ragged = equation.params["ragged_dot_dimension_numbers"]
                dimensions, groups = ragged.dot_dimension_numbers, ragged.rhs_group_dimensions
            (contracted, right_contracted), (batch, right_batch) = dimensions
            if min(len(left), len(right)) > len(contracted) + len(batch):
                shared = {*right_contracted, *right_batch, *groups}
                free = (size for axis, size in enumerate(right) if axis not in shared)
                total += 2 * math.prod(left) * math.prod(free)
        repeats = equation.params["length"] if name == "scan" else 1
        total += repeats * sum(map(product_flops, jaxprs_in_params(equation.params)))
    return total


PROPERTIES = {
    "mask": Property("no token attends to padding, or if causal to a later one", ROUNDING, _mask),
    "packed": Property("a document packed in a row = the document alone", ROUNDING, _packed),
    "scanned": Property("scanned layers = unrolled layers", ROUNDING, _scanned),
    "remat": Property("recomputed blocks = kept activations", ROUNDING, _remat),
    "cached": Property("decoding with a cache = the full forward pass", ROUNDING, _cached),
    "plain": Property("Decoder = GPT-2 written out in models/plain.py", ROUNDING, _plain),
    "attention": Property("fast attention = reference attention", ROUNDING, _attention),
    "chunked": Property("the loss in chunks = the loss at once", ROUNDING, _chunked),
    "accumulated": Property(
        "2 gradient accumulation steps = the batch at once", ROUNDING, _accumulated
    ),
    "sharded": Property(
        "2 accumulation steps on every device = 1 on one device", ROUNDING, _sharded
    ),
    "rounded": Property(
        "bfloat16 activations, and int8 weights in decoding ≈ float32", EIGHT_BITS, _rounded
    ),
    "restored": Property("the restored checkpoint = the state saved", 0.0, _restored),
    "parameters": Property("counted parameters (costs/model.py) = the model's", 0.0, _parameters),
    "flops": Property("counted FLOPs (costs/model.py) = those of traced products", 0.0, _flops),
}
"""The columns, in order."""
