"""Models of Hugging Face's without PyTorch: golden files, and what is refused."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from gptjax import InputError, TransformerConfig, build, from_huggingface, split, to_huggingface
from gptjax.cli import main
from gptjax.commands import convert
from gptjax.config import read_sealed
from gptjax.data.tokenizers import SubwordTokenizer
from gptjax.decoding.generate import Decoding
from gptjax.huggingface import config_from_huggingface, config_to_huggingface, configs, files
from gptjax.huggingface.families import TRANSLATIONS
from gptjax.huggingface.tensors import Row
from gptjax.models.presets import PRESETS, preset
from gptjax.runs.directory import CHECKPOINTS, CONFIG, load_config
from gptjax.runs.loading import load_model, load_run

GOLDEN = ROOT / "tests" / "golden"
VOCABULARY = 17


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A copy of the golden GPT-2, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "gpt2", tmp_path / "gpt2"))


def _change(directory: Path, **fields: object) -> Path:
    """The directory with other fields in its config."""
    path = directory / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def test_every_family_has_a_golden_model():
    assert {path.name for path in GOLDEN.iterdir() if path.is_dir()} == set(TRANSLATIONS)


@pytest.mark.parametrize("name", TRANSLATIONS)
def test_logits_are_those_of_transformers(name):
    model = from_huggingface(GOLDEN / name)
    expected = np.load(GOLDEN / name / "expected.npz")
    tokens = expected["tokens"]
    logits = model(tokens[:, ::-1], source=tokens) if name == "marian" else model(tokens)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", sorted(TRANSLATIONS.keys() - {"bert", "openai-gpt"}))
def test_prompts_of_two_lengths_go_on_as_left_padded_ones_in_transformers(name):
    expected = np.load(GOLDEN / name / "expected.npz")
    rows = [expected["tokens"][0, :2], expected["tokens"][1, :5]]
    source = None
    if name == "marian":
        source, rows = rows, [[VOCABULARY - 1]] * 2
    decoding, starts = Decoding(from_huggingface(GOLDEN / name), 2, source), np.zeros(2, np.int32)
    for place in range(expected["chosen"].shape[1]):
        logits = decoding.read(rows, starts)
        np.testing.assert_allclose(
            logits, expected["chosen_logits"][:, place], atol=1e-5, rtol=0, err_msg=str(place)
        )
        starts = starts + np.array([len(row) for row in rows], np.int32)
        rows = expected["chosen"][:, [place]]


@pytest.mark.parametrize("name", TRANSLATIONS)
def test_what_is_read_is_written_back(name, tmp_path):
    model = from_huggingface(GOLDEN / name)
    to_huggingface(model, tmp_path / "written", fields={"eos_token_id": 3})
    given, written = (
        load_file(GOLDEN / name / files.WEIGHTS),
        load_file(tmp_path / "written" / files.WEIGHTS),
    )
    assert given.keys() == written.keys()
    for key, tensor in given.items():
        np.testing.assert_array_equal(tensor, written[key], err_msg=key)
    config = json.loads((tmp_path / "written" / files.CONFIG).read_text())
    assert config["model_type"] == name
    assert config["eos_token_id"] == 3


def test_an_axis_of_the_layout_is_where_it_says():
    row = Row("attention.{part}.kernel", "query_key_value", "PDNH -> NPH D")
    leaves = [np.random.default_rng(seed).normal(size=(5, 2, 3)) for seed in range(3)]
    tensor = row.tensor(leaves)
    assert tensor.shape == row.shape((5, 2, 3)) == (18, 5)
    value, head, channel = 2, 1, 0
    np.testing.assert_array_equal(
        tensor[head * 9 + value * 3 + channel], leaves[value][:, head, channel]
    )
    for back, leaf in zip(row.leaves(tensor, (5, 2, 3)), leaves, strict=True):
        np.testing.assert_array_equal(back, leaf)


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt1", "gpt-j-6b", "pythia-160m", "bert-base", "smollm-135m", "mistral-style"]
)
def test_a_preset_survives_their_config(name):
    config = preset(name)
    assert config_from_huggingface(config_to_huggingface(config)).width == config.width
    shapes = jax.tree.map(
        jnp.shape, split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))[1]
    )
    again = config_from_huggingface(config_to_huggingface(config))
    assert shapes == jax.tree.map(
        jnp.shape, split(nnx.eval_shape(lambda: build(again, rngs=nnx.Rngs(0))))[1]
    )


def test_a_model_that_no_family_computes_is_refused(tmp_path):
    config = TransformerConfig(vocab_size=5, width=8, heads=2, depth=1, qk_norm=True)
    with pytest.raises(InputError, match=r"nearest, gpt2, would change qk_norm: True -> False\."):
        to_huggingface(build(config, rngs=nnx.Rngs(0)), tmp_path / "written")
    assert not (tmp_path / "written").exists()
    with pytest.raises(InputError, match=r"would change logit_scale: 0\.5 -> 1\.0\."):
        config_to_huggingface(dataclasses.replace(PRESETS["gpt2"], logit_scale=0.5))
    for name in ("gemma-style", "moe", "lstm", "alibi"):
        with pytest.raises(InputError, match="No family of Hugging Face's computes"):
            config_to_huggingface(PRESETS[name])


GPT1 = {"norm_placement": "post", "final_norm": False}
GPTJ = {
    "position_embedding": "rotary",
    "pairing": "interleaved",
    "norm_placement": "parallel_shared",
    "query_bias": False,
    "output_bias": False,
    "head_bias": True,
    "tie_embeddings": False,
}
NEOX = {"position_embedding": "rotary", "tie_embeddings": False, "norm_placement": "parallel"}
LLAMA = {"position_embedding": "rotary", "norm": "rmsnorm", "bias": False, "activation": "swiglu"}
BERT = {**GPT1, "family": "encoder", "embedding_norm": True, "activation": "gelu"}
MARIAN = {
    **GPT1,
    "family": "encoder_decoder",
    "position_embedding": "sinusoidal",
    "head_bias": True,
    "activation": "silu",
}
MAPPED = {
    # A field: its value, and what else a model has that some family computes.
    "family": ("encoder", BERT),
    "vocab_size": (7, {}),
    "context_length": (9, {}),
    "depth": (3, {}),
    "encoder_depth": (3, MARIAN),
    "width": (64, {}),
    "heads": (2, {}),
    "kv_heads": (2, LLAMA),
    "head_dim": (6, LLAMA),
    "mlp_dim": (40, {}),
    "position_embedding": ("rotary", LLAMA),
    "pairing": ("interleaved", GPTJ),
    "rotary_fraction": (0.5, NEOX),
    "rope_theta": (500.0, LLAMA),
    "norm": ("rmsnorm", LLAMA),
    "norm_placement": ("post", GPT1),
    "norm_epsilon": (1e-6, {}),
    "embedding_norm": (True, BERT),
    "final_norm": (False, GPT1),
    "attention": ("local", {**LLAMA, "window": 3}),
    "window": (3, {**LLAMA, "attention": "local"}),
    "attention_scaled": (False, {"query_bias": False}),
    "activation": ("relu", {}),
    "bias": (False, LLAMA),
    "query_bias": (False, {"attention_scaled": False}),
    "output_bias": (False, GPTJ),
    "tie_embeddings": (False, {}),
    "head_bias": (True, GPTJ),
    "embedding_scaled": (True, MARIAN),
    "token_types": (3, BERT),
    "encoder_heads": ("masked_lm", {**BERT, "head_bias": True}),
}
REFUSED = {
    "attention_normalizer": ("sigmoid", {}),
    "attention_softcap": (5.0, {}),
    "qk_norm": (True, {}),
    "num_experts": (2, {}),
    "experts_per_token": (1, {"num_experts": 2}),
    "compression": (2, {"attention": "compressed"}),
    "logit_softcap": (5.0, {}),
    "logit_scale": (0.5, {}),
}
IRRELEVANT = {
    "dropout": (0.5, {}),
    "capacity_factor": (1.5, {}),
    "dtype": ("bfloat16", {}),
    "attention_kernel": ("xla", {}),
    "scan_layers": (True, {}),
    "remat": ("full", {}),
    "remat_layers": (2, {"scan_layers": True}),
    "microbatches": (2, {}),
}


def _chosen(field: str, value: object, others: dict) -> TransformerConfig:
    sizes = {"vocab_size": 5, "context_length": 8, "width": 32, "depth": 2}
    return TransformerConfig(**{**sizes, **others, field: value})


def test_every_field_is_written_or_refused_or_changes_nothing():
    fields = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    assert sorted([*MAPPED, *REFUSED, *IRRELEVANT]) == sorted(fields)
    assert configs.IRRELEVANT.keys() == IRRELEVANT.keys()
    for field, (value, others) in MAPPED.items():
        assert value != fields[field]
        config = _chosen(field, value, others)
        again = config_from_huggingface(config_to_huggingface(config))
        assert getattr(again, field) == value, field
    for field, (value, others) in REFUSED.items():
        with pytest.raises(InputError, match=rf"{field}: {value} -> | computes a model of these"):
            config_to_huggingface(_chosen(field, value, others))
    plain = config_to_huggingface(_chosen("dtype", "float32", {}))
    for field, (value, others) in IRRELEVANT.items():
        written = config_to_huggingface(_chosen(field, value, others))
        rates = {name: value for name in written if field == "dropout" and name.endswith("pdrop")}
        assert written == plain | rates, field


def test_how_a_model_was_trained_does_not_change_its_files(tmp_path):
    trained = {field: value for field, (value, _) in IRRELEVANT.items() if field != "dropout"}
    directories = tmp_path / "plain", tmp_path / "trained"
    for directory, fields in zip(directories, ({}, trained), strict=True):
        config = dataclasses.replace(_chosen("dropout", 0.0, {}), **fields)
        to_huggingface(build(config, rngs=nnx.Rngs(0)), directory)
    plain, trained = ({path.name: path.read_bytes() for path in d.iterdir()} for d in directories)
    assert plain == trained


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("gpt2", {"activation_function": "mish"}, "activation_function is 'mish'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx is True"),
        ("gpt2", {"model_type": "gpt3"}, r"model_type is 'gpt3', .* did you mean .*gpt2"),
        ("gpt2", {"n_head": None}, "n_head is None: it must be a size"),
        ("gpt2", {"n_head": 3}, "TransformerConfig.heads is 3"),
        ("gpt_neo", {"attention_layers": ["global"]}, "attention_layers is"),
        ("gptj", {"rotary_dim": 3}, "rotary_dim is 3: .* an even number of at most 4"),
        ("gpt_neox", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is .*yarn"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("bert", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*linear"),
        ("llama", {"rope_parameters": "fast"}, "holds a field of another kind"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types is"),
        ("marian", {"normalize_before": True}, "normalize_before is True"),
        ("marian", {"encoder_ffn_dim": 99}, "encoder_ffn_dim is 99"),
    ],
)
def test_a_field_that_is_not_computed_is_refused(name, fields, sentence, tmp_path):
    directory = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    with pytest.raises(InputError, match=sentence) as error:
        from_huggingface(_change(directory, **fields))
    assert "\n" not in str(error.value)


ABSURD = [
    # A family, a field of its config.json as text, and what is said of it.
    ("gpt2", '"n_layer": 1000000000', r"n_layer is 1000000000: it must be at most 65536"),
    ("gpt2", '"n_layer": 65536', r"does not fit its config: for 65,536 layers it has \d+ tensors"),
    ("gpt2", '"vocab_size": 1099511627776', "vocab_size is 1099511627776: .* below 2"),
    ("gpt2", '"n_embd": 2147483647, "n_head": 1', "does not fit its config: "),
    ("gpt2", '"n_inner": 1e30', "TransformerConfig.mlp_dim is 1e"),
    ("gpt2", '"n_inner": 2147483648', "does not fit its config: "),
    ("gpt2", '"n_head": ' + "7" * 5_000, "it has a number of 5,000 digits"),
    ("gpt2", '"layer_norm_epsilon": NaN', "norm_epsilon is nan: it must be finite"),
    ("gpt2", '"layer_norm_epsilon": 1e-50', "norm_epsilon is 1e-50: it must be 0, or from"),
    ("gpt2", '"vocab_size": 17, "x": ' + "[" * 99_999 + "]" * 99_999, "brackets are more than 100"),
    (
        "gpt_neo",
        '"attention_layers": null, "attention_types": [[["global"], 1000000000]]',
        "_layers is",
    ),
    ("gpt_neox", '"rope_parameters": null, "rotary_pct": Infinity', "of another kind"),
    ("gpt_neox", '"rope_parameters": null, "rotary_pct": NaN', "of another kind"),
    ("llama", '"rope_theta": Infinity, "rope_parameters": null', "rope_theta is inf: .* finite"),
    (
        "llama",
        '"rope_theta": 1e39, "rope_parameters": null',
        "rope_theta is 1e.39: it must be 0, or from",
    ),
    ("llama", '"rope_scaling": {"factor": 4.0}', "rope_scaling is .*factor"),
    ("qwen2", '"num_hidden_layers": 1000000000, "layer_types": null', "num_hidden_layers is 1000"),
]


@pytest.mark.parametrize(("name", "field", "sentence"), ABSURD)
def test_an_absurd_number_takes_neither_time_nor_memory(name, field, sentence, tmp_path):
    directory = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    whole = (directory / files.CONFIG).read_text().rstrip().removesuffix("}").rstrip()
    (directory / files.CONFIG).write_text(f"{whole}, {field}}}")  # The last of two counts.
    with pytest.raises(InputError, match=sentence) as error:
        from_huggingface(directory)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2_000


def test_a_header_of_safetensors_is_not_believed(gpt2):
    whole = (gpt2 / files.WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    first, second = list(header)[-2:]
    overlapping = {
        **header,
        second: {**header[second], "data_offsets": header[first]["data_offsets"]},
    }
    beyond = {**header, second: {**header[second], "data_offsets": [0, 1 << 62]}}
    for begins in (
        (1 << 63).to_bytes(8, "little"),
        (1 << 64) - 1,
        10**9,
        0,
        overlapping,
        beyond,
        b"[" * 99_999,
    ):
        if isinstance(begins, int):
            begins = begins.to_bytes(8, "little")
        if isinstance(begins, dict):
            begins = json.dumps(begins).encode()
        if len(begins) > 8:
            begins = len(begins).to_bytes(8, "little") + begins
        (gpt2 / files.WEIGHTS).write_bytes(begins + whole[8 + length :])
        with pytest.raises(InputError, match=r"model\.safetensors is damaged or cut short"):
            from_huggingface(gpt2)


def test_what_is_no_regular_file_is_not_waited_for(gpt2):
    (gpt2 / files.WEIGHTS).unlink()
    os.mkfifo(gpt2 / files.WEIGHTS)
    with pytest.raises(InputError, match=r"model\.safetensors is no regular file"):
        from_huggingface(gpt2)
    with pytest.raises(InputError, match=r"cannot read 'x{100}.*: File name too long\.$"):
        from_huggingface("x" * 300)
    with pytest.raises(InputError, match=r"cannot write .*: File name too long\.$"):
        convert(str(GOLDEN / "gpt2"), gpt2 / ("x" * 300))


def test_all_misfits_are_in_one_sentence(gpt2):
    tensors = load_file(gpt2 / files.WEIGHTS)
    tensors["transformer.h.0.ln_1.scale"] = tensors.pop("transformer.h.0.ln_1.weight")
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:4].copy()
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)  # A mask: ignored.
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    save_file(tensors, gpt2 / files.WEIGHTS)
    with pytest.raises(InputError) as error:
        from_huggingface(gpt2)
    _, sentence = str(error.value).split("its config: ")
    assert sentence.split("; ") == [
        "lm_head.weight differs from transformer.wte.weight, though config.json ties the two",
        "transformer.h.0.ln_1.scale is unexpected",
        "transformer.h.0.ln_1.weight is missing",
        "transformer.wpe.weight is [4, 8], not [8, 8].",
    ]


def test_names_of_old_checkpoints_are_known(gpt2):
    expected = from_huggingface(gpt2)
    tensors = {
        name.removeprefix("transformer.").replace("ln_f.weight", "ln_f.gamma"): tensor
        for name, tensor in load_file(gpt2 / files.WEIGHTS).items()
    }
    tensors["lm_head.weight"] = tensors.pop("wte.weight")  # The one of the two that was kept.
    save_file(tensors, gpt2 / files.WEIGHTS)
    jax.tree.map(
        np.testing.assert_array_equal, split(from_huggingface(gpt2))[1], split(expected)[1]
    )


def test_damaged_weights_are_refused(gpt2):
    whole = (gpt2 / files.WEIGHTS).read_bytes()
    for length in (0, 100, len(whole) - 1):
        (gpt2 / files.WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"model.safetensors is damaged or cut short"):
            from_huggingface(gpt2)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (np.full(8, np.nan, np.float32), "ln_f.bias holds a NaN"),
        (np.full(8, -np.inf, np.float32), "ln_f.bias holds an infinity"),
        (np.full(8, np.inf, np.float16), "ln_f.bias holds an infinity"),
        (np.full(8, 1e39, np.float64), r"holds a number of size 1e\+39, too large for float32"),
        (np.full(8, True), "ln_f.bias is bool"),
        (np.ones(8, np.int32), "ln_f.bias is int32"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(gpt2, value, sentence):
    tensors = load_file(gpt2 / files.WEIGHTS)
    save_file({**tensors, "transformer.ln_f.bias": value}, gpt2 / files.WEIGHTS)
    with pytest.raises(InputError, match=sentence):
        from_huggingface(gpt2)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float8_e4m3fn])
def test_what_is_too_large_for_a_type_is_refused(gpt2, dtype):
    from_huggingface(gpt2, dtype=dtype)
    tensors = load_file(gpt2 / files.WEIGHTS)
    bias = np.zeros(8, np.float32)
    bias[3] = -1e5
    save_file({**tensors, "transformer.ln_f.bias": bias}, gpt2 / files.WEIGHTS)
    sentence = rf"ln_f.bias holds a number of size 100000, too large for {np.dtype(dtype).name} "
    with pytest.raises(InputError, match=sentence):
        from_huggingface(gpt2, dtype=dtype)
    assert split(from_huggingface(gpt2))[1]["decoder"]["norm"]["bias"][3] == -1e5


def test_parameters_are_no_integers(gpt2):
    with pytest.raises(InputError, match=r"dtype is int8: parameters are floating-point numbers"):
        from_huggingface(gpt2, dtype=jnp.int8)


def test_a_pickle_is_not_opened(gpt2):
    (gpt2 / files.WEIGHTS).rename(gpt2 / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin alone, a pickle, .* save_pretrained"):
        from_huggingface(gpt2)
    (gpt2 / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"holds neither model\.safetensors nor"):
        from_huggingface(gpt2)
    (gpt2 / files.CONFIG).unlink()
    with pytest.raises(InputError, match=r"cannot read .*config.json"):
        from_huggingface(gpt2)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "must lie in the same directory"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing"),
        ({"weight_map": {"a": "one.safetensors"}}, "one.safetensors lacks a"),
        ({"weight_map": {"a": "x" * 300}}, "File name too long"),
        ({"weight_map": {"a": "one.safetensors\0"}}, "must lie in the same directory"),
        ({"weight_map": {"a": ".."}}, "is no regular file"),
        ({"weight_map": {"a": None}}, "names None: a file must lie in the same directory"),
        ({"weight_map": {f"a{n}": "one.safetensors" for n in range(50)}}, "; and 30 more"),
        ({}, "has no weight_map"),
        ([], "holds list, not a JSON object"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(gpt2, index, sentence):
    (gpt2 / files.WEIGHTS).rename(gpt2 / "one.safetensors")
    (gpt2 / files.INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=sentence):
        from_huggingface(gpt2)


def _in_shards(gpt2: Path, *more: tuple[str, str]) -> dict[str, str]:
    """Weights in two shards with their index; `more` names tensors and shards that hold them too.

    Returns:
      The index: the shard of each tensor.
    """
    tensors = load_file(gpt2 / files.WEIGHTS)
    (gpt2 / files.WEIGHTS).unlink()
    names = sorted(tensors)
    held = {"first.safetensors": names[:5], "second.safetensors": names[5:]}
    index = {name: shard for shard, names in held.items() for name in names}
    for name, shard in more:
        held[shard] = [*held[shard], name]
    for shard, names in held.items():
        save_file({name: tensors[name] for name in names}, gpt2 / shard)
    (gpt2 / files.INDEX).write_text(json.dumps({"weight_map": index}))
    return index


def test_shards_are_read(gpt2):
    expected = split(from_huggingface(gpt2))[1]
    index = _in_shards(gpt2)
    jax.tree.map(np.testing.assert_array_equal, split(from_huggingface(gpt2))[1], expected)
    unnamed = next(iter(index))
    (gpt2 / files.INDEX).write_text(
        json.dumps({"weight_map": {name: index[name] for name in index if name != unnamed}})
    )  # What a shard holds beside is taken, as in transformers.
    jax.tree.map(np.testing.assert_array_equal, split(from_huggingface(gpt2))[1], expected)


def test_one_file_counts_before_shards_and_pickles_beside_it(gpt2):
    """As in transformers, whose second save leaves the first one's index."""
    expected = split(from_huggingface(gpt2))[1]
    whole = (gpt2 / files.WEIGHTS).read_bytes()
    index = _in_shards(gpt2)
    (gpt2 / files.WEIGHTS).write_bytes(whole)
    stale = np.zeros((1, 1), np.float32)
    for shard in set(index.values()):
        save_file({name: stale for name in index if index[name] == shard}, gpt2 / shard)
    (gpt2 / "pytorch_model.bin").write_bytes(b"no pickle")
    jax.tree.map(np.testing.assert_array_equal, split(from_huggingface(gpt2))[1], expected)
    (gpt2 / files.INDEX).write_text("[")
    jax.tree.map(np.testing.assert_array_equal, split(from_huggingface(gpt2))[1], expected)


def test_a_tensor_in_two_shards_or_in_another_is_refused(gpt2):
    index = _in_shards(gpt2, ("transformer.wte.weight", "first.safetensors"))
    assert index["transformer.wte.weight"] == "second.safetensors"
    with pytest.raises(InputError, match=r"wte.weight twice, in first\.\w+ and second\.\w+\.$"):
        from_huggingface(gpt2)
    name = next(name for name in index if index[name] == "first.safetensors")
    save_file({"unnamed": np.ones(1, np.float32)}, gpt2 / "first.safetensors")
    with pytest.raises(InputError, match=rf"missing: first.safetensors lacks {name}"):
        from_huggingface(gpt2)


def test_a_name_on_the_hub_without_a_network_fails_in_one_sentence(monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="the extra huggingface is missing")

    def no_network(*_: object, **options: object) -> str:
        assert options["etag_timeout"] == files.TIMEOUT_SECONDS
        raise hub.errors.LocalEntryNotFoundError("Name or service not known\nCheck it.")

    monkeypatch.setattr(hub, "snapshot_download", no_network)
    with pytest.raises(InputError, match=r"a/b is no directory, and the download .* not known\.$"):
        from_huggingface("a/b")
    with pytest.raises(InputError, match="no OWNER/NAME of the hub's: there is no directory /a"):
        from_huggingface("/a/b c")


def test_without_the_extra_the_hub_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'gptjax\[huggingface\]'"):
        from_huggingface("a/b")


def test_each_parameter_goes_where_it_is_told():
    mesh = jax.make_mesh((8,), ("model",), (jax.sharding.AxisType.Auto,))
    one = NamedSharding(mesh, PartitionSpec())
    wide = NamedSharding(mesh, PartitionSpec(None, None, "model"))

    def place(path: str, shape: jax.ShapeDtypeStruct) -> NamedSharding:
        return wide if path.endswith("mlp.up.kernel") and shape.shape[2] == 32 else one

    expected = split(from_huggingface(GOLDEN / "gpt2"))[1]
    placed = split(from_huggingface(GOLDEN / "gpt2", sharding=place))[1]
    assert placed["decoder"]["blocks"]["mlp"]["up"]["kernel"].sharding == wide
    assert placed["embedding"]["table"].sharding == one
    tree = jax.tree.map(lambda leaf: leaf.sharding, placed)
    by_tree = split(from_huggingface(GOLDEN / "gpt2", sharding=tree))[1]
    by_one = split(from_huggingface(GOLDEN / "gpt2", sharding=one))[1]
    assert jax.tree.all(jax.tree.map(lambda leaf: leaf.sharding == one, by_one))
    assert jax.tree.map(lambda leaf: leaf.sharding, by_tree) == tree
    jax.tree.map(np.testing.assert_array_equal, placed, expected)


def test_a_tokenizer_goes_along_both_ways(tmp_path, gpt2, capsys):
    tokenizer = SubwordTokenizer.train("one and one are two", 270)
    (gpt2 / files.TOKENIZER).write_bytes(tokenizer.save())
    convert(str(gpt2), tmp_path / "run")
    assert capsys.readouterr().out == (
        f"{tmp_path / 'run'} is {gpt2} as a run, with its tokenizer.\n"
    )
    run = load_run(tmp_path / "run")
    np.testing.assert_array_equal(run.tokenizer.encode("two"), tokenizer.encode("two"))
    convert(str(tmp_path / "run"), tmp_path / "back")
    assert capsys.readouterr().out.endswith(", with its tokenizer.\n")
    assert (tmp_path / "back" / files.TOKENIZER).read_bytes() == tokenizer.save()


def test_a_damaged_tokenizer_is_refused_before_anything_is_written(tmp_path, gpt2):
    (gpt2 / files.TOKENIZER).write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer"):
        convert(str(gpt2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_imported_model_claims_no_data_and_no_message_offers_to_delete_it(tmp_path, command):
    run = tmp_path / "run"
    assert command("convert", GOLDEN / "gpt2", run)[0] == 0
    assert read_sealed(run / CONFIG)["config"].keys() == {"model"}
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = {
        "which cannot be resumed": ([], ["--data.tokenizer", "characters"]),
        "which --overwrite does not delete": (["--overwrite"],),
    }
    for reason, tries in refused.items():
        for flags in tries:
            code, _, sentence = command("train", "--out", run, *flags)
            assert code == 2
            assert sentence == f"{run} holds an imported model, {reason}: choose another --out.\n"
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    weights = max((run / CHECKPOINTS / "0" / "params").rglob("d/*"), key=os.path.getsize)
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(InputError, match="there is no other: convert the model again"):
        load_model(run)


def test_a_converted_model_is_a_run_and_comes_back(tmp_path, capsys):
    convert(str(GOLDEN / "llama"), tmp_path / "run")
    assert "without a tokenizer" in capsys.readouterr().out
    expected = from_huggingface(GOLDEN / "llama")
    assert load_config(tmp_path / "run").model == expected.config
    _, model, step = load_model(tmp_path / "run")
    assert step == 0
    jax.tree.map(np.testing.assert_array_equal, split(model)[1], split(expected)[1])

    convert(str(tmp_path / "run"), tmp_path / "back")
    given = load_file(GOLDEN / "llama" / files.WEIGHTS)
    written = load_file(tmp_path / "back" / files.WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, given, written)

    for destination in ("run", "back"):
        with pytest.raises(InputError, match="is there already: choose another, or delete it"):
            convert(str(GOLDEN / "llama"), tmp_path / destination)
    with pytest.raises(InputError, match=r"step is 3: .* is no run"):
        convert(str(GOLDEN / "llama"), tmp_path / "new", step=3)


@pytest.mark.slow
def test_a_run_becomes_a_directory_of_theirs(tiny_run, tmp_path):
    convert(str(tiny_run), tmp_path / "written")
    _, model, _ = load_model(tiny_run)
    again = from_huggingface(tmp_path / "written")
    tokens = jnp.arange(10)[None]
    np.testing.assert_array_equal(model(tokens), again(tokens))


def test_the_command_refuses_in_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gptjax", "convert", str(GOLDEN / "gpt2"), str(tmp_path)])
    (tmp_path / "kept").write_text("")
    with pytest.raises(SystemExit, match="2"):
        main()
    assert (
        capsys.readouterr().err == f"{tmp_path} is there already: choose another, or delete it.\n"
    )
