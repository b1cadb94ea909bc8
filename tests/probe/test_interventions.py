"""What is changed inside changes what follows, and only that."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from probed import OTHER, SOURCE, TINY, TOKENS, VARIANTS, config, inputs, model, shape_of

from gptjax import InputError, probe, split
from gptjax.probe import interventions as module


def score(logits: jax.Array) -> jax.Array:
    return logits[0, -1, 3] - logits[1, -2, 5]


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_everything_patched_from_a_run_is_that_run(name):
    places = [*probe.hook_points(config(name))]
    source: dict[str, Any] = {"source": SOURCE[:, ::-1]} if inputs(name) else {}
    other = probe.observe(model(name), OTHER, places, **source)
    interventions = {
        hook_point: probe.replace(
            probe.where(model(name), hook_point, shape_of(hook_point)), other.captured[hook_point]
        )
        for hook_point in places
    }
    patched = probe.observe(model(name), TOKENS, places, interventions, **inputs(name))
    np.testing.assert_allclose(patched.logits, other.logits, atol=1e-5, rtol=0)
    for hook_point in places:
        np.testing.assert_array_equal(patched.captured[hook_point], other.captured[hook_point])


@pytest.mark.parametrize("name", ["decoder", "compressed", "encoder_decoder"])
def test_every_place_is_on_the_way_to_the_logits(name):
    """A change of one layer of any of them alone is felt at the end."""
    places = [*probe.hook_points(config(name))]
    seen = probe.observe(model(name), TOKENS, places, **inputs(name)).captured
    generator = np.random.default_rng(0)

    def logits(changed: str) -> jax.Array:
        interventions = {}  # One program for all: of the other places the change is 0.
        for hook_point in places:
            here = probe.where(model(name), hook_point, shape_of(hook_point), layers=[1])
            noise = generator.normal(size=seen[hook_point].shape) * (hook_point == changed)
            interventions[hook_point] = probe.add(here, noise.astype(np.float32))
        return probe.observe(
            model(name), TOKENS, interventions=interventions, **inputs(name)
        ).logits

    plain = logits("none")
    for hook_point in places:
        assert np.abs(logits(hook_point) - plain).max() > 0.01, hook_point


@pytest.mark.parametrize("name", ["decoder", "scanned", "encoder", "recurrent"])
def test_a_patched_stream_is_the_other_run_from_there_on(name):
    other = probe.observe(model(name), OTHER, ("residual",))
    here = probe.where(model(name), "residual", TOKENS.shape, layers=[1])
    interventions = {"residual": probe.replace(here, other.captured["residual"])}
    patched = probe.observe(model(name), TOKENS, ("residual",), interventions)
    np.testing.assert_allclose(patched.logits, other.logits, atol=1e-5, rtol=0)
    own = probe.observe(model(name), TOKENS, ("residual",)).captured["residual"]
    np.testing.assert_allclose(patched.captured["residual"][0], own[0], atol=1e-6)


def test_a_zeroed_head_is_one_without_its_output_matrix():
    graphdef, params = split(model("decoder"))
    kernel = params["decoder"]["blocks"]["attention"]["output"]["kernel"]  # [L, N, H, D]
    without = jax.tree.map(lambda leaf: leaf.at[1, 0].set(0) if leaf is kernel else leaf, params)
    expected = nnx.merge(graphdef, without)(jnp.asarray(TOKENS))
    for hook_point in ("z", "head_output"):
        here = probe.where(model("decoder"), hook_point, TOKENS.shape, layers=[1], heads=[0])
        ablated = probe.observe(
            model("decoder"), TOKENS, interventions={hook_point: probe.zero(here)}
        )
        np.testing.assert_allclose(ablated.logits, expected, atol=1e-5)


def test_a_change_is_where_it_was_asked_for():
    here = probe.where(model("decoder"), "z", TOKENS.shape, layers=[2], positions=[4])
    changed = probe.observe(model("decoder"), TOKENS, interventions={"z": probe.add(here, 1.0)})
    plain = probe.observe(model("decoder"), TOKENS)
    moved = np.abs(changed.logits - plain.logits).max(axis=(0, 2)) > 1e-4
    np.testing.assert_array_equal(moved, np.arange(8) == 4)  # The last layer's, nobody sees.


def test_an_edge_can_be_cut():
    here = probe.where(
        model("decoder"), "attention", TOKENS.shape, layers=[0], heads=[1], positions=[5], keys=[2]
    )
    interventions = {"attention": probe.zero(here)}
    weights = probe.observe(model("decoder"), TOKENS, ("attention",), interventions).captured[
        "attention"
    ]
    plain = probe.attention(model("decoder"), TOKENS)
    assert (weights[0, :, 1, 5, 2] == 0).all()
    assert (plain[0, :, 1, 5, 2] > 0).all()
    same = np.broadcast_to(~here[:1], plain[:1].shape)[0]
    np.testing.assert_allclose(weights[0][same], plain[0][same], atol=1e-6)


def test_a_vector_steers_along_itself():
    vector = model("decoder").unembedding[3]
    here = probe.where(model("decoder"), "mlp_output", TOKENS.shape, layers=[2])

    def logits(strength: float) -> np.ndarray:
        interventions = {"mlp_output": probe.add(here, strength * vector)}
        return np.asarray(
            probe.observe(model("decoder"), TOKENS, interventions=interventions).logits
        )

    assert (logits(1.0)[..., 3] > logits(0.0)[..., 3]).all()
    assert (logits(0.0)[..., 3] > logits(-1.0)[..., 3]).all()


def test_sweeps_are_each_run_by_itself():
    mixture = probe.observe(model("decoder"), OTHER, ("z",)).captured["z"]
    mean = mixture.mean((1, 2), keepdims=True)
    for value, sweep in (
        (0.0, probe.ablate_heads(model("decoder"), TOKENS, score)),
        (mean, probe.ablate_heads(model("decoder"), TOKENS, score, value=mean, at_a_time=4)),
        (mixture, probe.patch_heads(model("decoder"), TOKENS, mixture, score)),
    ):
        assert sweep.shape == (TINY.depth, TINY.heads)
        for layer, head in np.ndindex(sweep.shape):
            here = probe.where(model("decoder"), "z", TOKENS.shape, layers=[layer], heads=[head])
            interventions = {"z": probe.replace(here, value)}
            alone = score(
                probe.observe(model("decoder"), TOKENS, interventions=interventions).logits
            )
            np.testing.assert_allclose(sweep[layer, head], alone, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("hook_point", ["residual", "query", "attention"])
def test_a_map_of_patches_is_each_patch_by_itself(name, hook_point):
    other = probe.observe(model(name), OTHER, (hook_point,), **inputs(name)).captured[hook_point]
    swept = probe.patch_positions(
        model(name), TOKENS, other, score, hook_point=hook_point, **inputs(name)
    )
    assert swept.shape == (3, 8)
    for layer, position in ((0, 0), (1, 7), (2, 6)):
        here = probe.where(
            model(name), hook_point, TOKENS.shape, layers=[layer], positions=[position]
        )
        interventions = {hook_point: probe.replace(here, other)}
        alone = score(
            probe.observe(model(name), TOKENS, interventions=interventions, **inputs(name)).logits
        )
        np.testing.assert_allclose(swept[layer, position], alone, atol=1e-5)


def test_feedforward_layers_are_ablated_one_by_one():
    swept = probe.ablate_mlp(model("scanned"), TOKENS, score)
    for layer in range(3):
        here = probe.where(model("scanned"), "mlp_output", TOKENS.shape, layers=[layer])
        interventions = {"mlp_output": probe.zero(here)}
        alone = score(probe.observe(model("scanned"), TOKENS, interventions=interventions).logits)
        np.testing.assert_allclose(swept[layer], alone, atol=1e-5)


def test_a_sweep_is_one_program_without_a_loop():
    graphdef, params = split(model("decoder"))
    wheres = module._one_at_a_time(3, 2, (0, 3), 5)
    program = jax.make_jaxpr(module._replace_each, static_argnums=(0, 1, 2, 3))(
        graphdef, "z", score, len(wheres), params, jnp.asarray(TOKENS), wheres, 0.0, {}
    )
    assert "2,8,2,8" in str(program)  # One run's mixture [B, T, N, H] …
    assert "6,2,8,2,8" in str(program)  # … of all six at once.


def test_the_encoder_is_changed_by_its_own_names():
    plain = probe.observe(model("encoder_decoder"), TOKENS, source=SOURCE).logits
    for hook_point in ("encoder_z", "cross_z"):
        shape = shape_of(hook_point)
        here = probe.where(model("encoder_decoder"), hook_point, shape, layers=[1], heads=[1])
        interventions = {hook_point: probe.zero(here)}
        changed = probe.observe(
            model("encoder_decoder"), TOKENS, interventions=interventions, source=SOURCE
        )
        assert np.abs(changed.logits - plain).max() > 1e-3


def test_what_is_not_there_is_refused():
    def refused(name: str, hook_point: str, **chosen) -> str:
        with pytest.raises(InputError) as caught:
            probe.where(model(name), hook_point, TOKENS.shape, **chosen)
        return str(caught.value)

    assert refused("decoder", "z", layers=[3]) == "layers has 3: it must be between 0 and 2."
    assert refused("decoder", "z", heads=[2]) == "heads has 2: it must be between 0 and 1."
    assert "positions has 8: it must be" in refused("decoder", "residual", positions=[8])
    assert "heads has 1: it must be between 0 and 0" in refused("parallel", "value", heads=[1])
    no_heads = "heads must be None: residual has the axes LBTD."
    assert refused("decoder", "residual", heads=[0]) == no_heads
    assert "keys must be None: value has the axes" in refused("decoder", "value", keys=[0])
    assert "between 0 and 1" in refused("encoder_decoder", "encoder_residual", layers=[2])
    assert "Unknown hook point 'mixtur'" in refused("decoder", "mixtur")
