"""GGUF files of the Llama family, written here as llama.cpp's conversion writes them."""

import re
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx
from safetensors.numpy import load_file

from gptjax import (
    InputError,
    TransformerConfig,
    build,
    from_gguf,
    from_huggingface,
    split,
    to_huggingface,
)
from gptjax.data.tokenizers.special import DecodingTokens
from gptjax.huggingface import gguf_keys
from gptjax.huggingface.gguf_format import read_layout
from gptjax.huggingface.gguf_keys import config_of_keys
from gptjax.runs.directory import load_config
from gptjax.runs.loading import decoding_tokens

gguf = pytest.importorskip("gguf", reason="the extra gguf is missing")

GOLDEN = ROOT / "tests" / "golden"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _write(
    source: Path,
    path: Path,
    architecture: str = "llama",
    quantisation=None,
    keys: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
):
    """A model of Hugging Face's as GGUF; `keys` are added or replaced, or left out by a None."""
    config = from_huggingface(source).config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.depth)
    writer.add_context_length(config.context_length)
    writer.add_feed_forward_length(config.actual_mlp_dim)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.actual_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.actual_head_dim)
    for key, value in (keys or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    for name, tensor in tensors.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        name = name.replace("model.layers.", "blk.")
        heads = {"attn_q": config.heads, "attn_k": config.actual_kv_heads}
        if architecture == "llama" and name.split(".")[-2] in heads:
            # llama.cpp, convert_hf_to_gguf.py: permute.
            halves = tensor.reshape(heads[name.split(".")[-2]], 2, -1, *tensor.shape[1:])
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        if quantisation is not None and tensor.ndim == 2:
            quantised = gguf.quants.quantize(tensor, quantisation)
            writer.add_tensor(name, quantised, raw_dtype=quantisation)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("name", "architecture"), [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2")]
)
def test_a_gguf_is_the_model_that_it_was_made_from(name, architecture, tmp_path):
    path = _write(GOLDEN / name, tmp_path / "model.gguf", architecture)
    model, expected = from_gguf(path), from_huggingface(GOLDEN / name)
    jax.tree.map(np.testing.assert_array_equal, split(model)[1], split(expected)[1])
    if name != "mistral":  # GGUF says nothing of its window.
        tokens = np.arange(8)[None]
        np.testing.assert_array_equal(model(tokens), expected(tokens))


@pytest.mark.parametrize(("quantisation", "tolerance"), [("F16", 1e-4), ("Q8_0", 1e-3)])
def test_what_is_quantised_is_computed_back(quantisation, tolerance, tmp_path):
    config = TransformerConfig(
        vocab_size=32,
        context_length=8,
        depth=1,
        width=32,
        heads=2,
        mlp_dim=64,
        position_embedding="rotary",
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
    )
    model = build(config, rngs=nnx.Rngs(0))
    to_huggingface(model, tmp_path / "theirs")
    kind = gguf.GGMLQuantizationType[quantisation]
    path = _write(tmp_path / "theirs", tmp_path / "model.gguf", quantisation=kind)

    def check(found, expected):
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)

    jax.tree.map(check, split(from_gguf(path))[1], split(model)[1])


def test_what_is_no_llama_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"general\.architecture is 'gemma'"):
        from_gguf(_write(GOLDEN / "llama", tmp_path / "gemma.gguf", "gemma"))
    yarn = {"llama.rope.scaling.type": "yarn"}
    with pytest.raises(InputError, match=r"llama\.rope\.scaling\.type is 'yarn'"):
        from_gguf(_write(GOLDEN / "llama", tmp_path / "yarn.gguf", keys=yarn))


NEUTRAL_KEYS = {
    "general.type": "model",
    "general.file_type": 1,
    "granite.logit_scale": 8.0,  # Another architecture's.
    "split.count": 1,
    "tokenizer.ggml.tokens": ["a", "b"],
    "llama.attention.causal": True,
    "llama.attention.clamp_kqv": 0.0,
    "llama.attention.layer_norm_epsilon": 1e-5,
    "llama.attention.scale": 0.0,
    "llama.attention.sliding_window": 4096,
    "llama.attention.head_count": [4, 4],
    "llama.attention.head_count_kv": [2, 2],
    "llama.embedding_scale": 1.0,
    "llama.expert_count": 0,
    "llama.feed_forward_length": [16, 16],
    "llama.logit_scale": 0.0,
    "llama.pooling_type": 3,
    "llama.rope.scaling.attn_factor": 1.0,
    "llama.rope.scaling.finetuned": True,
    "llama.rope.scaling.original_context_length": 4,
    "llama.rope.scaling.type": "none",
    "llama.rope.scaling.factor": 4.0,  # Without effect where the type is none.
    "llama.tensor_data_layout": "Meta AI original pth",
    "llama.vocab_size": 99,
}
CHANGING_KEYS = {
    "general.type": "adapter",
    "split.count": 2,
    "llama.attention.causal": False,
    "llama.attention.clamp_kqv": 8.0,
    "llama.attention.head_count": [4, 2],
    "llama.attention.head_count_kv": [2, 2, 2],
    "llama.attention.key_length": 0,
    "llama.attention.layer_norm_rms_epsilon": float("nan"),
    "llama.attention.scale": 0.25,
    "llama.attention.sliding_window": 3,
    "llama.attention.value_length": 3,
    "llama.block_count": 0,
    "llama.context_length": 1.5,
    "llama.embedding_length": "8",
    "llama.embedding_length_out": 4,
    "llama.embedding_scale": 12.0,
    "llama.expert_count": 8,
    "llama.feed_forward_length": [16, 8],
    "llama.final_logit_softcapping": 30.0,
    "llama.logit_scale": 8.0,
    "llama.residual_scale": 0.22,
    "llama.rope.dimension_count": 1,
    "llama.rope.freq_base": float("inf"),
    "llama.rope.scaling.attn_factor": 1.2,
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scale_linear": 4.0,
    "llama.rope.scaling.type": "longrope",
    "llama.use_parallel_residual": True,
}


def test_keys_that_change_nothing_are_taken(tmp_path):
    expected = from_huggingface(GOLDEN / "llama")
    keys = {**NEUTRAL_KEYS}
    config = expected.config
    keys["llama.attention.head_count"] = [config.heads] * config.depth
    keys["llama.attention.head_count_kv"] = [config.actual_kv_heads] * config.depth
    keys["llama.feed_forward_length"] = [config.actual_mlp_dim] * config.depth
    model = from_gguf(_write(GOLDEN / "llama", tmp_path / "model.gguf", keys=keys))
    assert model.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, split(model)[1], split(expected)[1])


@pytest.mark.parametrize("key", CHANGING_KEYS)
def test_a_key_that_changes_the_computation_is_refused_by_name(key, tmp_path):
    path = _write(GOLDEN / "llama", tmp_path / "model.gguf", keys={key: CHANGING_KEYS[key]})
    with pytest.raises(InputError, match=rf"model\.gguf: {re.escape(key)} is ") as error:
        from_gguf(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("linear", [{}, {"qwen2.rope.scaling.type": "linear"}])
@pytest.mark.parametrize("key", ["qwen2.rope.scaling.factor", "qwen2.rope.scale_linear"])
def test_scaling_without_a_type_is_linear(linear, key, tmp_path):
    scaled = _write(GOLDEN / "qwen2", tmp_path / "4.gguf", "qwen2", keys={**linear, key: 4.0})
    with pytest.raises(InputError, match=rf"{re.escape(key)} is 4\.0"):
        from_gguf(scaled)
    for factor in (0.0, 1.0):
        from_gguf(
            _write(GOLDEN / "qwen2", tmp_path / "1.gguf", "qwen2", keys={**linear, key: factor})
        )


@pytest.mark.parametrize("architecture", gguf_keys.FAMILIES)
def test_every_key_of_the_package_is_read_or_without_effect_or_refused(architecture, tmp_path):
    """Of all keys that any model of llama.cpp's may have, whatever versions to come add."""
    groups = [vars(group) for group in vars(gguf.Keys).values() if isinstance(group, type)]
    patterns = {key for group in groups for key in group.values() if isinstance(key, str)}
    keys = {key.removeprefix("{arch}.") for key in patterns if key.startswith("{arch}.")}
    assert len(keys) > 90
    path = _write(GOLDEN / architecture, tmp_path / "model.gguf", architecture)
    given = read_layout(path, gguf.GGML_QUANT_SIZES).keys
    silent = set()
    for key in keys:
        name = f"{architecture}.{key}"
        try:
            config_of_keys({**given, name: 7.0})
        except InputError as error:
            refused = str(error)
        else:
            refused = ""
            silent.add(key)
        assert refused.startswith(f"{name} is 7.0") == (key not in silent)
    numbers = {"attention.layer_norm_rms_epsilon", "rope.freq_base"}
    assert silent == keys & gguf_keys.WITHOUT_EFFECT.keys() | numbers


@pytest.mark.parametrize(
    "key", ["block_count", "context_length", "attention.layer_norm_rms_epsilon"]
)
def test_a_key_that_every_model_has_must_be_there(key, tmp_path):
    path = _write(GOLDEN / "llama", tmp_path / "model.gguf", keys={f"llama.{key}": None})
    with pytest.raises(InputError, match=rf"llama\.{re.escape(key)} is None"):
        from_gguf(path)


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q_norm.weight", "output.bias"])
def test_a_tensor_that_is_not_computed_is_refused_by_name(name, tmp_path):
    def add(tensors):
        tensors[name] = np.ones(2, np.float32)

    theirs = name.replace("output", "lm_head")
    with pytest.raises(InputError, match=rf"{re.escape(theirs)} is unexpected"):
        from_gguf(_write(GOLDEN / "llama", tmp_path / "model.gguf", change=add))


def test_an_infinite_scale_of_a_quantised_tensor_is_refused(tmp_path):
    def spoil(tensors):
        tensors["model.embed_tokens.weight"][0, 0] = np.inf

    with pytest.raises(InputError, match=r"embed_tokens\.weight holds an infinity"):
        from_gguf(_write(GOLDEN / "llama", tmp_path / "model.gguf", change=spoil))


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _file(*, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    """The beginning of a GGUF file, and what is to follow."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def _described(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return (
        _text(name)
        + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        + struct.pack("<IQ", kind, offset)
    )


HUGE = (1 << 63) - 1
DAMAGED = {
    "no magic": (b"GGML" + bytes(99), "does not begin with GGUF"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "its version is 50331648"),
    "2**63 keys": (_file(keys=HUGE), "it says that it has 9223372036854775807 keys"),
    "2**63 tensors": (_file(tensors=HUGE), "9223372036854775807 tensors"),
    "more keys than bytes": (_file(keys=1 << 20), "longer than the file"),
    "a key of 2**63 characters": (_file(keys=1, rest=struct.pack("<Q", HUGE)), "longer than the"),
    "a key that is no text": (
        _file(keys=1, rest=struct.pack("<Q", 1) + b"\xff" + bytes(9)),
        "can't decode byte 0xff",
    ),
    "a list of 2**63 numbers": (
        _file(keys=1, rest=_text("a") + struct.pack("<IIQ", 9, 0, HUGE)),
        "longer than the file",
    ),
    "a list of 2**63 texts": (
        _file(keys=1, rest=_text("a") + struct.pack("<IIQ", 9, 8, HUGE)),
        "9223372036854775807 texts",
    ),
    "lists in lists": (
        _file(keys=1, rest=_text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9999),
        "a list holds values of the type 9",
    ),
    "a type that is none": (_file(keys=1, rest=_text("a") + struct.pack("<I", 77)), "type 77"),
    "a key twice": (
        _file(keys=2, rest=(_text("a") + struct.pack("<IB", 0, 1)) * 2),
        "the key 'a' twice",
    ),
    "an alignment of 3": (
        _file(keys=1, rest=_text("general.alignment") + struct.pack("<II", 4, 3)),
        "general.alignment is 3",
    ),
    "4 billion axes": (
        _file(tensors=1, rest=_text("a") + struct.pack("<I", 0xFFFFFFFF)),
        "a tensor has 4294967295 axes",
    ),
    "an axis of nothing": (_file(tensors=1, rest=_described("a", (0,), 0, 0)), "of length 0"),
    "an axis of 2**63": (
        _file(tensors=1, rest=_described("a", (HUGE, HUGE), 0, 0) + bytes(64)),
        "'a' ends behind the file",
    ),
    "an offset of 2**63": (
        _file(tensors=1, rest=_described("a", (1,), 0, HUGE) + bytes(64)),
        "'a' ends behind the file",
    ),
    "a quantisation that is none": (
        _file(tensors=1, rest=_described("a", (1,), 12345, 0)),
        "'a' is of the unknown type 12345",
    ),
    "half a block": (
        _file(tensors=1, rest=_described("a", (16,), 8, 0) + bytes(64)),
        "are not whole blocks of 32",
    ),
    "a tensor in another": (
        _file(
            tensors=2,
            rest=_described("a", (16,), 0, 0) + _described("b", (16,), 0, 32) + bytes(256),
        ),
        "the tensor 'b' lies in another",
    ),
    "a tensor twice": (
        _file(
            tensors=2,
            rest=_described("a", (8,), 0, 0) + _described("a", (8,), 0, 32) + bytes(256),
        ),
        "the tensor 'a' twice",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_header_is_not_believed(damage, tmp_path):
    content, sentence = DAMAGED[damage]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"is no GGUF file, or damaged: .*{re.escape(sentence)}"):
        from_gguf(path)


def test_a_depth_that_the_tensors_lack_is_refused_at_once(tmp_path):
    keys = {"llama.block_count": 60_000}
    with pytest.raises(InputError, match=r"for 60,000 layers it has \d+ tensors"):
        from_gguf(_write(GOLDEN / "llama", tmp_path / "model.gguf", keys=keys))
    keys = {"llama.block_count": 1_000_000_000}
    with pytest.raises(InputError, match=r"1000000000: it must be at most 65536"):
        from_gguf(_write(GOLDEN / "llama", tmp_path / "model.gguf", keys=keys))


def test_a_damaged_file_is_refused(tmp_path):
    path = _write(GOLDEN / "llama", tmp_path / "model.gguf")
    whole = path.read_bytes()
    for length in (0, 3, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"model\.gguf is no GGUF file, or damaged"):
            from_gguf(path)
    shutil.rmtree(tmp_path)
    with pytest.raises(InputError, match=re.escape(str(path))):
        from_gguf(path)


def test_without_the_extra_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'gptjax\[gguf\]'"):
        from_gguf(tmp_path / "model.gguf")


def test_a_file_becomes_a_run_that_knows_its_ends(command, tmp_path):
    ids = {"bos": 4, "eos": 6, "eot": 9, "eom": 17, "padding": 2}  # There are 17 rows.
    keys = {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()}
    path, run = _write(GOLDEN / "llama", tmp_path / "model.gguf", keys=keys), tmp_path / "run"
    said = f"{run} is {path} as a run, without a tokenizer.\n"
    assert command("convert", path, run)[:2] == (0, said)
    expected = DecodingTokens(begin=4, ends=(6, 9), pad=2)
    assert decoding_tokens(run, load_config(run), None) == expected
