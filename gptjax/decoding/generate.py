"""Autoregressive decoding with a key/value cache, greedy or sampled, for a batch of prompts.

Sources: temperature, Ackley et al. 1985; top-k, Fan et al. 2018; top-p (nucleus), Holtzman et al.
2020; min-p, Nguyen et al. 2024; repetition penalty, CTRL (Keskar et al. 2019, section 4.1). They
are applied in this order, but the penalty first, as in Hugging Face transformers.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from gptjax.config import InputError
from gptjax.layers.block import BlockCache
from gptjax.models.build import LanguageModel, Params, split
from gptjax.parallel.keys import random_key

SMALLEST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""The smallest normal float32; a temperature below it is greedy decoding."""
PENALTIES = 1e-6, 1e6
"""The least and the largest repetition penalty for which logits stay finite."""
PORTION_SECONDS = 1 / 30
"""The longest that `generate` keeps tokens back, so that text still seems to flow."""
MAX_PORTION = 64
"""The most tokens per row in one dispatch."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled.

    Raises:
      InputError: a value out of range.
    """

    temperature: float = 1.0
    """Divides the logits; 0, or a number that float32 rounds to 0, is greedy decoding."""
    top_k: int = 0
    """Sample from this many of the most likely tokens; 0 takes all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together reach this probability."""
    min_p: float = 0.0
    """Sample from tokens with at least this fraction of the most likely token's probability."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that occurred, and multiplies the negative ones."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}: it must be at least 0.")
        if self.top_k < 0:
            raise InputError(f"top-k is {self.top_k}: it must be at least 0.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}: it must be above 0 and at most 1.")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min-p is {self.min_p}: it must be at least 0 and at most 1.")
        if not PENALTIES[0] <= self.repetition_penalty <= PENALTIES[1]:
            raise InputError(
                f"repetition-penalty is {self.repetition_penalty}: it must be at least "
                f"{PENALTIES[0]:g} and at most {PENALTIES[1]:g}."
            )

    def filters(self) -> "Filters":
        """These choices as a compiled program takes them."""
        greedy = self.temperature < SMALLEST_TEMPERATURE
        numbers = {
            "temperature": None if greedy else self.temperature,
            "top_p": None if self.top_p == 1 else self.top_p,
            "min_p": self.min_p or None,
            "penalty": None if self.repetition_penalty == 1 else self.repetition_penalty,
        }
        with np.errstate(over="ignore"):
            arrays = {name: n and np.array(n, np.float32) for name, n in numbers.items()}
        return Filters(top_k=self.top_k, **arrays)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Filters:
    """`Sampling` for a compiled program: None does nothing, and other numbers are arguments, so
    that nothing is compiled anew for another temperature."""

    temperature: Float[Array | np.ndarray, ""] | None
    """None is greedy decoding."""
    top_k: int = field(metadata={"static": True})
    top_p: Float[Array | np.ndarray, ""] | None
    min_p: Float[Array | np.ndarray, ""] | None
    penalty: Float[Array | np.ndarray, ""] | None


def filtered_logits(logits: Float[Array, "B V"], filters: Filters) -> Float[Array, "B V"]:
    """Logits divided by the temperature, -inf where top-k, top-p or min-p exclude a token.

    The most likely token gets 0 and is never excluded. There is a temperature.
    """
    # Relative to the largest, since a logit divided by the temperature may be infinite.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / filters.temperature
    if 0 < filters.top_k < logits.shape[-1]:
        smallest_kept = jax.lax.top_k(logits, filters.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    if filters.top_p is not None:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = jnp.where(before < filters.top_p, descending, 0)
        logits = jnp.where(logits < kept.min(axis=-1, keepdims=True), -jnp.inf, logits)
    if filters.min_p is not None:
        logits = jnp.where(logits < jnp.log(filters.min_p), -jnp.inf, logits)
    return logits


def penalised_logits(
    logits: Float[Array, "B V"],
    occurred: Bool[Array, "B V"],
    penalty: float | Float[Array | np.ndarray, ""],
) -> Float[Array, "B V"]:
    """Logits after the repetition penalty of the tokens that `occurred` (CTRL)."""
    return jnp.where(occurred, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits: Float[Array, "B V"], filters: Filters, key: jax.Array) -> Int[Array, " B"]:
    """Next tokens, int32, greedy or sampled from the filtered softmax of `logits`."""
    if filters.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    chosen = jax.random.categorical(key, filtered_logits(logits, filters), axis=-1)
    return chosen.astype(jnp.int32)


def generate(
    model: LanguageModel,
    prompt: Int[np.ndarray, "B T"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int | Sequence[int] = 0,
    end_token: int | Sequence[int] | None = None,
    sliding_window: bool = False,
    source: Int[np.ndarray, "B S"] | Sequence[Sequence[int]] | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Continue each row of `prompt`, yielding the next tokens [B], int32, per step.

    Rows may differ in length; each is decoded as it would be alone with its own seed. A row that
    has reached `end_token` repeats it; decoding stops when all have, or when the longest of the
    others fills the context. With `sliding_window` that row is truncated to its last half context,
    which is read again, and decoding continues without what was cut. The device decodes several
    tokens per dispatch, as many as take `PORTION_SECONDS`.

    Args:
      model: a decoder, a recurrent model, or an encoder-decoder.
      prompt: tokens, B rows.
      max_new_tokens: the most tokens to decode per row.
      sampling: how tokens are chosen; None samples from the softmax.
      seed: of sampling, one per row, or the first row's, row i having `seed` + i; the key of a
        row's n-th token is `fold_in(random_key(its seed), n)`. Seeds are taken modulo 2³².
      end_token: the token that ends a row, or several such tokens.
      sliding_window: whether to continue past the end of the context.
      source: source tokens of an encoder-decoder, B rows.

    Raises:
      InputError: an empty prompt, one longer than the context, a token out of the vocabulary, or
        not as many seeds as rows.
    """
    context, size = model.config.context_length, model.config.vocab_size
    rows, ends = checked_rows(model, prompt, "prompt"), end_tokens(end_token)
    filters, reach = (sampling or Sampling()).filters(), max(map(len, rows))
    most = context if sliding_window else reach + max_new_tokens
    decoding = Decoding(model, len(rows), source, most)
    seeds, is_end = _row_seeds(seed, len(rows)), np.isin(np.arange(size), ends)
    choosing, state = Choosing(filters, seeds, is_end), _first_state(rows, size, filters)
    if max_new_tokens < 1:
        return
    live, portion, dispatched, since = ~state.ended, 1, 1, time.perf_counter()
    state, said = decoding.start(rows, state, choosing)
    pending = [said]
    while True:
        # `reach` is the most tokens that a row has in the cache when all pending ones are decoded.
        steps = min(portion, max_new_tokens - dispatched, context - reach)
        if steps > 0:
            # Started before the last ones are fetched: the device does not wait for the host.
            reach, dispatched = reach + steps, dispatched + steps
            state, said = decoding.advance(reach, steps, state, choosing)
            pending.append(said)
        if not pending:
            return
        fetched = np.asarray(pending.pop(0))
        fetched = fetched[fetched[:, 0] >= 0]
        since, seconds = time.perf_counter(), time.perf_counter() - since
        lively = int(PORTION_SECONDS * len(fetched) / seconds)
        portion = min(2 * portion, MAX_PORTION, max(1, lively))
        for tokens in fetched:
            yield tokens
            # An ended row no longer grows, so that no other is truncated or stopped for it.
            live &= ~is_end[tokens]
            for row in np.flatnonzero(live):
                rows[row].append(int(tokens[row]))
        if not live.any():
            return
        if pending:
            continue
        reach = max(len(rows[row]) for row in np.flatnonzero(live)) - 1
        if reach == context and sliding_window and dispatched < max_new_tokens:
            half = max(1, context // 2)
            rows = [row[-half:] if len(row) > context else row for row in rows]
            decoding.reset()
            reach, dispatched = max(map(len, rows)), dispatched + 1
            state, said = decoding.start(rows, state, choosing)
            pending.append(said)


def end_tokens(given: int | Sequence[int] | None) -> list[int]:
    """The end tokens as a list, of one, several or none."""
    return [] if given is None else np.atleast_1d(given).tolist()


class Choosing(NamedTuple):
    """How the tokens of all steps are chosen."""

    filters: Filters
    seeds: UInt32[Array | np.ndarray, " B"]
    is_end: Bool[Array | np.ndarray, " V"]
    """Whether a token ends its row."""


class State(NamedTuple):
    """What a step of decoding hands to the next, besides the cache."""

    tokens: Int[Array | np.ndarray, " B"]
    """The last token of each row, which is not yet in the cache."""
    lengths: Int[Array | np.ndarray, " B"]
    """How many tokens of each row are in the cache."""
    ended: Bool[Array | np.ndarray, " B"]
    occurred: Bool[Array | np.ndarray, "B V"] | None
    """Which tokens occurred in each row; None without a repetition penalty."""
    decoded: Int[Array | np.ndarray, ""]
    """How many tokens were decoded of each row."""


def _first_state(rows: Sequence[Sequence[int]], vocab_size: int, filters: Filters) -> State:
    """The state before `rows` are read."""
    occurred = None
    if filters.penalty is not None:
        occurred = np.zeros((len(rows), vocab_size), bool)
        for row, tokens in enumerate(rows):
            occurred[row, tokens] = True
    none = np.zeros(len(rows), np.int32)
    return State(none, none, none.astype(bool), occurred, np.int32(0))


class Weights(NamedTuple):
    """The parameters in the form that decoding reads, and what else is the same in all steps."""

    params: Params
    layers: list[Params] | None
    """Of each block, since unrolled ones would be sliced from their stack, and so copied, at every
    step; None if they are scanned."""
    source_mask: Bool[Array | np.ndarray, "B S"] | None


FIRST_SLOTS = {"cpu": 128}
"""The slots of a new cache by platform, 512 on others; where it is full, it gets four times as many
(on a CPU to read more takes time, and elsewhere to compile, since each size is a program)."""


class Decoding:
    """A model with its key/value cache for a batch of sequences, read incrementally.

    `most` is the most tokens that a sequence will have, by default the model's context.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int,
        source: Int[np.ndarray, "B S"] | Sequence[Sequence[int]] | None = None,
        most: int | None = None,
    ):
        context = model.config.context_length
        sources = checked_sources(model, source, batch_size)
        graphdef, self._params = split(model)
        self._programs = programs(graphdef)
        self._batch_size, self._source, source_mask = batch_size, None, None
        self._scanned = model.config.scan_layers
        self._most = _padded_length(context if most is None else most, context)
        if sources is not None:
            length = _padded_length(max(map(len, sources)), context)
            self._source, source_mask = padded(sources, length)
        self._weights = Weights(*self._programs.prepare(self._params), source_mask)
        self.reset()

    def reset(self) -> None:
        """Empty the cache, which for a recurrent model resets its state."""
        self._cache, self._slots = None, 0

    def read(
        self, rows: Sequence[Sequence[int]], starts: Int[np.ndarray, " B"] | None = None
    ) -> Float[Array, "B V"]:
        """The next-token logits after reading `rows`, each from its cache index in `starts`."""
        starts = np.zeros(len(rows), np.int32) if starts is None else starts
        first = int(starts.max())
        tokens, padding_mask = padded(rows, self._padded_length(rows, first))
        reach = first + tokens.shape[1]
        return self._run(self._programs.read, reach, tokens, padding_mask, starts)

    def start(
        self, rows: Sequence[Sequence[int]], state: State, choosing: Choosing
    ) -> tuple[State, Int[Array, "1 B"]]:
        """Read `rows` into the empty cache and choose the next tokens; the state, and these."""
        tokens, padding_mask = padded(rows, self._padded_length(rows, 0))
        state = state._replace(lengths=np.zeros(len(rows), np.int32))
        reach = tokens.shape[1]
        return self._run(self._programs.start, reach, tokens, padding_mask, state, choosing)

    def advance(
        self, reach: int, steps: int, state: State, choosing: Choosing
    ) -> tuple[State, Int[Array, "MAX_PORTION B"]]:
        """Decode up to `steps` tokens per row, fewer if all rows end; the state, and the tokens.

        At most `reach` slots of the cache are filled then. What is not decoded is -1.
        """
        return self._run(self._programs.advance, reach, np.int32(steps), state, choosing)

    def _padded_length(self, rows: Sequence[Sequence[int]], start: int) -> int:
        return _padded_length(max(map(len, rows)), self._most - start)

    def _run(self, program: Callable, reach: int, *arguments: Any) -> Any:
        """What a program returns that reads at most `reach` slots of the cache, and updates it."""
        if reach > self._slots:
            slots = max(self._slots, FIRST_SLOTS.get(jax.default_backend(), 512))
            while slots < reach:
                slots *= 4
            self._slots = min(slots, self._most)
            if self._cache is None:
                given = self._params, self._source, self._weights.source_mask
                self._cache = self._programs.empty(*given, self._batch_size, self._slots)
            else:
                self._cache = _resized(self._cache, self._slots)
        output, self._cache = program(self._weights, self._cache, *arguments)
        return output

    def reorder(self, order: Sequence[int]) -> None:
        """Reorder the cache: sequence i continues from sequence order[i]."""
        self._cache = _reordered(self._cache, np.array(order, np.int32), int(self._scanned))


def _row_seeds(seed: int | Sequence[int], rows: int) -> UInt32[np.ndarray, " B"]:
    """The seed of each row, uint32."""
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + row for row in range(rows)]
    if len(seeds) != rows:
        raise InputError(f"There are {len(seeds)} seeds and {rows} rows: each row needs one.")
    return np.array([each % 2**32 for each in seeds], np.uint32)


def _padded_length(length: int, most: int) -> int:
    """`length` rounded up to a power of two, at most `most`, so that few shapes are compiled."""
    return min(1 << (length - 1).bit_length(), most)


def checked_rows(
    model: LanguageModel, rows: Int[np.ndarray, "B T"] | Sequence[Sequence[int]], name: str
) -> list[list[int]]:
    """Rows of tokens as lists.

    Raises:
      InputError: no rows, an empty row, one longer than the context, or an unknown token.
    """
    config, lists = model.config, [[int(token) for token in row] for row in rows]
    if not lists or not all(lists):
        raise InputError(f"The {name} is empty: it needs at least one token.")
    for row in lists:
        if len(row) > config.context_length:
            raise InputError(
                f"The {name} has {len(row)} tokens; the model's context is {config.context_length}."
            )
        for token in row:
            if not 0 <= token < config.vocab_size:
                raise InputError(
                    f"The {name} has token {token}; the vocabulary has {config.vocab_size}."
                )
    return lists


def checked_sources(
    model: LanguageModel,
    source: Int[np.ndarray, "B S"] | Sequence[Sequence[int]] | None,
    rows: int,
) -> list[list[int]] | None:
    """The source tokens of each of `rows` prompts; None for a family without an encoder.

    Raises:
      InputError: a family that does not generate, not one source per prompt, or a wrong one.
    """
    family = model.config.family
    if family == "encoder":
        raise InputError("The family encoder does not generate: its attention is bidirectional.")
    if family != "encoder_decoder":
        if source is not None:
            raise InputError(f"The family {family} reads no source.")
        return None
    if source is None:
        raise InputError(f"The family {family} reads a source: it needs one for each prompt.")
    sources = checked_rows(model, source, "source")
    if len(sources) != rows:
        raise InputError(f"The source has {len(sources)} rows and the prompt {rows}.")
    return sources


def padded(
    rows: Sequence[Sequence[int]], length: int
) -> tuple[Int[np.ndarray, "B length"], Bool[np.ndarray, "B length"]]:
    """Tokens padded with zeros, and the padding mask, True at tokens."""
    tokens = np.zeros((len(rows), length), np.int32)
    padding_mask = np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        padding_mask[index, : len(row)] = True
    return tokens, padding_mask


class Programs(NamedTuple):
    """The compiled programs of models of one structure, which `Decoding` calls."""

    prepare: Callable
    """params → the params and layers of `Weights`."""
    empty: Callable
    """(params, source, source mask, rows, slots) → a cache, with what is known of the source."""
    read: Callable
    """(weights, cache, tokens [B, T], padding mask [B, T], starts [B]) → (logits [B, V], cache)."""
    start: Callable
    advance: Callable
    """(weights, cache, arguments of the method of `Decoding`) → (its output, cache)."""


@functools.cache
def programs(graphdef: nnx.GraphDef) -> Programs:
    """The compiled programs of models of one structure.

    As an argument the structure would be hashed at every step, a tenth of a GPT-2 step's time.
    """

    def prepare(params: Params) -> tuple[Params, list[Params] | None]:
        model = nnx.merge(graphdef, params)
        dtype = model.config.dtype
        if model.config.scan_layers:
            return cast(params, dtype), None
        layers = [nnx.to_pure_dict(layer) for layer in model.decoding_layers()]
        return cast(params, dtype, "table"), cast(layers, dtype)

    def empty(
        params: Params,
        source: Int[Array, "B S"] | None,
        source_mask: Bool[Array, "B S"] | None,
        rows: int,
        slots: int,
    ) -> Any:
        given = (rows,) if source is None else (source, source_mask)
        return _resized(nnx.merge(graphdef, params).empty_cache(*given), slots)

    def read(
        weights: Weights,
        cache: Any,
        tokens: Int[Array, "B T"],
        padding_mask: Bool[Array, "B T"],
        starts: Int[Array, " B"],
    ) -> tuple[Float[Array, "B V"], Any]:
        """Logits after each row's last token that is no padding, and the updated cache."""
        model = nnx.merge(graphdef, weights.params)
        sources = {} if weights.source_mask is None else {"source_mask": weights.source_mask}
        output = model.hidden(
            tokens,
            padding_mask=padding_mask,
            cache=cache,
            cache_index=starts,
            layers=weights.layers,
            **sources,
        )
        last = padding_mask.sum(axis=1)[:, None, None] - 1
        hidden = jnp.take_along_axis(output.hidden, last, axis=1)[:, 0]
        return model.unembed(model.readout(hidden)), output.cache

    def step(
        weights: Weights,
        cache: Any,
        tokens: Int[Array, "B T"],
        padding_mask: Bool[Array, "B T"],
        state: State,
        choosing: Choosing,
    ) -> tuple[State, Any]:
        """Read tokens and choose the next, each row's with its own seed."""
        logits, cache = read(weights, cache, tokens, padding_mask, state.lengths)
        occurred, filters = state.occurred, choosing.filters
        if occurred is not None and filters.penalty is not None:
            logits = penalised_logits(logits, occurred, filters.penalty)

        def choose_in_row(logits: Float[Array, " V"], seed: UInt32[Array, ""]) -> Int[Array, ""]:
            key = jax.random.fold_in(random_key(seed), state.decoded)
            return choose(logits[None], filters, key)[0]

        chosen = jax.vmap(choose_in_row)(logits, choosing.seeds)
        chosen = jnp.where(state.ended, state.tokens, chosen)
        if occurred is not None:
            occurred = occurred.at[jnp.arange(len(chosen)), chosen].set(True)
        lengths = state.lengths + padding_mask.sum(axis=1)
        ended = state.ended | choosing.is_end[chosen]
        return State(chosen, lengths, ended, occurred, state.decoded + 1), cache

    def start(weights: Weights, cache: Any, *arguments: Any) -> tuple[tuple[State, jax.Array], Any]:
        state, cache = step(weights, cache, *arguments)
        return (state, state.tokens[None]), cache

    def advance(
        weights: Weights, cache: Any, steps: Int[Array, ""], state: State, choosing: Choosing
    ) -> tuple[tuple[State, jax.Array], Any]:
        before = state.decoded

        def more(carry: tuple[State, jax.Array, Any]) -> Bool[Array, ""]:
            state = carry[0]
            return (state.decoded < before + steps) & ~state.ended.all()

        def decode(carry: tuple[State, jax.Array, Any]) -> tuple[State, jax.Array, Any]:
            state, said, cache = carry
            # An ended row reads padding, which leaves its length.
            tokens, is_token = state.tokens[:, None], ~state.ended[:, None]
            following, cache = step(weights, cache, tokens, is_token, state, choosing)
            return following, said.at[state.decoded - before].set(following.tokens), cache

        said = jnp.full((MAX_PORTION, len(state.tokens)), -1, jnp.int32)
        state, said, cache = jax.lax.while_loop(more, decode, (state, said, cache))
        return (state, said), cache

    return Programs(
        jax.jit(prepare),
        jax.jit(empty, static_argnums=(3, 4)),
        *(jax.jit(program, donate_argnums=1) for program in (read, start, advance)),
    )


KEPT = "router", "relative"
"""Layers that compute in float32 whatever the model's dtype."""


def cast(tree: Any, dtype: str, *names: str) -> Any:
    """The tree with kernels and tables, or only those of these names, in the dtype of products."""
    names = names or ("kernel", "table")

    def converted(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        keys = [getattr(entry, "key", None) for entry in path]
        return leaf.astype(dtype) if keys[-1] in names and not {*KEPT} & {*keys} else leaf

    return jax.tree_util.tree_map_with_path(converted, tree)


@functools.partial(jax.jit, static_argnums=1)
def _resized(cache: Any, slots: int) -> Any:
    """The cache with `slots` slots for each sequence; a recurrent state has none."""

    def resized(item: Any) -> Any:
        if not isinstance(item, BlockCache):
            return item
        return item._replace(kv=item.kv.resized(slots))

    return jax.tree.map(resized, cache, is_leaf=lambda item: isinstance(item, BlockCache))


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _reordered(cache: Any, order: jax.Array, axis: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.take(leaf, order, axis=axis), cache)
