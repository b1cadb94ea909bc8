import dataclasses
import functools
import gc
import importlib
import threading
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import InputError, Sampling, TransformerConfig, generate, split
from gptjax.config import MeshConfig
from gptjax.decoding.generate import Decoding, first_state
from gptjax.decoding.programs import Choosing, as_read, cast, prepared, programs
from gptjax.decoding.sampling import choose, filtered_logits, penalised_logits
from gptjax.layers.matrices import Int8Matrix
from gptjax.models.build import build, parameter_axes
from gptjax.parallel.keys import random_key
from gptjax.parallel.sharding import build_mesh, parameter_sharding

VOCABULARY, CONTEXT = 13, 12
GREEDY = Sampling(temperature=0)
CONFIG = TransformerConfig(
    vocab_size=VOCABULARY, context_length=CONTEXT, depth=2, width=16, heads=2
)

DECODERS: dict[str, dict[str, Any]] = {
    "learned": {},
    "rotary": {"position_embedding": "rotary"},
    "alibi": {"position_embedding": "alibi"},
    "relative": {"position_embedding": "relative"},
    "local": {"attention": "local", "window": 3, "position_embedding": "rotary"},
    "compressed": {"attention": "local,compressed", "window": 4},
    "gqa": {"heads": 4, "kv_heads": 2, "position_embedding": "rotary"},
    "lstm": {"family": "recurrent", "position_embedding": "none", "final_norm": False},
}
TRANSLATOR = {
    "family": "encoder_decoder",
    "position_embedding": "sinusoidal",
    "pairing": "interleaved",
    "norm_placement": "post",
    "final_norm": False,
}


@functools.cache
def model(name: str = "learned", scan_layers: bool = False) -> Any:
    """A model whose parameters are so large that every place and token counts."""
    fields = TRANSLATOR if name == "translator" else DECODERS[name]
    config = TransformerConfig(
        **{**vars(CONFIG), **fields, "scan_layers": scan_layers}  # pyright: ignore
    )
    built = build(config, rngs=nnx.Rngs(0))
    params = nnx.state(built, nnx.Param)
    nnx.update(built, jax.tree.map(lambda leaf: 6 * leaf if leaf.ndim > 1 else leaf, params))
    return built


@functools.cache
def forward(name: str) -> Any:
    """The compiled forward pass without a cache, of two sequences of the whole context."""
    graphdef, params = split(model(name))
    return functools.partial(
        jax.jit(lambda params, tokens, **how: nnx.merge(graphdef, params)(tokens, **how)), params
    )


def logits_alone(name: str, row: list[int], **how) -> np.ndarray:
    """The logits after `row`, from a forward pass over it and what does not matter."""
    tokens = np.zeros((2, CONTEXT), np.int32)
    tokens[0, : len(row)] = row
    how = {key: np.repeat(value, 2, axis=0) for key, value in how.items()}
    return np.asarray(forward(name)(tokens, **how)[0, len(row) - 1])


def tokens_of(prompt, max_new_tokens=5, name="learned", **how) -> np.ndarray:
    rows = generate(model(name), prompt, max_new_tokens=max_new_tokens, **how)
    return np.stack(list(rows), axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_cached_decoding_equals_the_full_forward_at_every_position(name, scan_layers):
    """Read four tokens at a time; one at a time is read below."""
    tokens = jax.random.randint(jax.random.key(0), (2, CONTEXT), 0, VOCABULARY)
    graphdef, params = split(model(name, scan_layers))

    @jax.jit
    def read(tokens, cache, start):
        decoder = nnx.merge(graphdef, params)
        output = decoder.hidden(tokens, cache=cache, cache_index=start)
        return decoder.unembed(decoder.readout(output.hidden)), output.cache

    cache, pieces = model(name, scan_layers).empty_cache(2), []
    for start in range(0, CONTEXT, 4):
        piece, cache = read(tokens[:, start : start + 4], cache, start)
        pieces.append(piece)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), forward(name)(tokens), atol=2e-5)


@pytest.mark.slow
def test_decoding_past_the_first_slots_of_a_long_context():
    """A cache of 128 slots grows to 512, with what it holds."""
    fields = {**vars(CONFIG), "context_length": 1100, "position_embedding": "alibi"}
    long = build(TransformerConfig(**fields), rngs=nnx.Rngs(0))
    rows = np.random.default_rng(0).integers(VOCABULARY, size=(2, 140))
    rows[:, 120:] = np.stack(
        list(generate(long, rows[:, :120], max_new_tokens=20, sampling=GREEDY)), axis=1
    )
    full = np.asarray(long(rows))
    best = full[:, 119:-1].max(axis=-1)
    chosen = np.take_along_axis(full[:, 119:-1], rows[:, 120:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(chosen, best, atol=2e-5)
    decoding = Decoding(long, 2)
    for place, after in ((0, 126), (126, 127), (127, 128), (128, 129), (129, 140)):
        logits = decoding.read(rows[:, place:after].tolist(), np.full(2, place, np.int32))
        np.testing.assert_allclose(logits, full[:, after - 1], atol=2e-5)


def test_what_is_cast_once_is_what_the_products_read():
    """The parameters of decoding, in bfloat16, give the bits that the model's own give."""
    fields = {"position_embedding": "relative", "num_experts": 2, "qk_norm": True, "depth": 1}
    config = TransformerConfig(**{**vars(CONFIG), **fields, "dtype": "bfloat16"})
    graphdef, params = split(build(config, rngs=nnx.Rngs(0)))
    logits = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    tokens, halved = np.arange(8)[None], cast(params, "bfloat16")
    assert halved["embedding"]["table"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(logits(halved, tokens), logits(params, tokens))


PROMPTS = [[1, 2, 3, 12, 5], [7], [4, 4, 0]]


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_prompts_of_different_lengths_are_read_as_each_alone(name, scan_layers):
    decoding = Decoding(model(name, scan_layers), len(PROMPTS))
    rows, unread, starts = PROMPTS, PROMPTS, np.zeros(len(PROMPTS), np.int32)
    for _ in range(CONTEXT - 5 + 1):
        logits = np.asarray(decoding.read(unread, starts))
        alone = [logits_alone(name, row) for row in rows]
        np.testing.assert_allclose(logits, alone, atol=2e-5)
        starts = np.array([len(row) for row in rows], np.int32)
        unread = [[int(token)] for token in logits.argmax(axis=1)]
        rows = [row + new for row, new in zip(rows, unread, strict=True)]


@pytest.mark.parametrize("name", ["learned", "gqa", "lstm"])
def test_prompts_of_different_lengths_decode_as_each_alone(name):
    batch = tokens_of(PROMPTS, sampling=GREEDY, name=name)
    alone = [tokens_of([prompt], sampling=GREEDY, name=name)[0] for prompt in PROMPTS]
    np.testing.assert_array_equal(batch, alone)


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [False, True])
def test_sources_of_different_lengths_are_translated_as_each_alone(scan_layers):
    sources = [[3, 1], [2, 9, 9, 4, 12], [6]]
    decoding = Decoding(model("translator", scan_layers), len(sources), sources)
    rows, unread, starts = PROMPTS, PROMPTS, np.zeros(len(sources), np.int32)
    for _ in range(3):
        logits = np.asarray(decoding.read(unread, starts))
        for row, source, got in zip(rows, sources, logits, strict=True):
            alone = logits_alone("translator", row, source=np.array([source]))
            np.testing.assert_allclose(got, alone, atol=2e-5)
        starts = np.array([len(row) for row in rows], np.int32)
        unread = [[int(token)] for token in logits.argmax(axis=1)]
        rows = [row + new for row, new in zip(rows, unread, strict=True)]
    batch = tokens_of(PROMPTS, sampling=GREEDY, name="translator", source=sources)
    for row, prompt, source in zip(batch, PROMPTS, sources, strict=True):
        alone = tokens_of([prompt], sampling=GREEDY, name="translator", source=[source])
        np.testing.assert_array_equal(row, alone[0])


def steps_compiled() -> int:
    return sum(p._cache_size() for p in programs(split(model())[0])[2:])


def test_one_step_is_compiled_whatever_the_length():
    before = steps_compiled()
    for length in range(1, CONTEXT + 1):
        tokens_of([[1] * length] * 7, CONTEXT, sampling=GREEDY)
    # Prompts of 1, 2, 3–4, 5–8 and 9–12 tokens, and the loop.
    assert steps_compiled() == before + 6


def test_two_programs_are_compiled_at_once_and_each_once():
    """The loop while prompts are read: half of the first call's time on a GPU is compilation."""
    compiled = []

    def note(event: str, duration_secs: float, **of: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append((of["fun_name"], threading.current_thread()))

    odd = dataclasses.replace(CONFIG, width=10)  # No other test's, whose programs are compiled.
    decoder = build(odd, rngs=nnx.Rngs(0))
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        list(generate(decoder, [[1]], max_new_tokens=1, sampling=GREEDY))
        assert "jit(advance)" not in dict(compiled)  # Nothing is to follow.
        for _ in range(2):
            list(generate(decoder, [[1, 2]], max_new_tokens=4, sampling=GREEDY))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    by = dict(compiled)
    names = [name for name, _ in compiled if name in ("jit(start)", "jit(advance)")]
    assert sorted(names) == ["jit(advance)", "jit(start)", "jit(start)"]  # Of one token, of two.
    assert by["jit(start)"] is threading.main_thread()
    assert by["jit(advance)"] is not threading.main_thread()


def test_a_context_of_one_token_slides():
    single = build(TransformerConfig(**{**vars(CONFIG), "context_length": 1}), rngs=nnx.Rngs(0))
    steps = generate(single, [[3]], max_new_tokens=4, sampling=GREEDY, sliding_window=True)
    row = [3, *(int(step[0]) for step in steps)]
    assert row[1:] == [int(single(np.array([[token]]))[0, -1].argmax()) for token in row[:-1]]


def test_a_later_decoding_of_the_model_compiles_nothing():
    tokens_of([[1, 2]], sampling=Sampling(0.9, top_p=0.9))
    before = steps_compiled()
    tokens_of([[3, 4]], sampling=Sampling(0.7, top_p=0.8), end_token=5, seed=3)
    assert steps_compiled() == before


@pytest.mark.parametrize("name", ["learned", "scanned", "lstm", "translator"])
def test_int8_weights_decode_as_the_same_weights_in_float(name):
    source = [[3, 1], [2, 9, 9, 4, 12], [6]] if name == "translator" else None
    built = model("learned", True) if name == "scanned" else model(name)
    graphdef, params = split(built)

    def back(path, leaf: jax.Array, matrix: Any) -> jax.Array:
        if not isinstance(matrix, Int8Matrix):
            return leaf
        rounded = matrix.values * matrix.scale[..., None]
        kernel = path[-1].key == "kernel"
        return (rounded.swapaxes(-1, -2) if kernel else rounded).reshape(leaf.shape)

    rounded = jax.tree_util.tree_map_with_path(back, params, as_read(built, params, "int8"))
    logits = Decoding(built, 3, source, weights="int8").read(PROMPTS)
    in_float = Decoding(nnx.merge(graphdef, rounded), 3, source).read(PROMPTS)
    np.testing.assert_allclose(logits, in_float, atol=1e-3 * np.abs(in_float).max())
    assert not np.allclose(logits, Decoding(built, 3, source).read(PROMPTS), rtol=1e-3)


def test_parameters_are_prepared_once_and_again_when_they_change():
    built = build(CONFIG, rngs=nnx.Rngs(0))
    before = np.asarray(Decoding(built, 1).read([[1]]))
    graphdef, params = split(built)
    assert prepared(graphdef, params, "dtype") is prepared(graphdef, params, "dtype")
    nnx.update(built, jax.tree.map(lambda leaf: 2 * leaf, nnx.state(built, nnx.Param)))
    after = np.asarray(Decoding(built, 1).read([[1]]))
    np.testing.assert_allclose(after[0], built(np.array([[1]]))[0, 0], atol=2e-5)
    assert not np.allclose(before, after)
    (layer, _) = prepared(*split(built), "dtype")[1] or []
    kept = weakref.ref(layer["mlp"]["up"]["kernel"].values)
    assert kept() is not None
    del built, params, layer
    gc.collect()
    assert kept() is None


def test_int8_weights_are_for_one_device():
    with (
        jax.set_mesh(build_mesh(MeshConfig(data=4, tensor=2), 8)),
        pytest.raises(
            InputError, match="weights is 'int8': it is for one device, and the mesh has 8"
        ),
    ):
        tokens_of([[1, 2]], weights="int8")


def one_by_one(name, prompts, count, sampling, seeds, ends) -> np.ndarray:
    """What `generate` promises, a token per dispatch: read, penalise, choose by the row's key."""
    decoding, filters = Decoding(model(name), len(prompts)), sampling.filters()
    rows, unread, starts, steps = [list(row) for row in prompts], prompts, None, []
    ended = np.zeros(len(prompts), bool)
    for index in range(count):
        logits = decoding.read(unread, starts)
        occurred = np.array([np.isin(np.arange(VOCABULARY), row) for row in rows])
        logits = penalised_logits(logits, jnp.array(occurred), sampling.repetition_penalty)
        keys = [jax.random.fold_in(random_key(seed), index) for seed in seeds]
        chosen = [choose(logits[row : row + 1], filters, key)[0] for row, key in enumerate(keys)]
        steps.append(np.where(ended, steps[-1] if steps else 0, chosen))
        ended |= np.isin(steps[-1], ends)
        if ended.all():
            break
        starts = np.array([len(row) for row in rows], np.int32)
        unread = steps[-1][:, None].tolist()
        rows = [[*row, *new] for row, new in zip(rows, unread, strict=True)]
    return np.stack(steps, axis=1)


@pytest.mark.parametrize("seconds", [0.0, 1e9])
@pytest.mark.parametrize(
    ("sampling", "ends"),
    [
        (Sampling(1.3, top_k=7, top_p=0.9, min_p=0.01, repetition_penalty=1.2), [4, 9]),
        (Sampling(temperature=0.8), []),
    ],
)
def test_portions_hold_the_tokens_of_single_steps(monkeypatch, seconds, sampling, ends):
    """However many tokens a dispatch decodes: one, or as many as it may."""
    monkeypatch.setattr(
        importlib.import_module("gptjax.decoding.generate"), "PORTION_SECONDS", seconds
    )
    for seed in range(3):
        expected = one_by_one("learned", PROMPTS, 8, sampling, range(seed, seed + 3), ends)
        got = tokens_of(PROMPTS, 8, sampling=sampling, seed=seed, end_token=ends)
        np.testing.assert_array_equal(got, expected)


def test_the_device_stops_when_every_row_has_ended():
    free = tokens_of([[1, 2, 3]], 9, sampling=GREEDY)[0]
    assert free[2] not in free[:2]
    decoding, filters = Decoding(model(), 1), GREEDY.filters()
    is_end = jnp.arange(VOCABULARY) == free[2]
    how = Choosing(filters, jnp.zeros(1, jnp.uint32), is_end)
    state, said = decoding.start([[1, 2, 3]], first_state([[1, 2, 3]], VOCABULARY, filters), how)
    np.testing.assert_array_equal(said, free[None, :1].T)
    state, said = decoding.advance(3 + 8, 8, state, how)
    np.testing.assert_array_equal(said[:3, 0], [*free[1:3], -1])
    assert int(state.decoded) == 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_a_model_on_a_mesh_decodes_as_on_one_device(family):
    fields = {"family": family, "vocab_size": 16, "context_length": 16}
    built = build(TransformerConfig(**{**vars(CONFIG), **fields}), rngs=nnx.Rngs(0))
    source = {"source": [[1, 2], [3, 4, 5]] * 4} if family == "encoder_decoder" else {}
    how = {"max_new_tokens": 6, "sampling": Sampling(0.7, top_k=9), "seed": 1, **source}
    prompts = [[1, 2, 3], [4]] * 4
    expected = np.stack(list(generate(built, prompts, **how)))
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2), 8)
    graphdef, params = split(built)
    placed = jax.tree.map(
        lambda leaf, axes: jax.device_put(leaf, parameter_sharding("", axes, leaf.shape, mesh)),
        params,
        parameter_axes(built.config),
    )
    with jax.set_mesh(mesh):
        got = np.stack(list(generate(nnx.merge(graphdef, placed), prompts, **how)))
    np.testing.assert_array_equal(got, expected)


def test_greedy_takes_the_most_likely_token_of_the_full_forward():
    row = [1, 2, 3]
    for chosen in tokens_of([row], sampling=GREEDY)[0]:
        assert chosen == logits_alone("learned", row).argmax()
        row.append(int(chosen))


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [None, Sampling(0.9, top_k=7, repetition_penalty=1.2)])
@pytest.mark.parametrize("name", ["learned", "lstm"])
def test_a_row_is_sampled_as_it_would_be_alone(name, sampling):
    """Of a seed for all, row i has the one i further on; seeds are counted modulo 2**32."""
    seeds = [2**32 - 1, 5, 0]
    how = {"sampling": sampling, "name": name}
    alone = [
        tokens_of([prompt], seed=seed, **how)[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    np.testing.assert_array_equal(tokens_of(PROMPTS, seed=seeds, **how), alone)
    first, last = (tokens_of(PROMPTS, seed=seed, **how) for seed in (3, 2**32 - 3))
    np.testing.assert_array_equal(first, tokens_of(PROMPTS, seed=[3, 4, 5], **how))
    np.testing.assert_array_equal(last[2:], tokens_of(PROMPTS[2:], seed=-1, **how))


def test_there_are_as_many_seeds_as_rows():
    with pytest.raises(InputError, match="There are 2 seeds and 3 rows: each row needs one"):
        tokens_of(PROMPTS, seed=[1, 2])


def test_the_seed_decides():
    def sampled(seed):
        return tokens_of([[1, 2]] * 4, 8, seed=seed)

    np.testing.assert_array_equal(sampled(0), sampled(0))
    assert not np.array_equal(sampled(0), sampled(1))
    assert len({tuple(row) for row in sampled(0)}) == 4


def test_decoding_stops_when_every_row_has_ended():
    prompts = [[1, 2, 3], [7, 0, 4]]
    free = tokens_of(prompts, 9, sampling=GREEDY)
    end = int(free[0, 2])
    ends = [int(np.flatnonzero(row == end)[0]) if end in row else 9 for row in free]
    stopped = tokens_of(prompts, 9, sampling=GREEDY, end_token=end)
    assert stopped.shape[1] == min(max(ends) + 1, 9)
    for row, before, place in zip(stopped, free, ends, strict=True):
        np.testing.assert_array_equal(row[:place], before[:place])
        assert (row[place:] == end).all()


def test_a_row_that_has_ended_neither_stops_nor_cuts_the_others():
    prompts = [[7, 0, 4, 1, 2, 3, 1, 1], [1, 2, 3]]
    free = tokens_of(prompts[:1], 1, sampling=GREEDY)
    end = int(free[0, 0])
    for sliding_window in (False, True):
        how = {"sampling": GREEDY, "end_token": end, "sliding_window": sliding_window}
        alone = tokens_of(prompts[1:], 15, **how)
        batch = tokens_of(prompts, 15, **how)
        assert (batch[0] == end).all()
        assert alone.shape[1] > CONTEXT - 8
        np.testing.assert_array_equal(batch[1:], alone)


def test_a_sliding_window_cuts_each_row_when_that_is_full():
    prompts = [[7, 0, 4, 1, 2, 3, 1, 1], [1, 2, 3]]
    how = {"sampling": GREEDY, "sliding_window": True}
    alone = [tokens_of([prompt], 15, **how)[0] for prompt in prompts]
    np.testing.assert_array_equal(tokens_of(prompts, 15, **how), alone)


def test_decoding_stops_at_the_end_of_the_context():
    # Three tokens of prompt; the last token that fits is read to choose one more.
    assert tokens_of([[1, 2, 3], [4]], 50).shape == (2, CONTEXT - 3 + 1)


@pytest.mark.parametrize("name", ["learned", "lstm"])
def test_a_sliding_window_goes_on_from_the_second_half(name):
    how = {"sampling": GREEDY, "sliding_window": True, "name": name}
    continued = tokens_of([[1, 2, 3]], 15, **how)[0]
    full = [1, 2, 3, *continued.tolist()]
    after_cut = CONTEXT + 1
    for place in range(after_cut, 3 + len(continued)):
        window = full[after_cut - CONTEXT // 2 : place]
        assert full[place] == logits_alone(name, window).argmax()
    assert len(continued) == 15


def test_top_k_keeps_the_k_most_likely():
    logits = jnp.array([[0.1, 3.0, 2.0, -1.0, 2.5]])
    kept = np.isfinite(filtered_logits(logits, Sampling(top_k=3).filters()))
    np.testing.assert_array_equal(kept, [[False, True, True, False, True]])


def test_top_p_keeps_the_fewest_that_reach_p():
    probability = np.array([[0.5, 0.05, 0.3, 0.15]])
    for top_p, expected in ((0.4, [1, 0, 0, 0]), (0.6, [1, 0, 1, 0]), (0.9, [1, 0, 1, 1])):
        kept = np.isfinite(filtered_logits(jnp.log(probability), Sampling(top_p=top_p).filters()))
        np.testing.assert_array_equal(kept[0], np.array(expected, bool))


def test_min_p_keeps_what_is_likely_enough_beside_the_most_likely():
    probability = np.array([[0.5, 0.05, 0.3, 0.15]])
    for min_p, expected in ((0.05, [1, 1, 1, 1]), (0.2, [1, 0, 1, 1]), (0.7, [1, 0, 0, 0])):
        kept = np.isfinite(filtered_logits(jnp.log(probability), Sampling(min_p=min_p).filters()))
        np.testing.assert_array_equal(kept[0], np.array(expected, bool))


def test_the_temperature_acts_before_what_leaves_tokens_out():
    # At temperature 2 the probabilities go as their roots: 0.45, 0.35, 0.20.
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.1]]))
    kept = np.isfinite(filtered_logits(logits, Sampling(temperature=2.0, min_p=0.4).filters()))
    np.testing.assert_array_equal(kept, [[True, True, True]])
    kept = np.isfinite(filtered_logits(logits, Sampling(temperature=0.5, min_p=0.4).filters()))
    np.testing.assert_array_equal(kept, [[True, False, False]])


def test_the_repetition_penalty_is_ctrls():
    logits = np.array([[2.0, -2.0, 3.0, -3.0]])
    occurred = np.array([[True, True, False, False]])
    penalised = penalised_logits(jnp.array(logits), jnp.array(occurred), 1.6)
    np.testing.assert_allclose(penalised, [[2.0 / 1.6, -2.0 * 1.6, 3.0, -3.0]], rtol=1e-6)


def test_the_penalty_falls_on_the_prompt_and_on_what_was_said():
    row, penalty = [1, 2, 3], 1.7
    sampling = Sampling(temperature=0, repetition_penalty=penalty)
    batch = tokens_of([row, [5]], 7, sampling=sampling)
    for chosen in batch[0]:
        logits = logits_alone("learned", row)
        for token in set(row):
            logits = logits.copy()
            logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        assert chosen == logits.argmax()
        row.append(int(chosen))
    assert not np.array_equal(batch[:1], tokens_of([[1, 2, 3]], 7, sampling=GREEDY))


EXTREMES: dict[str, dict[str, Any]] = {
    f"{name}={value}": {name: value}
    for name, values in {
        "temperature": (1e-30, 1e-38, 1e-42, 1e-50),
        "top_p": (1e-30, 1e-40, 1e-50),
        "min_p": (1.0, 1 - 1e-12),
    }.items()
    for value in values
}


@pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES)
def test_what_leaves_one_token_leaves_the_likeliest(extreme):
    """However near to what float32 takes for 0 or 1, and whatever else is asked."""
    logits = jnp.array([[1.0, 5.0, 3.0, -2.0], [-1e30, -1e9, -1.0, -2.0]])
    for more in ({}, {"temperature": 1e-38}, {"top_k": 3, "top_p": 0.9, "min_p": 1e-50}):
        sampling = Sampling(**{**more, **extreme})
        chosen = jax.jit(choose)(logits, sampling.filters(), jax.random.key(0))
        np.testing.assert_array_equal(chosen, [1, 2])


def test_extremes_that_ask_for_nothing_leave_all():
    logits = jnp.array([[1.0, 5.0, 3.0, -2.0]])
    for nothing in (Sampling(min_p=1e-50), Sampling(top_p=1 - 1e-12), Sampling(top_k=10**30)):
        np.testing.assert_array_equal(filtered_logits(logits, nothing.filters()), logits - 5)
    hottest = filtered_logits(logits, Sampling(temperature=1e300).filters())
    np.testing.assert_array_equal(hottest, jnp.zeros((1, 4)))


CHI_SQUARE_999 = {3: 16.27, 12: 32.91}
"""The 99.9th percentile by degrees of freedom."""


def assert_frequencies(chosen: np.ndarray, probability: np.ndarray) -> None:
    possible = probability > 0
    expected = probability[possible] * len(chosen)
    counts = np.bincount(chosen, minlength=len(probability))
    assert counts[~possible].sum() == 0
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum()
    assert chi_square < CHI_SQUARE_999[possible.sum() - 1]


def test_sampling_follows_the_softmax():
    logits, draws = jnp.array([0.0, 1.0, 2.0, -1.0]), 20_000
    for temperature in (0.7, 1.0, 1.5):
        sampling = Sampling(temperature=temperature)
        chosen = choose(jnp.tile(logits, (draws, 1)), sampling.filters(), jax.random.key(0))
        assert_frequencies(np.asarray(chosen), np.asarray(jax.nn.softmax(logits / temperature)))


def test_what_is_left_keeps_its_proportions():
    probability, draws = np.array([0.4, 0.04, 0.3, 0.1, 0.16]), 20_000
    for sampling in (Sampling(top_k=4), Sampling(top_p=0.9), Sampling(min_p=0.2)):
        logits = jnp.tile(jnp.log(probability), (draws, 1))
        chosen = choose(logits, sampling.filters(), jax.random.key(1))
        left = np.where(probability > 0.05, probability, 0)
        assert_frequencies(np.asarray(chosen), left / left.sum())


def test_generated_tokens_follow_the_models_softmax():
    prompt, draws = [3, 1, 4], 4096
    first = tokens_of([prompt] * draws, 1, seed=5)[:, 0]
    logits = logits_alone("learned", prompt)
    assert_frequencies(first, np.asarray(jax.nn.softmax(logits)))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "The prompt is empty"),
        ([[]], "The prompt is empty"),
        ([[1], []], "The prompt is empty"),
        ([[1] * 13], "The prompt has 13 tokens; the model's context is 12"),
        ([[1, 13]], "The prompt has token 13; the vocabulary has 13"),
        ([[-1, 2]], "The prompt has token -1; the vocabulary has 13"),
    ],
)
def test_bad_prompts_are_refused(prompt, message):
    with pytest.raises(InputError, match=message):
        tokens_of(prompt)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([[]], "The source is empty"),
        ([[1] * 13], "The source has 13 tokens; the model's context is 12"),
        ([[1, 13]], "The source has token 13; the vocabulary has 13"),
        ([[1], [2]], "The source has 2 rows and the prompt 1"),
        (None, "The family encoder_decoder reads a source: it needs one for each prompt"),
    ],
)
def test_bad_sources_are_refused(source, message):
    with pytest.raises(InputError, match=message):
        tokens_of([[1]], name="translator", source=source)


def test_a_source_for_a_model_that_reads_none_is_refused():
    with pytest.raises(InputError, match="The family decoder reads no source"):
        tokens_of([[1]], source=[[1]])


def test_an_encoder_does_not_generate():
    encoder = build(TransformerConfig(**{**vars(CONFIG), "family": "encoder"}), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="The family encoder does not generate"):
        next(generate(encoder, [[1]], max_new_tokens=1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"min_p": 1.5}, "min-p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition-penalty is 0.0"),
        ({"repetition_penalty": 1e-38}, "repetition-penalty is 1e-38: it must be at least 1e-06"),
        ({"repetition_penalty": float("inf")}, "repetition-penalty is inf"),
        ({"repetition_penalty": float("nan")}, "repetition-penalty is nan"),
    ],
)
def test_bad_sampling_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Sampling(**values)
