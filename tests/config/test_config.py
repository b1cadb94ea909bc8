import dataclasses
import json
import math

import pytest

from gptjax.config import (
    DataConfig,
    ExperimentConfig,
    InputError,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    TransformerConfig,
    differences,
    from_dict,
    near_names,
    to_dict,
    with_vocabulary,
)

CUSTOM = ExperimentConfig(
    model=TransformerConfig(
        vocab_size=300, depth=2, position_embedding="rotary", bias=False, dropout=0.5
    ),
    data=DataConfig(source=("some.txt", "b.txt"), weights=(2, 1), tokenizer="characters"),
    optimizer=OptimizerConfig(name="muon", warmup_steps=3, learning_rate=1),
    train=TrainConfig(steps=7, seed=4),
)

REFUSED = [
    (TransformerConfig, {"vocab_size": -1}, "at least 0"),
    (TransformerConfig, {"context_length": 0}, "at least 1"),
    (TransformerConfig, {"depth": 0}, "at least 1"),
    (TransformerConfig, {"width": -8}, "at least 1"),
    (TransformerConfig, {"heads": 0}, "at least 1"),
    (TransformerConfig, {"heads": 3}, "a divisor of width 128"),
    (
        TransformerConfig,
        {"heads": 128, "position_embedding": "rotary"},
        "even head dim (rotary), not 1",
    ),
    (TransformerConfig, {"mlp_dim": -1}, "at least 0"),
    (TransformerConfig, {"dropout": 1.0}, "at least 0 and below 1"),
    (TransformerConfig, {"dropout": -0.1}, "at least 0 and below 1"),
    (
        TransformerConfig,
        {"position_embedding": "learnd"},
        "one of learned, sinusoidal, rotary, alibi, relative, none",
    ),
    (TransformerConfig, {"norm": "batchnorm"}, "one of layernorm, rmsnorm"),
    (TransformerConfig, {"attention_normalizer": "relu"}, "one of softmax, sigmoid"),
    (TransformerConfig, {"activation": "gelu_tahn"}, "relu, relu2, gelu, gelu_tanh, silu"),
    (TransformerConfig, {"family": "gpt"}, "one of decoder, encoder, encoder_decoder, recurrent"),
    (TransformerConfig, {"encoder_depth": -1}, "at least 0"),
    (TransformerConfig, {"encoder_depth": 2}, "0 in the family decoder"),
    (
        TransformerConfig,
        {"encoder_depth": 3, "family": "encoder_decoder", "window": 2, "attention": "full,local"},
        "a multiple of the 2 kinds of attention",
    ),
    (TransformerConfig, {"depth": 3, "attention": "full,full"}, "a multiple of the 2 kinds"),
    (TransformerConfig, {"kv_heads": 3}, "a divisor of heads 4"),
    (TransformerConfig, {"head_dim": -1}, "at least 0"),
    (TransformerConfig, {"pairing": "thirds"}, "one of half, interleaved"),
    (
        TransformerConfig,
        {"rotary_fraction": 1.5, "position_embedding": "rotary"},
        "above 0 and at most 1",
    ),
    (
        TransformerConfig,
        {"heads": 4, "rotary_fraction": 0.01, "position_embedding": "rotary"},
        "even head",
    ),
    (TransformerConfig, {"rope_theta": 0.0}, "above 0"),
    (
        TransformerConfig,
        {"width": 5, "heads": 1, "position_embedding": "sinusoidal"},
        "even with sinusoid",
    ),
    (
        TransformerConfig,
        {"position_embedding": "alibi", "family": "encoder"},
        "else in the family encoder",
    ),
    (
        TransformerConfig,
        {"position_embedding": "rotary", "attention": "compressed"},
        "with compressed",
    ),
    (
        TransformerConfig,
        {"position_embedding": "learned", "family": "recurrent"},
        "none in the family",
    ),
    (TransformerConfig, {"norm_placement": "after"}, "one of pre, post, sandwich, parallel"),
    (TransformerConfig, {"norm_placement": "parallel", "family": "encoder_decoder"}, "with cross"),
    (TransformerConfig, {"norm_epsilon": 0.0}, "above 0"),
    (TransformerConfig, {"attention": "ful"}, "full, local, compressed, or several joined"),
    (
        TransformerConfig,
        {"attention": "compressed", "family": "encoder", "position_embedding": "none"},
        "without compressed in the family encoder",
    ),
    (
        TransformerConfig,
        {"attention": "full,full", "family": "recurrent", "position_embedding": "none"},
        "full in the family recurrent",
    ),
    (TransformerConfig, {"window": 3}, "above 0 with local attention, and 0 without"),
    (TransformerConfig, {"window": 0, "attention": "local"}, "above 0 with local attention"),
    (TransformerConfig, {"window": -3}, "at least 0"),
    (TransformerConfig, {"compression": 0}, "at least 1"),
    (TransformerConfig, {"attention_softcap": -1.0}, "at least 0"),
    (TransformerConfig, {"logit_softcap": -1.0}, "at least 0"),
    (TransformerConfig, {"logit_scale": 0.0}, "above 0"),
    (TransformerConfig, {"num_experts": -1}, "at least 0"),
    (
        TransformerConfig,
        {"num_experts": 4, "family": "recurrent", "position_embedding": "none"},
        "0 in the",
    ),
    (TransformerConfig, {"experts_per_token": 5, "num_experts": 4}, "between 1 and num_experts 4"),
    (TransformerConfig, {"capacity_factor": -1.0}, "at least 0"),
    (TransformerConfig, {"query_bias": 1}, "bool or None"),
    (TransformerConfig, {"output_bias": 0}, "bool or None"),
    (TransformerConfig, {"token_types": 2}, "0 in the family decoder"),
    (TransformerConfig, {"token_types": -2, "family": "encoder"}, "at least 0"),
    (TransformerConfig, {"encoder_heads": "pooler"}, "none in the family decoder"),
    (TransformerConfig, {"dtype": "float64"}, "one of float32, bfloat16, float16"),
    (TransformerConfig, {"depth": 2.0}, "int"),
    (TransformerConfig, {"depth": "2"}, "int"),
    (TransformerConfig, {"depth": None}, "int"),
    (TransformerConfig, {"depth": True}, "int"),
    (TransformerConfig, {"bias": 1}, "bool"),
    (TransformerConfig, {"dropout": True}, "float"),
    (TransformerConfig, {"dtype": ["float32"]}, "one of float32, bfloat16, float16"),
    (DataConfig, {"source": "some.txt"}, "several str"),
    (DataConfig, {"source": ()}, "at least one source"),
    (DataConfig, {"source": ("a", None)}, "several str"),
    (DataConfig, {"target": ("a",)}, "0 of them with the objective causal"),
    (
        DataConfig,
        {"target": ("a",), "source": ("b", "c"), "objective": "sequence_to_sequence"},
        "2 of them with the objective sequence_to_sequence",
    ),
    (DataConfig, {"weights": (1.0, 2.0)}, "a number for each of 1"),
    (DataConfig, {"weights": (0.0,)}, "above 0"),
    (DataConfig, {"weights": (math.inf,)}, "above 0"),
    (DataConfig, {"weights": (math.nan,)}, "above 0"),
    (DataConfig, {"weights": [1.0]}, "several float"),
    (DataConfig, {"validation": ["a"]}, "several str"),
    (DataConfig, {"validation_target": ("a",), "validation": ("b",)}, "0 of them with the obj"),
    (
        DataConfig,
        {
            "validation_target": (),
            "validation": ("a",),
            "target": ("b",),
            "objective": "sequence_to_sequence",
        },
        "1 of them with the objective sequence_to_sequence",
    ),
    (DataConfig, {"objective": "causl"}, "one of causal, masked_lm, next_sentence, sequence_to"),
    (DataConfig, {"packing": "best_fit"}, "one of split, first_fit"),
    (DataConfig, {"packing": "first_fit", "objective": "prefix"}, "split with the objective pre"),
    (DataConfig, {"mask_rate": 0.0}, "between 0 and 1"),
    (DataConfig, {"mask_rate": 1.0}, "between 0 and 1"),
    (DataConfig, {"whole_words": 1}, "bool"),
    (DataConfig, {"whole_words": True}, "False with the objective causal"),
    (DataConfig, {"mean_span": 0.5}, "at least 1"),
    (DataConfig, {"buckets": 0}, "at least 1"),
    (DataConfig, {"cache": None}, "str"),
    (DataConfig, {"streaming": True, "objective": "next_sentence"}, "False with next_sentence"),
    (DataConfig, {"tokenizer": None}, "str"),
    (DataConfig, {"validation_fraction": 0.0}, "between 0 and 1"),
    (DataConfig, {"validation_fraction": 1}, "between 0 and 1"),
    (OptimizerConfig, {"name": "adam"}, "one of adamw, nadamw"),
    (TransformerConfig, {"remat": "some"}, "one of none, full, dots, names, offload"),
    (TransformerConfig, {"attention_kernel": "flash"}, "one of auto, xla, splash, cudnn, triton"),
    (OptimizerConfig, {"mu_dtype": "bfloat16", "name": "radam"}, "float32 with radam"),
    (OptimizerConfig, {"mu_dtype": "float16"}, "one of float32, bfloat16"),
    (MeshConfig, {"data": -1}, "at least 0"),
    (MeshConfig, {"fsdp": 0}, "at least 1"),
    (MeshConfig, {"tensor": 0}, "at least 1"),
    (MeshConfig, {"sequence": -2}, "at least 1"),
    (MeshConfig, {"expert": 0}, "at least 1"),
    (MeshConfig, {"pipeline": 0}, "at least 1"),
    (TransformerConfig, {"microbatches": -1}, "at least 0"),
    (TransformerConfig, {"remat_layers": 3, "scan_layers": True}, "a divisor of depth"),
    (MeshConfig, {"slices": 0}, "at least 1"),
    (MeshConfig, {"data": 3, "slices": 2}, "a multiple of the 2 slices, or 0"),
    (MeshConfig, {"pmap": True, "fsdp": 2}, "False with other axes than data"),
    (OptimizerConfig, {"schedule": "linear"}, "one of cosine, constant, wsd"),
    (OptimizerConfig, {"learning_rate": 0.0}, "above 0"),
    (OptimizerConfig, {"learning_rate": math.nan}, "finite"),
    (OptimizerConfig, {"learning_rate": math.inf}, "finite"),
    (OptimizerConfig, {"muon_learning_rate": -0.1}, "above 0"),
    (OptimizerConfig, {"epsilon": 0.0}, "above 0"),
    (OptimizerConfig, {"warmup_steps": -1}, "at least 0"),
    (OptimizerConfig, {"weight_decay": -0.1}, "at least 0"),
    (OptimizerConfig, {"weight_decay": math.inf}, "finite"),
    (OptimizerConfig, {"clip_norm": -1.0}, "at least 0"),
    (OptimizerConfig, {"clip_norm": math.nan}, "finite"),
    (OptimizerConfig, {"beta1": 1.0}, "at least 0 and below 1"),
    (OptimizerConfig, {"beta2": -0.5}, "at least 0 and below 1"),
    (OptimizerConfig, {"decay_fraction": 1.5}, "between 0 and 1"),
    (OptimizerConfig, {"min_lr_ratio": -0.5}, "between 0 and 1"),
    (DataConfig, {"stages": ("9:1",)}, "beside weights and without streaming"),
    (DataConfig, {"stages": ("9:1",), "weights": (1.0,), "streaming": True}, "without streaming"),
    (DataConfig, {"stages": ("9:1,2",), "weights": (1.0,)}, "a share for each of 1"),
    (DataConfig, {"stages": ("9:0",), "weights": (1.0,)}, "STEP:SHARE"),
    (DataConfig, {"stages": ("9:x",), "weights": (1.0,)}, "STEP:SHARE"),
    (DataConfig, {"stages": ("9",), "weights": (1.0,)}, "STEP:SHARE"),
    (DataConfig, {"stages": ("1:1",), "weights": (1.0,)}, "steps rising from 2"),
    (DataConfig, {"stages": ("9:1", "9:2"), "weights": (1.0,)}, "steps rising from 2"),
    (TrainConfig, {"balance_loss": -1.0}, "at least 0"),
    (TrainConfig, {"router_z_loss": -1.0}, "at least 0"),
    (TrainConfig, {"steps": 0}, "at least 1"),
    (TrainConfig, {"batch_size": 0}, "at least 1"),
    (TrainConfig, {"grad_accumulation": 0}, "at least 1"),
    (TrainConfig, {"grad_accumulation": 3}, "a divisor of batch_size 16"),
    (TrainConfig, {"seed": -1}, "at least 0"),
    (TrainConfig, {"seed": 1 << 32}, "below 2**32"),
    (TrainConfig, {"label_smoothing": 1.0}, "at least 0 and below 1"),
    (TrainConfig, {"z_loss": -1e-4}, "at least 0"),
    (TrainConfig, {"z_loss": math.inf}, "finite"),
    (TrainConfig, {"loss_chunk": -1}, "at least 0"),
    (TrainConfig, {"steps_per_dispatch": -1}, "at least 0"),
    (TrainConfig, {"log_every": 0}, "at least 1"),
    (TrainConfig, {"eval_every": 0}, "at least 1"),
    (TrainConfig, {"checkpoint_every": 0}, "at least 1"),
    (TrainConfig, {"keep_every": -250}, "at least 0"),
    (TrainConfig, {"checkpoint_minutes": -1.0}, "at least 0"),
    (TrainConfig, {"track": ("comet",)}, "several of tensorboard, wandb, mlflow, trackio"),
    (TrainConfig, {"track": ("mlflow", "mlflow")}, "each tracker once"),
    (TrainConfig, {"keep_every": 100}, "a multiple of checkpoint_every 250"),
    (TrainConfig, {"watch_every": 0}, "at least 1"),
    (TrainConfig, {"watch_every": 25, "watch": True}, "a multiple of log_every 10"),
    (TrainConfig, {"profile": "25:20"}, "FIRST:LAST, steps from 1 to 1000, as 20:25"),
    (ExperimentConfig, {"model": {}}, "TransformerConfig"),
]


@pytest.mark.parametrize(
    ("kind", "values", "accepted"),
    REFUSED,
    ids=[f"{kind.__name__}-{values}" for kind, values, _ in REFUSED],
)
def test_a_wrong_value_is_one_sentence_with_field_value_and_what_is_accepted(
    kind, values, accepted
):
    name, value = next(iter(values.items()))
    with pytest.raises(InputError) as error:
        kind(**values)
    sentence = str(error.value)
    assert sentence.startswith(f"{kind.__name__}.{name} is {value!r}: it must be ")
    assert accepted in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_every_field_with_a_rule_is_in_the_table_of_refused_values():
    tested = {(kind, name) for kind, values, _ in REFUSED for name in values}
    free = {  # Any value of their type will do, and the types are tested on their neighbours.
        *(
            (TransformerConfig, name)
            for name in (
                "attention_scaled",
                "embedding_norm",
                "embedding_scaled",
                "final_norm",
                "head_bias",
                "qk_norm",
                "scan_layers",
                "tie_embeddings",
            )
        ),
        *((ExperimentConfig, name) for name in ("data", "optimizer", "train", "mesh")),
    }
    kinds = (
        TransformerConfig,
        DataConfig,
        MeshConfig,
        OptimizerConfig,
        TrainConfig,
        MeshConfig,
        ExperimentConfig,
    )
    fields = {(kind, field.name) for kind in kinds for field in dataclasses.fields(kind)}
    assert tested | free == fields


def test_a_warmup_as_long_as_the_run_is_refused_before_anything_is_written():
    with pytest.raises(InputError, match=r"warmup_steps is 20: it must be below train.steps 20\."):
        ExperimentConfig(optimizer=OptimizerConfig(warmup_steps=20), train=TrainConfig(steps=20))
    ExperimentConfig(optimizer=OptimizerConfig(warmup_steps=19), train=TrainConfig(steps=20))


def test_pmap_makes_one_step_per_dispatch():
    with pytest.raises(
        InputError, match=r"steps_per_dispatch is 2: it must be 0 or 1 with mesh\.pmap"
    ):
        ExperimentConfig(mesh=MeshConfig(pmap=True), train=TrainConfig(steps_per_dispatch=2))
    ExperimentConfig(mesh=MeshConfig(pmap=True), train=TrainConfig(steps_per_dispatch=1))


def test_a_warmup_that_is_not_given_follows_the_length_of_the_run():
    short = ExperimentConfig(train=TrainConfig(steps=20))
    assert short.optimizer.warmup(20) == 4
    assert short.optimizer.warmup(100_000) == 100


def test_an_int_is_taken_where_a_float_is_asked():
    assert OptimizerConfig(learning_rate=1).learning_rate == 1


def test_a_config_cannot_be_changed_once_made():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TransformerConfig().depth = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_widths_left_open_follow_from_the_width():
    config = TransformerConfig(width=48, heads=3)
    assert (config.actual_head_dim, config.actual_mlp_dim) == (16, 192)
    assert TransformerConfig(width=48, heads=3, mlp_dim=10).actual_mlp_dim == 10


@pytest.mark.parametrize("config", [ExperimentConfig(), CUSTOM])
def test_a_config_survives_json(config):
    assert from_dict(ExperimentConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_several_values_are_a_list_in_json_and_several_values_again():
    saved = to_dict(CUSTOM)
    assert saved["data"]["source"] == ["some.txt", "b.txt"]
    assert saved["data"]["target"] == []
    read = from_dict(ExperimentConfig, saved).data
    assert (read.source, read.weights, read.target) == (("some.txt", "b.txt"), (2, 1), ())
    assert hash(read) == hash(CUSTOM.data)


def test_fields_that_a_saved_config_lacks_take_their_defaults():
    assert from_dict(ExperimentConfig, {"model": {"depth": 2}}) == ExperimentConfig(
        model=TransformerConfig(depth=2)
    )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"modle": {}}, "config.json has an unknown field 'modle': did you mean model?"),
        (
            {"train": {"step": 3}},
            "config.json: train has an unknown field 'step': did you mean steps?",
        ),
        ({"model": 3}, "config.json: model holds 3 where the fields of TransformerConfig belong."),
        ([], "config.json holds [] where the fields of ExperimentConfig belong."),
        (
            {"data": {"source": "some.txt"}},
            "DataConfig.source is 'some.txt': it must be several str.",
        ),
        ({"train": {"steps": 0}}, "TrainConfig.steps is 0: it must be at least 1."),
    ],
)
def test_a_saved_config_that_does_not_fit_is_one_sentence(values, sentence):
    with pytest.raises(InputError) as error:
        from_dict(ExperimentConfig, values)
    assert str(error.value) == sentence


def test_an_unknown_name_lists_the_near_ones_or_else_all():
    known = ["gpt2", "gpt2-xl", "bert"]
    assert near_names("gpt2-x", known) == "did you mean gpt2-xl or gpt2?"
    assert near_names("llama", known) == "known are bert, gpt2, gpt2-xl."


def test_differences_name_each_differing_field_with_both_values():
    first, second = to_dict(CUSTOM), to_dict(CUSTOM)
    assert differences(first, second) == []
    second["model"]["depth"] = 6
    second["data"]["source"] = ["embedded"]
    second["data"]["weights"] = []
    del second["train"]["seed"]
    second["new"] = 1
    assert differences(first, second) == [
        "model.depth: 2 -> 6",
        "data.source: ['some.txt', 'b.txt'] -> ['embedded']",
        "data.weights: [2, 1] -> []",
        "train.seed: 4 -> None",
        "new: None -> 1",
    ]


def test_an_open_vocabulary_takes_the_tokenizers_and_a_larger_one_stays():
    assert with_vocabulary(ExperimentConfig(), 65).model.vocab_size == 65
    assert with_vocabulary(CUSTOM, 300) == CUSTOM
    assert with_vocabulary(CUSTOM, 65) == CUSTOM


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    with pytest.raises(InputError) as error:
        with_vocabulary(CUSTOM, 301)
    assert str(error.value) == (
        "TransformerConfig.vocab_size is 300: it must be at least the tokenizer's 301."
    )
