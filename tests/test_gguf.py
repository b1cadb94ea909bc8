"""GGUF files of the Llama family, written here as llama.cpp's conversion writes them."""

import re
import shutil
import sys
from pathlib import Path

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


def _write(source: Path, path: Path, architecture: str = "llama", quantisation=None, **fields):
    """A model of Hugging Face's as GGUF."""
    config = from_huggingface(source).config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.depth)
    writer.add_context_length(config.context)
    writer.add_feed_forward_length(config.hidden_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.key_value_heads)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_rope_dimension_count(config.head_width)
    if "scaling" in fields:
        writer.add_rope_scaling_type(fields["scaling"])
    for name, tensor in load_file(source / "model.safetensors").items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        name = name.replace("model.layers.", "blk.")
        heads = {"attn_q": config.heads, "attn_k": config.key_value_heads}
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
        context=8,
        depth=1,
        width=32,
        heads=2,
        hidden=64,
        positions="rotary",
        norm="rmsnorm",
        feedforward="swiglu",
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
    scaling = gguf.RopeScalingType.YARN
    with pytest.raises(InputError, match=r"rope_scaling is .*yarn"):
        from_gguf(_write(GOLDEN / "llama", tmp_path / "yarn.gguf", scaling=scaling))


def test_a_damaged_file_is_refused(tmp_path):
    path = _write(GOLDEN / "llama", tmp_path / "model.gguf")
    whole = path.read_bytes()
    for length in (0, 3, 200, len(whole) // 2):
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
