"""Models of Hugging Face's without PyTorch: golden files, and what is refused."""

import dataclasses
import json
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
from gptjax.data.tokenizers import SubwordTokenizer
from gptjax.generate import Decoding
from gptjax.huggingface import config_from_huggingface, config_to_huggingface, files
from gptjax.huggingface.families import TRANSLATIONS
from gptjax.huggingface.tensors import Row
from gptjax.presets import PRESETS, preset
from gptjax.runs import load_config, load_model, load_run

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
        (np.ones(8, np.int32), "ln_f.bias is of int32"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(gpt2, value, sentence):
    tensors = load_file(gpt2 / files.WEIGHTS)
    save_file({**tensors, "transformer.ln_f.bias": value}, gpt2 / files.WEIGHTS)
    with pytest.raises(InputError, match=sentence):
        from_huggingface(gpt2)


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
        ({"weight_map": {"a": files.WEIGHTS}}, "model.safetensors lacks a"),
        ({}, "has no weight_map"),
        ([], "holds list, not a JSON object"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(gpt2, index, sentence):
    (gpt2 / files.INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=sentence):
        from_huggingface(gpt2)


def test_shards_are_read(gpt2):
    expected = split(from_huggingface(gpt2))[1]
    tensors = load_file(gpt2 / files.WEIGHTS)
    (gpt2 / files.WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {"first.safetensors": names[:5], "second.safetensors": names[5:]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, gpt2 / shard)
    index = {name: shard for shard, held in shards.items() for name in held}
    (gpt2 / files.INDEX).write_text(json.dumps({"weight_map": index}))
    jax.tree.map(np.testing.assert_array_equal, split(from_huggingface(gpt2))[1], expected)


def test_a_name_on_the_hub_without_a_network_fails_in_one_sentence(monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="the extra huggingface is missing")

    def no_network(*_: object, **options: object) -> str:
        assert options["etag_timeout"] == files.TIMEOUT_SECONDS
        raise hub.errors.LocalEntryNotFoundError("Name or service not known\nCheck it.")

    monkeypatch.setattr(hub, "snapshot_download", no_network)
    with pytest.raises(InputError, match=r"a/b is no directory, and the download .* not known\.$"):
        from_huggingface("a/b")
    with pytest.raises(InputError, match="no name of a model on the hub either"):
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
        return wide if path.endswith("feedforward.up.kernel") and shape.shape[2] == 32 else one

    expected = split(from_huggingface(GOLDEN / "gpt2"))[1]
    placed = split(from_huggingface(GOLDEN / "gpt2", sharding=place))[1]
    assert placed["decoder"]["blocks"]["feedforward"]["up"]["kernel"].sharding == wide
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
