"""Widths that meet a target, for every preset; what they leave as it is; how near they come."""

import dataclasses
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.compare.plan import matching
from gptjax.compare.plan.matching import (
    DISTORTION,
    MEASURE,
    STEPS,
    match_seconds,
    match_width,
    resized,
)
from gptjax.config import InputError, TransformerConfig
from gptjax.models.presets import PRESETS, preset

TOLERANCE = 0.01
SOLVED = {"width", "heads", "kv_heads", "head_dim", "mlp_dim"}
OF_BYTES = {
    name: dataclasses.replace(model, vocab_size=256, context_length=128)
    for name, model in PRESETS.items()
    if model.depth <= 4
}
"""The presets that are compared on a CPU."""


def check_architecture(model: TransformerConfig, original: TransformerConfig) -> None:
    """Everything but sizes is as it was, and sizes keep the promises of the module."""
    for field in dataclasses.fields(TransformerConfig):
        if field.name not in SOLVED:
            assert getattr(model, field.name) == getattr(original, field.name), field.name
    if model.family == "recurrent":
        return
    assert model.actual_head_dim % 2 == 0
    assert model.heads >= min(original.heads, 4)
    assert bool(model.kv_heads) == bool(original.kv_heads)
    if original.actual_kv_heads == 1:
        assert model.actual_kv_heads == 1
    else:
        sharing = [each.heads // each.actual_kv_heads for each in (model, original)]
        assert sharing[0] == sharing[1]
    if original.heads * original.actual_head_dim == original.width:
        assert model.heads * model.actual_head_dim == model.width
        assert model.head_dim == original.head_dim or model.head_dim == 0
    distortion = model.actual_mlp_dim * original.width / (model.width * original.actual_mlp_dim)
    assert 1 / DISTORTION - 1e-9 <= distortion <= DISTORTION + 1e-9
    assert model.mlp_dim != 4 * model.width or original.mlp_dim


@pytest.mark.parametrize("measure", MEASURE)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_hits_its_target(name, measure):
    model, count = preset(name), MEASURE[measure]
    for factor in (0.7, 1.5):
        target = factor * count(model)
        matched, reached = match_width(model, count, target, TOLERANCE)
        assert reached == count(matched)
        assert abs(reached - target) <= TOLERANCE * target
        check_architecture(matched, model)


@pytest.mark.parametrize("name", OF_BYTES)
def test_small_models_hit_the_sizes_of_a_scaling_study(name):
    model = OF_BYTES[name]
    for target in (3e5, 1e6, 3e6, 1e7):
        for measure, each in (("params", target), ("flops", 6 * target)):
            matched, reached = match_width(model, MEASURE[measure], each, TOLERANCE)
            assert reached == MEASURE[measure](matched)
            assert abs(reached - each) <= TOLERANCE * each, measure
            check_architecture(matched, model)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(PRESETS)),
    measure=st.sampled_from(sorted(MEASURE)),
    exponent=st.floats(5, 10),
)
def test_a_target_is_hit_or_the_nearest_is_told(name, measure, exponent):
    model, target = preset(name), 10**exponent
    try:
        matched, reached = match_width(model, MEASURE[measure], target, TOLERANCE)
    except InputError as missed:
        sentence = str(missed)
    else:
        assert abs(reached - target) <= TOLERANCE * target
        check_architecture(matched, model)
        return
    off = re.search(r"no width comes within 1% of .* is ([\d.]+)% off", sentence)
    assert off
    assert float(off[1]) >= 1


@pytest.mark.parametrize("name", ["gpt2", "gpt3-13b", "smollm-135m", "lstm", "multi-query"])
def test_what_is_near_enough_stays_as_it_is(name):
    model = preset(name)
    for measure in MEASURE.values():
        for target in (measure(model), 1.009 * measure(model), 0.991 * measure(model)):
            assert match_width(model, measure, target, TOLERANCE) == (model, measure(model))


def _coarsest(model: TransformerConfig) -> int:
    return next(step for step in STEPS if model.width % step == model.actual_mlp_dim % step == 0)


def test_the_coarsest_step_that_gets_there_wins():
    """Against all widths and mlp_dims of a brute-force search."""
    model, count = preset("quickstart"), MEASURE["params"]
    for target in (4e5, 7e5, 2.1e6):
        found = match_width(model, count, target, TOLERANCE).model
        coarser = [step for step in STEPS if step > _coarsest(found)]
        for step in coarser:
            for width in range(step, 1024, step):
                for mlp_dim in range(step, 5 * width + 1, step):
                    if 5 * width >= mlp_dim >= 3.2 * width:
                        other = dataclasses.replace(model, width=width, mlp_dim=mlp_dim)
                        assert abs(count(other) / target - 1) > TOLERANCE, (target, step)


def test_of_one_step_the_least_distortion_wins(monkeypatch):
    monkeypatch.setattr(matching, "STEPS", (1,))
    model, count = preset("quickstart"), MEASURE["params"]
    larger = resized(model, 160)
    for off in (-0.009, 0.0, 0.009):
        # Another mlp_dim would come nearer, and change the ratio.
        assert match_width(model, count, count(larger) * (1 + off), TOLERANCE).model == larger
    assert larger.mlp_dim == 0


def test_a_large_model_is_all_of_the_coarsest_step():
    matched = match_width(preset("gpt3-6.7b"), MEASURE["params"], 5e9, TOLERANCE).model
    assert matched.width % 128 == matched.actual_mlp_dim % 128 == 0
    assert matched.actual_head_dim == 128


def test_head_widths_stay_where_they_can():
    larger = match_width(preset("gpt2"), MEASURE["params"], 3e8, TOLERANCE).model
    assert larger.actual_head_dim == 64
    apart = match_width(preset("gpt3-13b"), MEASURE["params"], 6e9, TOLERANCE).model
    assert apart.head_dim == 128
    assert abs(apart.heads * 128 / apart.width - 40 * 128 / 5140) < 0.02
    tiny = match_width(OF_BYTES["quickstart"], MEASURE["params"], 1e5, TOLERANCE).model
    assert tiny.heads == 4


def test_a_deep_model_cannot_be_tiny_and_says_how_near_it_comes():
    model = dataclasses.replace(preset("gpt2-xl"), vocab_size=256, context_length=128)
    with pytest.raises(InputError) as mistake:
        match_width(model, MEASURE["params"], 3e4, TOLERANCE)
    assert str(mistake.value) == (
        "no width comes within 1% of 30,000: the nearest, width 8 and mlp_dim 26, has 40,048 and "
        "is 33.5% off; --tolerance 0.335 would take it."
    )
    assert match_width(model, MEASURE["params"], 3e4, 0.335).reached == 40_048
    with pytest.raises(InputError, match=r"is 300\.5% off\.$"):
        match_width(model, MEASURE["params"], 1e4, TOLERANCE)


def test_an_lstm_has_no_mlp_dim_to_name():
    with pytest.raises(InputError, match=r"the nearest, width \d+, has [\d,]+ and is"):
        match_width(preset("lstm"), MEASURE["flops"], 1e5, TOLERANCE)


def test_resized_keeps_proportions():
    llama = preset("llama-style")
    assert resized(llama, 256) == dataclasses.replace(
        llama, width=256, heads=8, kv_heads=4, mlp_dim=688
    )
    assert resized(preset("gpt2"), 1536).mlp_dim == 0
    several = resized(preset("multi-query"), 160)
    assert (several.heads, several.actual_head_dim, several.kv_heads) == (5, 32, 1)
    assert resized(preset("lstm"), 129).width == 129
    with pytest.raises(InputError, match="A width of 100 leaves no heads for this model: it must"):
        resized(llama, 100)


def _clock(overheads: list[float]):
    """A machine on which a step takes its FLOPs times what the variant wastes, and a constant."""
    rounds = []

    def ratios(models):
        rounds.append(list(models))
        seconds = [
            overhead * MEASURE["flops"](model) + 1e6
            for overhead, model in zip(overheads, models, strict=True)
        ]
        return [each / seconds[0] for each in seconds]

    return ratios, rounds


NAMED = {name: preset(name) for name in ("quickstart", "llama-style", "lstm", "alibi")}
SECONDS = list(NAMED.values())


def test_seconds_are_matched_by_what_is_measured():
    ratios, rounds = _clock([1.0, 1.3, 2.0, 0.8])
    matched = match_seconds(NAMED, ratios, TOLERANCE)
    assert [each.reached for each in matched] == ratios([each.model for each in matched])
    assert all(abs(each.reached - 1) <= TOLERANCE for each in matched)
    assert matched[0] == (SECONDS[0], 1.0)
    for each, original in zip(matched, SECONDS, strict=True):
        check_architecture(each.model, original)
    flops = [MEASURE["flops"](each.model) for each in matched]
    assert flops[3] > flops[0] > flops[1] > flops[2]
    # They began with equal FLOPs, and the first was measured anew in every round.
    assert all(
        math.isclose(MEASURE["flops"](model), flops[0], rel_tol=TOLERANCE) for model in rounds[0]
    )
    assert all(models[0] == SECONDS[0] for models in rounds)


def test_a_variant_that_has_arrived_keeps_its_width():
    clock, rounds = _clock([1.0, 1.0, 2.0, 1.0])

    def drifting(models):
        return [*clock(models)[:3], 1.008 if len(rounds) == 1 else 1.3]

    matched = match_seconds(NAMED, drifting, TOLERANCE)
    assert len(rounds) > 1
    assert {models[3] for models in rounds} == {matched[3].model}
    assert matched[3].reached == 1.008


def test_seconds_that_no_width_changes_say_how_near_they_came():
    def ratios(models):
        return [1.0] + [1.25] * (len(models) - 1)

    with pytest.raises(InputError) as mistake:
        match_seconds(NAMED, ratios, TOLERANCE)
    told = "llama-style cannot be matched: measured 6 times, it comes no nearer than 25.0% to the "
    assert str(mistake.value).startswith(f"{told}seconds of quickstart, with width ")
    assert str(mistake.value).endswith("; --tolerance 0.25 would take it.")
