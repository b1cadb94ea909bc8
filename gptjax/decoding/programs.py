"""The compiled programs of decoding: reading prompts, and a loop on the device over new tokens."""

import contextlib
import functools
import math
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from gptjax.config import InputError
from gptjax.config.values import DecodingWeights, exhaustive
from gptjax.decoding.sampling import Filters, choose, penalised_logits
from gptjax.layers.block import BlockCache
from gptjax.layers.linear import Linear
from gptjax.layers.matrices import Int8Matrix, Matrix
from gptjax.models.build import LanguageModel, Params
from gptjax.parallel.keys import random_key
from gptjax.parallel.sharding import auto_mesh

MAX_PORTION = 64
"""The most tokens per row in one dispatch."""


class Choosing(NamedTuple):
    """How the tokens of all steps are chosen."""

    filters: Filters
    seeds: UInt32[Array, " B"]
    is_end: Bool[Array, " V"]
    """Whether a token ends its row."""


class State(NamedTuple):
    """What a step of decoding hands to the next, besides the cache."""

    tokens: Int[Array, " B"]
    """The last token of each row, which is not yet in the cache."""
    lengths: Int[Array, " B"]
    """How many tokens of each row are in the cache."""
    ended: Bool[Array, " B"]
    occurred: Bool[Array, "B V"] | None
    """Which tokens occurred in each row; None without a repetition penalty."""
    decoded: Int[Array, ""]
    """How many tokens were decoded of each row."""


class Weights(NamedTuple):
    """The parameters in the form that decoding reads, and what else is the same in all steps."""

    params: Params
    layers: list[Params] | None
    """Of each block, since unrolled ones would be sliced from their stack, and so copied, at every
    step; None if they are scanned."""
    source_mask: Bool[Array, "B S"] | None


class Programs(NamedTuple):
    """The compiled programs of models of one structure, which `Decoding` calls."""

    prepare: Any
    """(params, a name of `WEIGHTS`) → the params and layers of `Weights`."""
    empty: Any
    """(params, source, source mask, rows, slots) → a cache, with what is known of the source."""
    read: Any
    """(weights, cache, tokens [B, T], padding mask [B, T], starts [B]) → (logits [B, V], cache)."""
    start: Any
    advance: Any
    """(weights, cache, arguments of the method of `Decoding`) → (its output, cache)."""


@functools.cache
def programs(graphdef: nnx.GraphDef) -> Programs:
    """The compiled programs of models of one structure.

    As an argument the structure would be hashed at every step, a tenth of a GPT-2 step's time.
    """

    def prepare(params: Params, weights: DecodingWeights) -> tuple[Params, list[Params] | None]:
        model = nnx.merge(graphdef, params)
        dtype = model.config.dtype
        params = as_read(model, params, weights)
        if model.config.scan_layers:
            return cast(params, dtype), None
        layers = nnx.merge(graphdef, params).decoding_layers()
        return cast(params, dtype, "table"), cast(list(map(nnx.to_pure_dict, layers)), dtype)

    def empty(
        params: Params,
        source: Int[Array, "B S"] | None,
        source_mask: Bool[Array, "B S"] | None,
        rows: int,
        slots: int,
    ) -> Any:
        given = (rows,) if source is None else (source, source_mask)
        return resized(nnx.merge(graphdef, params).empty_cache(*given), slots)

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
        lengths = state.lengths + padding_mask.sum(axis=1, dtype=jnp.int32)
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
            state, new_tokens, cache = carry
            # An ended row reads padding, which leaves its length.
            tokens, is_token = state.tokens[:, None], ~state.ended[:, None]
            following, cache = step(weights, cache, tokens, is_token, state, choosing)
            return following, new_tokens.at[state.decoded - before].set(following.tokens), cache

        new_tokens = jnp.full((MAX_PORTION, len(state.tokens)), -1, jnp.int32)
        state, new_tokens, cache = jax.lax.while_loop(more, decode, (state, new_tokens, cache))
        return (state, new_tokens), cache

    return Programs(
        jax.jit(prepare, static_argnums=1),
        jax.jit(empty, static_argnums=(3, 4)),
        *(jax.jit(program, donate_argnums=1) for program in (read, start, advance)),
    )


_COMPILED: set[Any] = set()
"""The programs that `compiling` has compiled, with the structure and shapes of their arguments."""


@contextlib.contextmanager
def compiling(program: Any, *arguments: Any) -> Iterator[None]:
    """Compile a program for such arguments in a thread of its own while the body runs.

    Its first call after that finds it compiled.
    """
    leaves, structure = jax.tree.flatten(arguments)
    key = program, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    if key in _COMPILED:
        yield
        return
    _COMPILED.add(key)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(program.lower(*arguments).compile)
        yield


_LATEST: dict[Any, tuple[list[weakref.ref], Any]] = {}
"""The parameters that were prepared last, and references to what they were prepared from."""


def prepared(
    graphdef: nnx.GraphDef, params: Params, weights: DecodingWeights
) -> tuple[Params, list[Params] | None]:
    """The params and layers of `Weights`.

    Those prepared last are kept while the model's own parameters live, so that decoding again takes
    no time for them: for GPT-2 on a CPU that of 40 tokens.
    """
    leaves, key = jax.tree.leaves(params), (graphdef, weights, jax.sharding.get_abstract_mesh())
    sources, found = _LATEST.get(key, ([], None))
    if len(sources) == len(leaves) and all(
        source() is leaf for source, leaf in zip(sources, leaves, strict=True)
    ):
        return found
    _LATEST.clear()  # Before the next ones are made, so that both are never in memory.
    found = programs(graphdef).prepare(params, weights)
    _LATEST[key] = [weakref.ref(leaf, lambda _: _LATEST.clear()) for leaf in leaves], found
    return found


WEIGHTS = exhaustive(DecodingWeights, {"dtype": Matrix, "int8": Int8Matrix})
"""What linear layers read in place of their kernels."""


def as_read(model: LanguageModel, params: Params, weights: DecodingWeights) -> Params:
    """The parameters with the matrices of linear layers, and in int8 the head, as they are read.

    A mixture's experts, embeddings that are only indexed, and on a mesh all stay as they are.

    Raises:
      InputError: int8 on a mesh, whose devices would share a matrix.
    """
    if (mesh := auto_mesh()) is not None:
        if weights == "dtype":
            return params
        raise InputError(
            f"weights is {weights!r}: it is for one device, and the mesh has {mesh.size}."
        )
    params = jax.tree.map(lambda leaf: leaf, params)
    if weights != "dtype":
        head = params["embedding" if model.config.tie_embeddings else "head"]
        head["table"] = WEIGHTS[weights].of(head["table"])
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear) and not {*KEPT} & {*path}:
            layer: Any = params
            for name in path:
                layer = layer[name]
            stacked = layer["kernel"].ndim - len(module.inputs) - len(module.outputs)
            shape = *layer["kernel"].shape[:stacked], math.prod(module.inputs), -1
            matrix = layer["kernel"].reshape(shape).swapaxes(-1, -2)
            layer["kernel"] = WEIGHTS[weights].of(matrix)
    return params


KEPT = "router", "relative"
"""Layers that compute in float32 whatever the model's dtype."""


def cast(tree: Any, dtype: str, *names: str) -> Any:
    """The tree with kernels and tables, or only those of these names, in the dtype of products."""

    def converted(path: tuple[Any, ...], leaf: Any) -> Any:
        keys = {getattr(entry, "key", None) for entry in path}
        if isinstance(leaf, Int8Matrix) or keys & {*KEPT} or not keys & {*names}:
            return leaf
        return leaf.astype(dtype)

    names = names or ("kernel", "table")
    return jax.tree_util.tree_map_with_path(
        converted, tree, is_leaf=lambda leaf: isinstance(leaf, Int8Matrix)
    )


@functools.partial(jax.jit, static_argnums=1)
def resized(cache: Any, slots: int) -> Any:
    """The cache with `slots` slots for each sequence; a recurrent state has none."""

    def resized(item: Any) -> Any:
        if not isinstance(item, BlockCache):
            return item
        return item._replace(kv=item.kv.resized(slots))

    return jax.tree.map(resized, cache, is_leaf=lambda item: isinstance(item, BlockCache))


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def reordered(cache: Any, order: Int[Array, " B"], axis: int) -> Any:
    """The cache with sequence order[i] in the place of sequence i; `axis` is that of B."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, order, axis=axis), cache)
