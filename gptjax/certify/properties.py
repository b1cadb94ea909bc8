"""Ways of running a model that must give the same, each as a check of any config.

A model is run in tiny shapes with random parameters and a batch whose rows weigh differently. An
error is the largest difference over the largest value of what is compared. Gradients are computed
operation by operation, so that models share what is compiled; `scanned`, `accumulated` and
`sharded` are the compiled train step, and `cached` is `gptjax.generate`'s compiled decoding, held
against them.
"""

import contextlib
import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.extend.core import Jaxpr, jaxprs_in_params

from gptjax.config import MeshConfig, TransformerConfig
from gptjax.costs.model import model_cost
from gptjax.data.batch import Batch
from gptjax.decoding.generate import Decoding
from gptjax.layers.attention import module
from gptjax.layers.attention.reference import attention_weights, weighted_values
from gptjax.models.build import abstract, build, split
from gptjax.models.plain import gpt2
from gptjax.parallel.sharding import build_mesh
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.losses import LossFunction, token_loss
from gptjax.training.step import State, compile_train_step, init_state

ROWS = 16
"""Sequences of the batch (B): two parts on each of eight devices."""
ROUNDING = 1e-5
"""What the order of float32 sums may change; a wrong program errs by far more."""
BFLOAT16_ROUNDING = 0.05
"""Of activations with 8 bits; see `_bfloat16`."""


class NotApplicable(Exception):
    """The property means nothing for this variant; the message says why."""


class Property(NamedTuple):
    """One column of the grid."""

    claim: str
    """What is the same as what."""
    tolerance: float
    """The largest error that passes."""
    check: Callable[["Case"], float]
    """Case → error."""


class Case:
    """A model with parameters and a batch, and what several checks need of it."""

    def __init__(self, config: TransformerConfig, real: TransformerConfig):
        """`config` is run; of `real`, the variant in its own size, only shapes are made."""
        self.config = config
        self.real = real
        draw = np.random.default_rng(0)
        _, params = split(build(self.config, rngs=nnx.Rngs(0)))
        # Further from zero than an initialisation: biases count, attention prefers, caps are felt.
        self.params = jax.tree.map(
            lambda leaf: leaf + 0.2 * draw.standard_normal(leaf.shape, np.float32), params
        )
        self.batch = _batch(self.config, draw)

    def model(self, **changes: Any) -> Any:
        """The variant with these parameters, and with `changes` of its config."""
        return nnx.merge(self.graphdef(**changes), self.params)

    def graphdef(self, **changes: Any) -> nnx.GraphDef:
        """The structure of the variant with `changes` of its config."""
        config = dataclasses.replace(self.config, **changes)
        return abstract(config)[0]

    def loss(self, *, chunk: int = 0, **changes: Any) -> LossFunction:
        """The loss with all of its parts, of the variant with `changes` of its config."""
        weights = {"label_smoothing": 0.1, "z_loss": 0.01, "balance_loss": 0.1}
        return token_loss(self.graphdef(**changes), chunk=chunk, router_z_loss=0.01, **weights)

    def gradients(self, **how: Any) -> Any:
        """The mean loss and its gradient; `how` are arguments of `loss`."""
        loss, weight = self.loss(**how), self.batch.loss_weights.sum()
        return jax.value_and_grad(lambda params: loss(params, self.batch, None).loss / weight)(
            self.params
        )

    @functools.cached_property
    def plain(self) -> Any:
        """`gradients` unrolled, nothing recomputed, all tokens' logits at once, one device."""
        return self.gradients()

    def step(self, *, devices: int = 1, grad_accumulation: int = 1, **changes: Any) -> Any:
        """The loss and the gradient of the compiled train step; `changes` of the config."""
        mesh = build_mesh(MeshConfig(), devices)
        keep_gradient = optax.trace(decay=0.0)
        state = init_state(lambda: self.params, keep_gradient, mesh)
        step = compile_train_step(
            self.loss(**changes),
            keep_gradient,
            state,
            self.batch,
            mesh,
            grad_accumulation=grad_accumulation,
        )
        state, metrics = jax.block_until_ready(step(state, self.batch))
        return metrics.loss, state.optimizer.trace

    @functools.cached_property
    def together(self) -> float:
        """The error of a scanned step in two parts on each device: three properties at once.

        To compile a program for each would take most of the grid's time.
        """
        return difference(
            self.step(devices=ROWS, grad_accumulation=2, scan_layers=True), self.plain
        )

    def together_or(self, alone: Callable[[], Any]) -> float:
        """The error of `together`; where that errs, of the gradients with one of its properties."""
        if self.together <= ROUNDING:
            return self.together
        return difference(alone(), self.plain)

    def logits(self, batch: Batch) -> np.ndarray:
        """[B, T, V]."""
        return np.asarray(self.model()(batch.tokens, **batch.inputs()))


def _batch(config: TransformerConfig, draw: np.random.Generator) -> Batch:
    """Random tokens; padding where the family reads any, a place at least at each row's end."""
    shape = (ROWS, config.context_length)

    def tokens() -> np.ndarray:
        return draw.integers(config.vocab_size, size=shape, dtype=np.int32)

    valid = (
        np.arange(config.context_length) < config.context_length - 1 - np.arange(ROWS)[:, None] % 3
    )
    batch = Batch(tokens(), tokens(), draw.uniform(size=shape).astype(np.float32))
    if config.family == "encoder":
        batch = batch._replace(padding_mask=valid, loss_weights=batch.loss_weights * valid)
    if config.token_types:
        batch = batch._replace(token_types=tokens() % config.token_types)
    if config.family == "encoder_decoder":
        batch = batch._replace(source=tokens(), source_mask=valid)
    return batch


def difference(found: Any, expected: Any) -> float:
    """The largest difference of two trees over the largest value expected; infinite if not finite.

    The loss, a tree's scalar, is held against its own size.
    """
    largest = [0.0, 0.0]
    scale = [0.0, 0.0]
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        if not (np.isfinite(one).all() and np.isfinite(other).all()):
            return math.inf
        kind = int(other.ndim > 0)
        largest[kind] = max(largest[kind], np.abs(one - other).max())
        scale[kind] = max(scale[kind], np.abs(other).max())
    return max(error / (size or 1.0) for error, size in zip(largest, scale, strict=True))


def _mask(case: Case) -> float:
    """What a query may not see moves nothing, and what it may see does.

    Causal: row t of the batch has other tokens from place t on, which no earlier logit may notice.
    Bidirectional: other tokens at padding; a later token is noticed.
    """
    batch, places = case.batch, np.arange(case.config.context_length)
    if batch.padding_mask is not None:
        valid = np.asarray(batch.padding_mask)
        last, nowhere = valid.sum(axis=1, keepdims=True) - 1, np.zeros_like(valid)
        error = _moves(case, batch, ~valid, unmoved=valid, moved=nowhere)
        return error + _moves(
            case, batch, places == last, unmoved=nowhere, moved=places == last - 1
        )
    rows = np.zeros(len(places), int)
    batch = jax.tree.map(lambda array: array[rows], batch)
    later = places >= places[:, None]
    error = _moves(case, batch, later, unmoved=~later, moved=places == places[:, None])
    if batch.source is not None:
        hidden = ~batch.source_mask
        everywhere, nowhere = np.ones_like(later), np.zeros_like(later)
        error += _moves(case, batch, hidden, unmoved=everywhere, moved=nowhere, of="source")
        error += _moves(case, batch, ~hidden, unmoved=nowhere, moved=everywhere, of="source")
    return error


def _moves(case, batch, changed, *, unmoved, moved, of="tokens") -> float:
    """How far the logits [B, T, V] at `unmoved` [B, T] move with the tokens at `changed` [B, T].

    Infinite if one at `moved` [B, T] does not.
    """
    tokens = getattr(batch, of)
    others = np.where(changed, (tokens + 1) % case.config.vocab_size, tokens)
    before, after = case.logits(batch), case.logits(batch._replace(**{of: others}))
    moves = np.abs(after - before).max(axis=-1) / np.abs(before).max()
    if (moves[moved] <= ROUNDING).any() or not np.isfinite(moves).all():
        return math.inf
    return float(moves[unmoved].max(initial=0.0))


def _packed(case: Case) -> float:
    """Two documents and padding in a row, and one of them alone in a row that is as long.

    Other tokens of its neighbours move nothing.
    """
    config, batch, places = (
        case.config,
        case.batch,
        np.arange(case.config.context_length, dtype=np.int32),
    )
    if config.family == "encoder_decoder":
        raise NotApplicable("an encoder-decoder takes one document per row")
    if "compressed" in config.attention_pattern:
        raise NotApplicable("compressed attention joins tokens of several documents")
    first = places < 4
    documents = np.tile(np.where(first, 1, 2 * (places < places[-1])), (ROWS, 1))
    positions = np.tile(np.where(first, places, places - 4), (ROWS, 1))
    packed = batch._replace(padding_mask=None, segment_ids=documents, positions=positions)
    own = 1 + np.arange(ROWS)[:, None] % 2
    in_row = documents == own
    alone = jax.tree.map(lambda rows: np.where(own == 1, rows, np.roll(rows, -4, axis=1)), batch)
    valid = places < in_row.sum(axis=1, keepdims=True)
    alone = alone if batch.padding_mask is None else alone._replace(padding_mask=valid)
    error = difference(case.logits(packed)[in_row], case.logits(alone)[valid])
    return error + _moves(case, packed, ~in_row, unmoved=in_row, moved=~in_row)


def _scanned(case: Case) -> float:
    return case.together_or(lambda: case.gradients(scan_layers=True))


def _remat(case: Case) -> float:
    return difference(case.gradients(remat="full"), case.plain)


def _cached(case: Case) -> float:
    """Rows read a token at a time, unrolled, and rows of unequal beginnings, scanned."""
    if case.config.family == "encoder":
        raise NotApplicable("an encoder predicts no next token")
    expected = case.logits(case.batch)
    alike, unlike = np.ones(ROWS, int), 1 + np.arange(ROWS) % 4
    return max(
        _decoded(case, alike, expected),
        _decoded(case, unlike, expected, scan_layers=True),
    )


def _decoded(case: Case, beginnings: np.ndarray, expected: np.ndarray, **changes: Any) -> float:
    """The error of the logits after each read, `beginnings` [B] tokens first, then one by one."""
    batch, source, row = case.batch, None, np.arange(ROWS)
    tokens = np.asarray(batch.tokens)
    if batch.source is not None and batch.source_mask is not None:
        lengths = batch.source_mask.sum(axis=1)
        source = [given[:size] for given, size in zip(batch.source, lengths, strict=True)]
    decoding = Decoding(case.model(**changes), ROWS, source)
    unread = [list(given[:size]) for given, size in zip(tokens, beginnings, strict=True)]
    starts, error = np.zeros(ROWS, np.int32), 0.0
    while True:
        logits = decoding.read(unread, starts)
        starts = starts + np.array([len(given) for given in unread], np.int32)
        error = max(error, difference(logits, expected[row, starts - 1]))
        if starts.max() == case.config.context_length:
            return error
        unread = tokens[row, starts][:, None].tolist()


SIZES = ("vocab_size", "context_length", "depth", "width", "heads", "dropout", "attention_kernel")
"""Fields in which a model may differ from GPT-2 and still be what models/plain.py computes."""


def _plain(case: Case) -> float:
    """GPT-2's choices are the config's defaults."""
    for field in dataclasses.fields(TransformerConfig):
        if field.name not in SIZES and getattr(case.config, field.name) != field.default:
            raise NotApplicable("models/plain.py is GPT-2, and this another model")
    return difference(gpt2(case.params, jnp.asarray(case.batch.tokens)), case.logits(case.batch))


def _attention(case: Case) -> float:
    if case.config.family == "recurrent":
        raise NotApplicable("an LSTM has no attention")
    with reference_attention():
        expected = case.gradients(), case.logits(case.batch)
    found = case.plain, case.logits(case.batch)
    return max(map(difference, found, expected))


@contextlib.contextmanager
def reference_attention() -> Iterator[None]:
    """Attention of reference.py, left to autodiff, in place of `attend`."""

    def reference(query, key, value, mask, bias, scale, softcap, normalize):
        how = {"scale": scale, "softcap": softcap, "normalize": normalize}
        return weighted_values(attention_weights(query, key, mask, bias, **how), value)

    fast, module.attend = module.attend, reference
    try:
        yield
    finally:
        module.attend = fast


def _chunked(case: Case) -> float:
    return difference(case.gradients(chunk=case.batch.tokens.size // 3 + 1), case.plain)


def _accumulated(case: Case) -> float:
    return case.together_or(lambda: case.step(grad_accumulation=2))


def _sharded(case: Case) -> float:
    if jax.device_count() == 1:
        raise NotApplicable("there is one device")
    return case.together_or(lambda: case.step(devices=ROWS))


def _bfloat16(case: Case) -> float:
    """The gradient's error as a vector, since single small numbers have none of their own.

    Of a mixture of experts the loss alone: a token whose router wavers goes elsewhere.
    """
    (loss, found), (expected_loss, expected) = case.gradients(dtype="bfloat16"), case.plain
    error = difference(loss, expected_loss)
    if case.config.num_experts:
        return error
    apart = optax.tree.norm(optax.tree.sub(found, expected)) / optax.tree.norm(expected)
    return max(error, float(apart)) if jnp.isfinite(apart) else math.inf


def _restored(case: Case) -> float:
    """Parameters and both moments of AdamW, by bits."""
    optimizer = optax.adamw(1e-3)
    _, moments = optimizer.update(case.plain[1], optimizer.init(case.params), case.params)
    saved = State(jnp.int32(7), case.params, moments)
    with tempfile.TemporaryDirectory() as directory:
        with Checkpoints(Path(directory)) as checkpoints:
            checkpoints.save(saved, {})
            checkpoints.wait()
        with Checkpoints(Path(directory), read_only=True) as checkpoints:
            restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, saved)).state
    return difference(restored, saved)


def _parameters(case: Case) -> float:
    """Of the variant in its own size, of which only the shapes are made."""
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
    """Two operations a multiply-add of every matrix product in `jaxpr`, sub-programs included.

    An inner product row by row, [B, D] · [B, D] → [B], is none: it costs what a norm costs. In a
    grouped product (`ragged_dot`) each row meets one group's matrix.
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
    "mask": Property("a causal model sees no later token, no model padding", ROUNDING, _mask),
    "packed": Property("a document packed in a row = the document alone", ROUNDING, _packed),
    "scanned": Property("scanned layers = unrolled layers", ROUNDING, _scanned),
    "remat": Property("recomputed blocks = kept activations", ROUNDING, _remat),
    "cached": Property("decoding with a cache = the full forward pass", ROUNDING, _cached),
    "plain": Property("Decoder = GPT-2 written out in models/plain.py", ROUNDING, _plain),
    "attention": Property("fast attention = reference attention", ROUNDING, _attention),
    "chunked": Property("the loss in chunks = the loss at once", ROUNDING, _chunked),
    "accumulated": Property("a batch in 2 parts = the batch at once", ROUNDING, _accumulated),
    "sharded": Property(
        "2 parts on each of the devices = the batch at once on one", ROUNDING, _sharded
    ),
    "bfloat16": Property("bfloat16 activations ≈ float32", BFLOAT16_ROUNDING, _bfloat16),
    "restored": Property("a checkpoint's state = the state saved", 0.0, _restored),
    "parameters": Property("the model cost's parameters = the model's", 0.0, _parameters),
    "flops": Property("the model cost's FLOPs = the traced products'", 0.0, _flops),
}
"""The columns, in order."""
