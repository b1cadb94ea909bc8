"""What a spec stands for: presets, overrides, sweeps, and one sentence for each mistake."""

import dataclasses
import typing
from typing import Literal

import pytest
from flax import nnx

from gptjax.compare.plan.variants import SWEPT, Variant, read_variants
from gptjax.compare.question import Comparison
from gptjax.config import DataConfig, InputError, OptimizerConfig, TransformerConfig, axes
from gptjax.config.values import OptimizerName
from gptjax.models.build import build
from gptjax.models.presets import PRESETS, preset

OF_ENCODERS = {"token_types", "encoder_heads"}


def read(*specs: str, **comparison) -> list[Variant]:
    return read_variants(specs, Comparison(variants=specs, **comparison))


def only(spec: str, **comparison) -> Variant:
    (variant,) = read(spec, **comparison)
    return variant


def changed(variant: Variant, base: Variant) -> dict[str, object]:
    """The fields of the model in which a variant differs from the base."""
    fields = typing.get_type_hints(TransformerConfig)
    values = {field: getattr(variant.model, field) for field in fields}
    return {field: value for field, value in values.items() if value != getattr(base.model, field)}


def test_variants_come_in_the_order_asked_for():
    names = ["post-norm", "gpt2", "alibi:qk_norm=true", "lstm"]
    assert [variant.name for variant in read(*names)] == names


def test_all_have_the_context_of_the_baseline_and_leave_the_vocabulary_open():
    models = [variant.model for variant in read("llama-style", "gpt2", "lstm")]
    assert [(model.context_length, model.vocab_size) for model in models] == [(128, 0)] * 3
    models = [variant.model for variant in read("llama-style", "gpt2", context_length=32)]
    assert [model.context_length for model in models] == [32, 32]


def test_dropout_is_the_comparisons_unless_a_variant_says_its_own():
    assert preset("gpt2").dropout == 0.1
    variants = read("gpt2", "gpt2:dropout=0.2", dropout=0.05)
    assert [variant.model.dropout for variant in variants] == [0.05, 0.2]


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("norm=rmsnorm", "norm", "rmsnorm"),
        ("depth=3", "depth", 3),
        ("rotary_fraction=0.5", "rotary_fraction", 0.5),
        ("attention_softcap=5e1", "attention_softcap", 50.0),
        ("tie_embeddings=false", "tie_embeddings", False),
        ("tie_embeddings=False", "tie_embeddings", False),
        ("qk_norm=true", "qk_norm", True),
        ("query_bias=none", "query_bias", None),
        ("query_bias=false", "query_bias", False),
    ],
)
def test_an_override_has_the_type_of_its_field(override, field, value):
    variant = only(f"quickstart:{override}")
    found = getattr(variant.model, field)
    assert (found, type(found)) == (value, type(value))
    assert variant.name == f"quickstart:{override}"


def test_a_value_may_have_commas():
    variant = only("gpt2:norm=rmsnorm,attention=full,local,window=64,activation=swiglu")
    assert variant.model.attention == "full,local"
    assert (variant.model.window, variant.model.activation) == (64, "swiglu")


def test_the_optimizer_is_the_comparisons_with_overrides():
    common = OptimizerConfig(weight_decay=0.2)
    base, muon, fixed = read(
        "gpt2",
        "gpt2:optimizer.name=muon",
        "gpt2:optimizer.name=muon,optimizer.learning_rate=3e-3,norm=rmsnorm",
        optimizer=common,
    )
    assert base.optimizer == common
    assert (muon.optimizer.name, muon.optimizer.weight_decay) == ("muon", 0.2)
    assert (fixed.optimizer.learning_rate, fixed.model.norm) == (3e-3, "rmsnorm")
    assert [variant.fixed_rate for variant in (base, muon, fixed)] == [False, False, True]


def test_a_sweep_is_every_value_of_the_axis():
    positions = typing.get_args(typing.get_type_hints(TransformerConfig)["position_embedding"])
    variants = read("gpt2:position_embedding=*")
    assert [variant.model.position_embedding for variant in variants] == list(positions)
    assert [variant.name for variant in variants] == [
        f"gpt2:position_embedding={value}" for value in positions
    ]


def test_a_new_value_of_an_axis_can_be_swept_without_another_line(monkeypatch):
    hint = Literal["layernorm", "rmsnorm", "new"]
    assert axes.listed(hint) == ("layernorm", "rmsnorm", "new")
    for field, annotation in typing.get_type_hints(TransformerConfig).items():
        if axes.listed(annotation) and field not in axes.OUTSIDE:
            assert SWEPT[field] == axes.listed(annotation)
    monkeypatch.setitem(SWEPT, "rotary_fraction", (0.5, 0.75))
    assert [variant.model.rotary_fraction for variant in read("gpt2:rotary_fraction=*")] == [
        0.5,
        0.75,
    ]


def test_several_stars_are_the_product():
    variants = read("gpt2:norm=*,depth=3,tie_embeddings=*")
    assert [variant.name for variant in variants] == [
        "gpt2:norm=layernorm,depth=3,tie_embeddings=false",
        "gpt2:norm=layernorm,depth=3,tie_embeddings=true",
        "gpt2:norm=rmsnorm,depth=3,tie_embeddings=false",
        "gpt2:norm=rmsnorm,depth=3,tie_embeddings=true",
    ]
    names = [variant.optimizer.name for variant in read("gpt2:optimizer.name=*")]
    assert names == list(typing.get_args(OptimizerName))


def test_a_sweep_leaves_out_what_is_there_already():
    names = [variant.name for variant in read("gpt2", "gpt2:norm=*")]
    assert names == ["gpt2", "gpt2:norm=rmsnorm"]


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (
            "gpt2:attention=*",
            [
                "gpt2:attention=full",
                "gpt2:attention=local,window=512",
                "gpt2:attention=compressed",
                "gpt2:attention=local,full,window=512",
            ],
        ),
        (
            "mistral-style:attention=*",
            [
                "mistral-style:attention=full,window=0",
                "mistral-style:attention=local",
                "mistral-style:attention=compressed,window=0,position_embedding=learned",
                "mistral-style:attention=local,full",
            ],
        ),
        ("gpt2:rotary_fraction=*", ["gpt2:rotary_fraction=0.5,position_embedding=rotary"]),
        ("llama-style:rotary_fraction=*", ["llama-style:rotary_fraction=0.5"]),
        (
            "transformer-decoder:pairing=*",
            ["transformer-decoder:pairing=half", "transformer-decoder:pairing=interleaved"],
        ),
        ("gpt2:family=*", ["gpt2:family=decoder", "gpt2:family=recurrent,position_embedding=none"]),
        ("gpt2-xl:kv_heads=*", ["gpt2-xl:kv_heads=1"]),
    ],
)
def test_a_value_that_needs_another_has_it_in_its_name(spec, names):
    assert [variant.name for variant in read(spec)] == names


def test_what_a_spec_says_comes_before_what_an_axis_would_take():
    variants = read("gpt2:window=7,attention=*")
    assert [(variant.model.attention, variant.model.window) for variant in variants] == [
        ("local", 7),
        ("local,full", 7),
    ]


@pytest.mark.parametrize("name", ["gpt2", "mistral-style", "gemma-style", "moe"])
def test_a_name_reads_as_its_variant(name):
    for axis in SWEPT.keys() - OF_ENCODERS:
        for variant in read(f"{name}:{axis}=*"):
            assert read(variant.name, context_length=variant.model.context_length) == [variant]


@pytest.mark.parametrize("axis", axes.AXES)
def test_every_swept_variant_can_be_built(axis):
    encoder = axis in OF_ENCODERS
    name = "bert-tiny" if encoder else "quickstart"
    data = DataConfig(objective="masked_lm" if encoder else "causal")
    base = only(name, data=data)
    variants = read(f"{name}:{axis}=*", data=data)
    if axis != "family":  # Others than those that the objective trains are left out.
        assert [getattr(variant.model, axis) for variant in variants] == list(SWEPT[axis])
    assert any(changed(variant, base) for variant in variants) or axis == "token_types"
    for variant in variants:
        model = dataclasses.replace(variant.model, vocab_size=11)
        nnx.eval_shape(lambda model=model: build(model, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("specs", "sentence"),
    [
        (("gtp2",), "Unknown preset 'gtp2': did you mean gpt2?"),
        (("gpt2", "lama-style:norm=*"), "Unknown preset 'lama-style': did you mean llama-style"),
        (("gpt2:nrm=rmsnorm",), "overrides an unknown field 'nrm': did you mean norm or qk_norm?"),
        (("gpt2:learning_rate=1",), "did you mean optimizer.learning_rate or optimizer.muon_"),
        (("gpt2:depth=four",), "'gpt2:depth=four': depth is 'four', and must be a whole number."),
        (("gpt2:depth=1.5",), "depth is '1.5', and must be a whole number."),
        (("gpt2:logit_softcap=hot",), "logit_softcap is 'hot', and must be a number."),
        (("gpt2:tie_embeddings=yes",), "tie_embeddings is 'yes', and must be true or false."),
        (("gpt2:tie_embeddings=none",), "tie_embeddings is 'none', and must be true or false."),
        (("gpt2:query_bias=1",), "query_bias is '1', and must be true or false or none."),
        (("gpt2:norm=rms",), "'gpt2:norm=rms': TransformerConfig.norm is 'rms': it must be one of"),
        (("gpt2:attention=local",), "TransformerConfig.window is 0: it must be above 0"),
        (("gpt2:optimizer.beta1=2",), "'gpt2:optimizer.beta1=2': OptimizerConfig.beta1 is 2.0: it"),
        (("gpt2:optimizer.name=adam",), "OptimizerConfig.name is 'adam': it must be one of adamw"),
        (("gpt2:",), "'' must be field=value, as in gpt2:norm=rmsnorm."),
        (("gpt2:norm",), "'norm' must be field=value, as in gpt2:norm=rmsnorm."),
        (("gpt2:norm=rmsnorm,norm=layernorm",), "overrides norm twice: once is accepted."),
        (
            ("gpt2:context_length=64",),
            "overrides context_length, which all variants have in common: --context-length",
        ),
        (("gpt2:vocab_size=64",), "which all variants have in common: the tokenizer sets it."),
        (("gpt2:width=*",), "sweeps width, whose values are not listed: a star works for "),
        (("gpt2:dtype=*",), "a star works for family, kv_heads, "),
        (("gpt2", "gpt2"), "'gpt2' is the same as 'gpt2': each may be there once."),
        (
            ("gpt2", "gpt2:position_embedding=learned"),
            "'gpt2:position_embedding=learned' is the same as 'gpt2': ",
        ),
        (
            ("gpt2:position_embedding=*,heads=13",),
            "heads is 13: it must be a divisor of width 768.",
        ),
        (("bert-tiny",), "'bert-tiny': data.objective is 'causal', for decoder or recurrent: a"),
        (("gpt2", "transformer-tiny:norm=rmsnorm"), "a model of the family encoder_decoder takes"),
        (("gpt2:encoder_depth=2",), "'gpt2:encoder_depth=2': TransformerConfig.encoder_depth is 2"),
    ],
)
def test_a_mistake_is_one_sentence(specs, sentence):
    with pytest.raises(InputError) as mistake:
        read(*specs)
    assert sentence in str(mistake.value)
    assert str(mistake.value)[-1] in ".?"


@pytest.mark.parametrize(
    ("data", "fits", "refused"),
    [
        (DataConfig(objective="causal"), ("gpt2", "lstm"), "bert-tiny"),
        (DataConfig(objective="masked_lm"), ("bert-tiny",), "gpt2"),
        (
            DataConfig(objective="next_sentence"),
            ("bert-tiny",),
            "bert-tiny:encoder_heads=none",
        ),
        (DataConfig(objective="prefix"), ("transformer-tiny",), "lstm"),
        (
            DataConfig(objective="sequence_to_sequence", target=("embedded",)),
            ("transformer-tiny",),
            "bert-tiny",
        ),
    ],
)
def test_only_families_that_the_objective_trains(data, fits, refused):
    assert [variant.name for variant in read(*fits, data=data)] == list(fits)
    with pytest.raises(InputError, match=f"{refused}': data.objective is '{data.objective}'"):
        read(*fits, refused, data=data)


def test_every_preset_can_be_compared():
    data = {
        "encoder": DataConfig(objective="masked_lm"),
        "encoder_decoder": DataConfig(objective="prefix"),
    }
    for name, model in PRESETS.items():
        variant = only(name, data=data.get(model.family, DataConfig()))
        assert variant.model.family == model.family
