"""muP: what changes with the width is the width, not how far a step goes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gptjax import (
    ExperimentConfig,
    InputError,
    OptimizerConfig,
    TrainConfig,
    TransformerConfig,
    build,
    split,
)
from gptjax.data.batch import Batch
from gptjax.data.pipeline import made_batches
from gptjax.decoding.generate import Decoding
from gptjax.models.presets import PRESETS
from gptjax.runs.directory import load_config
from gptjax.runs.ensembles import train_ensemble
from gptjax.runs.loading import load_model
from gptjax.runs.mup import factors, scaled
from gptjax.runs.trial import train
from gptjax.training.leaves import leaf_names
from gptjax.training.losses import token_loss
from gptjax.training.optimizers import build_optimizer

NARROW = TransformerConfig(vocab_size=32, context_length=16, depth=2, width=32, heads=2)
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2-style": {},
    "llama-style": {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "position_embedding": "rotary",
        "heads": 4,
        "kv_heads": 2,
        "bias": False,
        "tie_embeddings": False,
    },
    "post-norm": {"norm_placement": "post", "final_norm": False},
    "moe": {"num_experts": 4, "activation": "swiglu"},
    "lstm": {"family": "recurrent", "position_embedding": "none"},
    "scaled-embedding": {"embedding_scaled": True, "position_embedding": "sinusoidal"},
    "qk-norm": {"qk_norm": True},
    "unscaled-attention": {"attention_scaled": False},
}
TOKENS = np.random.default_rng(0).integers(NARROW.vocab_size, size=(4, NARROW.context_length + 1))
WIDTHS = (32, 128)
SEEDS, STEPS, RATE = 4, 5, 1e-2


def family(name: str, width: int = NARROW.width, **fields: Any) -> TransformerConfig:
    return dataclasses.replace(NARROW, **FAMILIES[name], width=width, **fields)


@functools.cache
def moved(config: TransformerConfig, base: TransformerConfig | None) -> dict[str, float]:
    """How far steps of AdamW on one batch move each activation, a coordinate on average."""
    by_width = base and factors(config, base)
    config = scaled(config, base) if base else config
    graphdef, _ = split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
    steady = OptimizerConfig(learning_rate=RATE, warmup_steps=0, schedule="constant")
    optimizer = build_optimizer(steady, STEPS + 1, rate_factors=by_width and by_width.rate)
    places = ("residual",) if config.family == "recurrent" else ("residual", "scores")

    def loss(params):
        model = nnx.merge(graphdef, params)
        output = model.hidden(TOKENS[:, :-1], capture=places)
        logits = model.unembed(model.readout(output.hidden))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:])
        return losses.mean(), {name: x[-1] for name, x in output.captured.items()} | {
            "logits": logits
        }

    @jax.jit
    @jax.vmap
    def step(params, state):
        gradients, seen = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, seen

    def drawn(seed: int):
        params = split(build(config, rngs=nnx.Rngs(seed)))[1]
        return by_width.scale_initial(params) if by_width else params

    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(drawn, range(SEEDS)))
    state, seen = jax.vmap(optimizer.init)(params), []
    for _ in range(STEPS + 1):
        params, state, of_step = step(params, state)
        seen.append(of_step)
    changes = {name: np.abs(np.asarray(seen[-1][name] - seen[0][name])) for name in seen[0]}
    if "scores" in changes:
        changes["scores"] = changes["scores"][..., np.tri(NARROW.context_length, dtype=bool)]
    return {name: float(change.mean()) for name, change in changes.items()}


def slopes(name: str, *, mup: bool) -> dict[str, float]:
    """The exponents of the width with which the changes of each activation grow."""
    base = family(name)
    wide = [family(name, width) for width in WIDTHS]
    changes = [moved(config, base if mup else None) for config in wide]
    return {
        place: float(np.polyfit(np.log(WIDTHS), np.log([each[place] for each in changes]), 1)[0])
        for place in changes[0]
    }


def check_coordinates(name: str) -> None:
    """Under muP nothing moves farther in a wider model."""
    for place, slope in slopes(name, mup=True).items():
        # At small widths a part of a score is still chance, which goes with the width's root.
        least = -0.35 if place == "scores" else -0.2
        assert least < slope < 0.1, (place, slope)


@pytest.mark.slow
def test_a_step_moves_activations_as_far_at_every_width():
    check_coordinates("gpt2-style")


@pytest.mark.slow
def test_without_it_activations_move_farther_in_a_wider_model():
    for place, slope in slopes("gpt2-style", mup=False).items():
        assert slope > 0.3, (place, slope)


def test_a_base_of_the_same_width_changes_no_step():
    with_base, without = moved(NARROW, NARROW), moved(NARROW, None)
    assert with_base == pytest.approx(without, rel=1e-6)


@pytest.mark.large
@pytest.mark.parametrize("name", list(FAMILIES)[1:])
def test_a_step_moves_activations_of_every_family_as_far_at_every_width(name):
    check_coordinates(name)


@pytest.mark.slow
def test_more_heads_are_as_wider_ones():
    widths = (32, 256)
    changes = [moved(family("gpt2-style", w, heads=w // 16), NARROW) for w in widths]
    for place in changes[0]:
        ratio = changes[-1][place] / changes[0][place]
        assert 0.5 < ratio < 1.2, (place, ratio)


@pytest.mark.parametrize("name", ["gpt2", "llama-style", "moe", "lstm", "transformer-base"])
def test_at_the_bases_width_nothing_changes(name):
    config = dataclasses.replace(PRESETS[name], vocab_size=PRESETS[name].vocab_size or 11)
    assert scaled(config, config) == config
    assert set(jax.tree.leaves(factors(config, config))) == {1.0}


def by_leaf(config: TransformerConfig, base: TransformerConfig) -> dict[str, tuple[float, float]]:
    initial, rate = factors(config, base)
    pairs = zip(jax.tree.leaves(initial), jax.tree.leaves(rate), strict=True)
    return dict(zip(leaf_names(initial), pairs, strict=True))


def test_factors_are_those_of_the_papers_table():
    """Yang et al. 2022, table 3, and table 8 for the head; the base is 4 times as narrow."""
    base = family("moe", heads=4, kv_heads=2, tie_embeddings=False, token_types=0)
    found = by_leaf(dataclasses.replace(base, width=128), base)
    block = "decoder.blocks"
    hidden, output = (1 / 2, 1 / 4), (1 / 4, 1 / 4)
    for name in ("attention.key", "attention.value", "attention.output", "mlp.up"):
        assert found[f"{block}.{name}.kernel"] == pytest.approx(hidden), name
    assert found[f"{block}.mlp.down.kernel"] == pytest.approx(hidden)
    assert found[f"{block}.mlp.router.kernel"] == pytest.approx(output)
    # 1 / H in the place of 1 / √H, with heads 4 times as wide.
    assert found[f"{block}.attention.query.kernel"] == pytest.approx((1 / 4, 1 / 8))
    assert found[f"{block}.attention.query.bias"] == pytest.approx((1 / 2, 1 / 2))
    rest = {name for name in found if "kernel" not in name and "query" not in name}
    assert {"embedding.table", "head.table", "positions.table", "decoder.norm.scale"} < rest
    assert {found[name] for name in rest} == {(1.0, 1.0)}
    assert scaled(dataclasses.replace(base, width=128), base).logit_scale == 1 / 4


def test_keys_that_stay_few_are_an_output():
    base = dataclasses.replace(NARROW, kv_heads=1)
    found = by_leaf(dataclasses.replace(base, width=128, heads=8), base)
    assert found["decoder.blocks.attention.key.kernel"] == pytest.approx((1 / 4, 1 / 4))
    assert found["decoder.blocks.attention.query.kernel"] == pytest.approx((1 / 2, 1 / 4))


def test_a_norm_of_queries_takes_what_their_kernel_would():
    base = dataclasses.replace(NARROW, qk_norm=True)
    found = by_leaf(dataclasses.replace(base, width=128), base)
    assert found["decoder.blocks.attention.query.kernel"] == pytest.approx((1 / 2, 1 / 4))
    assert found["decoder.blocks.attention.query_norm.scale"] == pytest.approx((1 / 2, 1 / 2))
    assert found["decoder.blocks.attention.key_norm.scale"] == (1.0, 1.0)


def test_an_embedding_times_the_root_of_the_width_is_made_as_much_smaller():
    base = dataclasses.replace(NARROW, embedding_scaled=True)
    wide = dataclasses.replace(base, width=128)
    assert by_leaf(wide, base)["embedding.table"] == (1 / 2, 1 / 2)
    assert scaled(wide, base).logit_scale == 1 / 2
    untied = [dataclasses.replace(config, tie_embeddings=False) for config in (wide, base)]
    assert scaled(*untied).logit_scale == 1 / 4


def test_a_base_with_other_layers_is_refused():
    other = dataclasses.replace(NARROW, bias=False)
    with pytest.raises(InputError, match=r"of width 32, has other parameters than .* width 32"):
        factors(NARROW, other)


SCALED = dataclasses.replace(NARROW, depth=1, width=16, logit_scale=0.25, head_bias=True)


@functools.cache
def model_of(config: TransformerConfig) -> Any:
    """One whose head has a bias that is not 0."""
    model = build(config, rngs=nnx.Rngs(0))
    assert model.bias is not None
    model.bias[...] = jnp.linspace(-1.0, 1.0, config.vocab_size)
    return model


@pytest.mark.parametrize("fields", [{}, {"family": "encoder", "encoder_heads": "masked_lm"}])
def test_logits_are_scaled_and_the_heads_bias_is_not(fields):
    config = dataclasses.replace(SCALED, **fields)
    model, plain = model_of(config), model_of(dataclasses.replace(config, logit_scale=1.0))
    tokens, bias = TOKENS[:, :-1], model.bias[...]
    np.testing.assert_allclose(model(tokens) - bias, (plain(tokens) - bias) / 4, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 8])
def test_the_loss_is_that_of_the_scaled_logits(chunk):
    model, batch = model_of(SCALED), Batch.causal(TOKENS)
    graphdef, params = split(model)
    sums = token_loss(graphdef, chunk=chunk)(params, batch, None)
    logits = model(jnp.asarray(batch.tokens))
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets).sum()
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-6)


def test_cached_decoding_reads_scaled_logits():
    decoding, model = Decoding(model_of(SCALED), 2), model_of(SCALED)
    rows = TOKENS[:2, :8]
    for before, after in ((0, 5), (5, 8)):
        logits = decoding.read(rows[:, before:after].tolist(), np.full(2, before, np.int32))
        np.testing.assert_allclose(logits, model(rows)[:, after - 1], atol=1e-5)


def test_a_scale_of_one_adds_nothing_to_the_program():
    plain = dataclasses.replace(SCALED, logit_scale=1.0)
    programs = [
        str(jax.make_jaxpr(model_of(config).readout)(jnp.ones(16))) for config in (plain, SCALED)
    ]
    assert [" mul " in program for program in programs] == [False, True]


V, T, B = 16, 16, 16
FOLLOWS = np.random.default_rng(0).integers(V, size=(V, V))


def text(rng: np.random.Generator) -> Batch:
    """Rows in which nine tokens in ten follow from the two before."""
    rows = rng.integers(V, size=(B, T + 1))
    for place in range(2, T + 1):
        follows = FOLLOWS[rows[:, place - 2], rows[:, place - 1]]
        rows[:, place] = np.where(rng.random(B) < 0.9, follows, rows[:, place])
    return Batch.causal(rows)


HELD_OUT = [text(np.random.default_rng(100 + number)) for number in range(4)]
TOKENS_OF_TEXT = jnp.asarray(HELD_OUT[0].tokens)
SMALL = TransformerConfig(vocab_size=V, context_length=T, depth=1, width=16, heads=2)


def experiment(model: TransformerConfig, seed: int, rate: float, steps: int) -> ExperimentConfig:
    return ExperimentConfig(
        model=model,
        optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=steps // 10),
        train=TrainConfig(steps=steps, batch_size=B, log_every=steps, eval_every=steps, seed=seed),
    )


def together(configs, base=None):
    batches = [made_batches(text, seed=config.train.seed) for config in configs]
    return train_ensemble(configs, batches, [HELD_OUT] * len(configs), mup_base=base)


WIDE = dataclasses.replace(SMALL, width=32)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One run of twice the base's width, and its directory."""
    directory = tmp_path_factory.mktemp("mup") / "run"
    config = experiment(WIDE, 1, 1e-3, 10)
    batches = made_batches(text, seed=1)
    return train(config, batches, HELD_OUT, directory=directory, mup_base=SMALL), directory


def test_a_run_begins_where_its_base_says_and_goes_as_far(alone):
    by_width = factors(WIDE, SMALL)
    begun = by_width.scale_initial(split(build(WIDE, rngs=nnx.Rngs(1)))[1])
    ended = split(alone[0].model)[1]
    farthest = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), begun, ended)
    farthest = dict(zip(leaf_names(begun), jax.tree.leaves(farthest), strict=True))
    table = farthest["embedding.table"]
    assert 1e-3 < table < 1e-2
    up = farthest["decoder.blocks.mlp.up.kernel"]
    assert up == pytest.approx(table / 2, rel=0.1)
    query = farthest["decoder.blocks.attention.query.kernel"]
    assert query == pytest.approx(table / 2**1.5, rel=0.1)


@pytest.mark.slow
def test_a_run_with_a_base_is_the_same_together(alone):
    ours, theirs = (
        together([experiment(WIDE, seed, 1e-3, 10) for seed in (0, 1)], SMALL)[1],
        alone[0],
    )
    np.testing.assert_allclose(ours.validation_loss, theirs.validation_loss, rtol=1e-5)
    np.testing.assert_allclose(ours.model(TOKENS_OF_TEXT), theirs.model(TOKENS_OF_TEXT), atol=1e-5)


def test_the_directory_holds_the_model_that_was_trained(alone):
    trained, directory = alone
    assert load_config(directory).model == scaled(WIDE, SMALL)
    _, model, _ = load_model(directory)
    np.testing.assert_array_equal(model(TOKENS_OF_TEXT), trained.model(TOKENS_OF_TEXT))


def test_muon_takes_no_base():
    config = experiment(SMALL, 0, 1e-2, 10)
    muon = dataclasses.replace(config, optimizer=OptimizerConfig(name="muon", warmup_steps=0))
    with pytest.raises(InputError, match=r"OptimizerConfig\.name is 'muon': it must be adamw"):
        train(muon, made_batches(text, seed=0), HELD_OUT, mup_base=SMALL)


RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def best_rate(model: TransformerConfig, base: TransformerConfig | None = None) -> int:
    """Which of `RATES` ends lowest."""
    trials = together([experiment(model, 0, rate, 60) for rate in RATES], base)
    return int(np.argmin([trial.validation_loss for trial in trials]))


@pytest.mark.large
def test_the_best_rate_of_a_narrow_model_is_about_a_wide_ones():
    base, wide = (dataclasses.replace(SMALL, width=width, heads=4) for width in (16, 128))
    narrow = best_rate(base)
    assert 0 < narrow < len(RATES) - 1
    assert abs(best_rate(wide, base) - narrow) <= 1
    assert best_rate(wide) < narrow - 1, "without muP the best rate falls with the width"
