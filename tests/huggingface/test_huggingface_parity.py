"""Tiny random models of transformers compute the same here, and what is written loads there."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import TransformerConfig, build, from_huggingface, generate, split, to_huggingface
from gptjax.commands import convert
from gptjax.decoding.sampling import Sampling
from gptjax.layers.inputs import Inputs
from gptjax.runs.directory import load_config
from gptjax.runs.loading import decoding_tokens, load_model

torch = pytest.importorskip("torch", reason="parity needs the extra parity: PyTorch is missing")
transformers = pytest.importorskip(
    "transformers", reason="parity needs the extra parity: transformers is missing"
)
transformers.utils.logging.set_verbosity(logging.ERROR)
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 1e-4
VOCABULARY, CONTEXT = 61, 14

GPT = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 24, "n_layer": 3, "n_head": 3}
SIZES = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 52,
}
GROUPED = {**SIZES, "num_attention_heads": 6, "num_key_value_heads": 2}
NEO = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 24,
    "num_layers": 4,
    "num_heads": 3,
    "window_size": 5,
}
MARIAN = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 52,
    "decoder_ffn_dim": 52,
    "pad_token_id": VOCABULARY - 1,
    "decoder_start_token_id": VOCABULARY - 1,
}

CASES = {
    # name: the class of transformers, and its config.
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gpt2-untied-inner-gelu": (
        "GPT2LMHeadModel",
        {
            **GPT,
            "n_inner": 40,
            "tie_word_embeddings": False,
            "activation_function": "gelu",
            "layer_norm_epsilon": 1e-6,
        },
    ),
    "gpt1": ("OpenAIGPTLMHeadModel", GPT),
    "gpt1-silu": ("OpenAIGPTLMHeadModel", {**GPT, "afn": "silu"}),
    "gpt-neo": ("GPTNeoForCausalLM", {**NEO, "attention_types": [[["global", "local"], 2]]}),
    "gpt-neo-global": ("GPTNeoForCausalLM", {**NEO, "attention_types": [[["global"], 4]]}),
    "gpt-neo-uneven": (
        "GPTNeoForCausalLM",
        {**NEO, "attention_types": [[["global"], 1], [["local"], 3]], "intermediate_size": 40},
    ),
    "gpt-j": ("GPTJForCausalLM", {**GPT, "rotary_dim": 6}),
    "gpt-j-whole-tied": (
        "GPTJForCausalLM",
        {**GPT, "rotary_dim": 8, "tie_word_embeddings": True},
    ),
    "neox": ("GPTNeoXForCausalLM", {**SIZES, "rotary_pct": 0.25}),
    "neox-serial-tied": (
        "GPTNeoXForCausalLM",
        {
            **SIZES,
            "use_parallel_residual": False,
            "tie_word_embeddings": True,
            "rotary_pct": 0.5,
            "rotary_emb_base": 500,
            "hidden_act": "gelu_new",
        },
    ),
    "neox-no-attention-bias": ("GPTNeoXForCausalLM", {**SIZES, "attention_bias": False}),
    "bert": ("BertForPreTraining", SIZES),
    "bert-masked-lm": ("BertForMaskedLM", SIZES),
    "bert-segments": ("BertForPreTraining", {**SIZES, "type_vocab_size": 3}),
    "llama": ("LlamaForCausalLM", GROUPED),
    "llama-biases-tied": (
        "LlamaForCausalLM",
        {
            **GROUPED,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 6,
            "hidden_act": "gelu",
            "rope_theta": 777.0,
        },
    ),
    "llama-one-key": ("LlamaForCausalLM", {**GROUPED, "num_key_value_heads": 1}),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 4}),
    "mistral-full": ("MistralForCausalLM", {**GROUPED, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "marian": ("MarianMTModel", {**MARIAN, "scale_embedding": True}),
    "marian-swish": ("MarianMTModel", {**MARIAN, "activation_function": "swish"}),
    "marian-relu": ("MarianMTModel", {**MARIAN, "activation_function": "relu"}),
}


def _their_model(name: str):
    """A model of transformers with random parameters, biases and norms among them."""
    class_name, fields = CASES[name]
    torch.manual_seed(0)
    kind = getattr(transformers, class_name)
    model = kind._from_config(kind.config_class(**fields), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # Marian's positions do not; they are computed.
                parameter.add_(0.1 * torch.randn_like(parameter))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.add_(torch.randn_like(model.final_logits_bias))
    return model


def _inputs() -> tuple[np.ndarray, np.ndarray]:
    """Tokens [3, T] and which of them are no padding; the last row is all there."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY - 1, (3, CONTEXT))
    return tokens, np.arange(CONTEXT) < np.array([[9], [3], [CONTEXT]])


def _worst(ours, theirs, where) -> float:
    """The largest absolute difference at the places that exist."""
    return float(np.abs(np.asarray(ours) - theirs.detach().numpy())[where].max())


def _differences(ours, theirs) -> dict[str, float]:
    """Of logits, of every layer's stream and of its attention weights, with padding."""
    tokens, valid = _inputs()
    given = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(valid).long()}
    asked = {"output_hidden_states": True, "output_attentions": True}
    capture = ("residual", "attention")
    if ours.config.family == "encoder_decoder":
        return _marian_differences(ours, theirs, given, asked)
    if ours.config.family == "encoder":
        token_types = (np.arange(CONTEXT) >= 2) * np.ones_like(tokens)
        output = theirs(**given, token_type_ids=torch.tensor(token_types), **asked)
        hidden = ours.hidden(tokens, padding_mask=valid, token_types=token_types, capture=capture)
        wanted = output.get("prediction_logits", output.get("logits"))
        found = {
            "logits": _worst(
                ours(tokens, padding_mask=valid, token_types=token_types), wanted, valid
            )
        }
        if "seq_relationship_logits" in output:
            next_sentence = ours.next_sentence_logits(hidden.hidden)
            found["next sentence"] = _worst(next_sentence, output.seq_relationship_logits, ...)
    else:
        output = theirs(**given, **asked)
        hidden = ours.hidden(tokens, padding_mask=valid, capture=capture)
        found = {"logits": _worst(ours(tokens, padding_mask=valid), output.logits, valid)}
    streams = [*hidden.captured["residual"], hidden.hidden]
    for layer, (stream, wanted) in enumerate(zip(streams, output.hidden_states, strict=True)):
        found[f"stream {layer}"] = _worst(stream, wanted, valid)
    rows = np.broadcast_to(valid[:, None], (3, ours.config.heads, CONTEXT))
    for layer, weights in enumerate(hidden.captured["attention"]):
        found[f"attention {layer}"] = _worst(weights, output.attentions[layer], rows)
    return found


def _marian_differences(ours, theirs, given, asked) -> dict[str, float]:
    source, source_mask = np.asarray(given["input_ids"]), np.asarray(given["attention_mask"]) > 0
    tokens = np.random.default_rng(1).integers(0, VOCABULARY - 1, (3, 7))
    output = theirs(**given, decoder_input_ids=torch.tensor(tokens), **asked)
    memory = ours.encode(
        Inputs(jnp.asarray(source), jnp.asarray(source_mask), capture=("residual", "attention"))
    )
    hidden = ours.hidden(
        tokens,
        source=source,
        source_mask=source_mask,
        capture=("residual", "attention", "cross_attention"),
    )
    logits = ours(tokens, source=source, source_mask=source_mask)
    found = {"logits": _worst(logits, output.logits, ...)}
    encoded = zip(
        [*memory.captured["residual"], memory.hidden], output.encoder_hidden_states, strict=True
    )
    for layer, (stream, wanted) in enumerate(encoded):
        found[f"encoder stream {layer}"] = _worst(stream, wanted, source_mask)
    decoded = zip(
        [*hidden.captured["residual"], hidden.hidden], output.decoder_hidden_states, strict=True
    )
    for layer, (stream, wanted) in enumerate(decoded):
        found[f"decoder stream {layer}"] = _worst(stream, wanted, ...)
    for name, weights, wanted in (
        ("attention", hidden.captured["attention"], output.decoder_attentions),
        ("cross_attention", hidden.captured["cross_attention"], output.cross_attentions),
    ):
        for layer in range(len(wanted)):
            found[f"{name} {layer}"] = _worst(weights[layer], wanted[layer], ...)
    rows = np.broadcast_to(source_mask[:, None], (3, ours.config.heads, CONTEXT))
    for layer, wanted in enumerate(output.encoder_attentions):
        found[f"encoder attention {layer}"] = _worst(
            memory.captured["attention"][layer], wanted, rows
        )
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_layer_agrees_with_transformers_both_ways(name, tmp_path):
    theirs = _their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_huggingface(tmp_path / "theirs")
    found = _differences(ours, theirs)
    print(f"{name}: logits {found['logits']:.1e}, worst {max(found.values()):.1e}")
    assert max(found.values()) < TOLERANCE, found

    to_huggingface(ours, tmp_path / "written")
    again, report = type(theirs).from_pretrained(
        tmp_path / "written", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    for key, parameter in theirs.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[key]), key
    found = _differences(ours, again)
    assert max(found.values()) < TOLERANCE, found

    back = from_huggingface(tmp_path / "written")
    jax.tree.map(np.testing.assert_array_equal, split(back)[1], split(ours)[1])


def test_the_classes_that_transformers_chooses_itself_load(tmp_path):
    for name, auto in (
        ("gpt2", "AutoModelForCausalLM"),
        ("neox", "AutoModelForCausalLM"),
        ("bert", "AutoModelForPreTraining"),
        ("marian", "AutoModelForSeq2SeqLM"),
    ):
        theirs = _their_model(name)
        theirs.save_pretrained(tmp_path / name)
        to_huggingface(from_huggingface(tmp_path / name), tmp_path / f"{name}-written")
        again = getattr(transformers, auto).from_pretrained(tmp_path / f"{name}-written")
        assert type(again) is type(theirs)


@pytest.mark.parametrize(
    ("name", "class_name"),
    [("gpt2", "GPT2Model"), ("bert", "BertModel"), ("llama-biases-tied", "LlamaModel")],
)
def test_a_checkpoint_without_heads_is_read(name, class_name, tmp_path):
    body = _their_model(name).base_model
    assert type(body).__name__ == class_name
    body.save_pretrained(tmp_path / "body")
    ours = from_huggingface(tmp_path / "body")
    tokens, valid = _inputs()
    wanted = body(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(valid).long())
    hidden = ours.hidden(tokens, padding_mask=valid).hidden
    assert _worst(hidden, wanted.last_hidden_state, valid) < TOLERANCE
    to_huggingface(ours, tmp_path / "written")
    again, report = transformers.AutoModel.from_pretrained(
        tmp_path / "written", output_loading_info=True
    )
    assert type(again) is type(body)
    assert not any(report.values()), report
    if name == "bert":
        assert ours.config.encoder_heads == "pooler"
        assert _worst(ours.pooled(hidden), wanted.pooler_output, ...) < TOLERANCE


@pytest.mark.parametrize("heads", ["none", "pooler", "masked_lm", "pretraining"])
def test_an_encoder_without_segments_is_a_bert_of_theirs(heads, tmp_path):
    config = TransformerConfig(
        family="encoder",
        vocab_size=VOCABULARY,
        context_length=CONTEXT,
        width=24,
        heads=3,
        depth=2,
        norm_placement="post",
        embedding_norm=True,
        final_norm=False,
        activation="gelu",
        encoder_heads=heads,
        head_bias=heads in ("masked_lm", "pretraining"),
    )
    ours = build(config, rngs=nnx.Rngs(0))
    to_huggingface(ours, tmp_path / "written")
    kind = {"masked_lm": "AutoModelForMaskedLM", "pretraining": "AutoModelForPreTraining"}
    theirs = getattr(transformers, kind.get(heads, "AutoModel")).from_pretrained(
        tmp_path / "written", **({"add_pooling_layer": False} if heads == "none" else {})
    )
    tokens, valid = _inputs()
    given = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(valid).long()}
    output = theirs(**given, output_hidden_states=True)
    assert (
        _worst(ours.hidden(tokens, padding_mask=valid).hidden, output.hidden_states[-1], valid)
        < 1e-4
    )
    if heads in kind:
        logits = output.get("prediction_logits", output.get("logits"))
        assert _worst(ours(tokens, padding_mask=valid), logits, valid) < TOLERANCE
    back = from_huggingface(tmp_path / "written")
    np.testing.assert_array_equal(
        back(tokens, padding_mask=valid), ours(tokens, padding_mask=valid)
    )


def test_a_bert_without_a_pooler_is_read_and_written(tmp_path):
    model = _their_model("bert-masked-lm").base_model
    model.save_pretrained(tmp_path / "body")
    ours = from_huggingface(tmp_path / "body")
    assert ours.config.encoder_heads == "none"
    to_huggingface(ours, tmp_path / "written")
    again, report = transformers.AutoModel.from_pretrained(
        tmp_path / "written", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report.values()), report
    for key, parameter in model.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[key]), key


def _rewrite(path, **fields) -> None:
    """The JSON in a file with other fields."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _continued(directory, *, tokens, **how) -> list[int]:
    """What transformers' `generate` adds to `tokens`, greedily, where nothing else is asked for."""
    kind = "AutoModelForSeq2SeqLM" if "decoder_start_token_id" in how else "AutoModelForCausalLM"
    theirs = getattr(transformers, kind).from_pretrained(directory)
    given = torch.tensor([tokens])
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": 8}
    said = theirs.generate(given, attention_mask=torch.ones_like(given), **options)[0].tolist()
    return said[1:] if "decoder_start_token_id" in how else said[len(tokens) :]


@pytest.mark.parametrize("name", ["llama", "marian"])
@pytest.mark.parametrize("said_by", ["config.json", "generation_config.json"])
def test_decoding_begins_and_ends_as_in_transformers(name, said_by, tmp_path):
    theirs, run, back = tmp_path / "theirs", tmp_path / "run", tmp_path / "back"
    _their_model(name).save_pretrained(theirs)
    prompt, start, pairs = [5, 7, 2], 11, name == "marian"
    fields = {"decoder_start_token_id": start} if pairs else {}
    nothing = {"eos_token_id": None, "forced_eos_token_id": None, "pad_token_id": 0, **fields}
    _rewrite(theirs / "config.json", **nothing)
    _rewrite(theirs / "generation_config.json", **nothing)
    whole = _continued(theirs, tokens=prompt, **fields)
    ends = [whole[5], whole[3]]
    if said_by == "config.json":
        (theirs / "generation_config.json").unlink()
        _rewrite(theirs / "config.json", eos_token_id=ends[1])
    else:
        _rewrite(theirs / "config.json", eos_token_id=whole[0], decoder_start_token_id=1)
        _rewrite(theirs / "generation_config.json", eos_token_id=ends)
    expected = _continued(theirs, tokens=prompt, **fields)
    assert expected == whole[: 1 + whole.index(whole[3])]

    convert(str(theirs), run)
    convert(str(run), back)
    assert _continued(back, tokens=prompt, **fields) == expected
    _, model, _ = load_model(run)
    tokens = decoding_tokens(run, load_config(run), None)
    rows = generate(
        model,
        [prompt] if tokens.start is None else [[tokens.start]],
        max_new_tokens=8,
        sampling=Sampling(temperature=0),
        end_token=tokens.ends,
        source=[prompt] if pairs else None,
    )
    assert [int(row[0]) for row in rows] == expected


def test_shards_are_read_and_types_are_cast(tmp_path):
    theirs = _their_model("llama")
    theirs.save_pretrained(tmp_path / "whole")
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    shards = split(from_huggingface(tmp_path / "shards"))[1]
    half = split(from_huggingface(tmp_path / "shards", dtype=jnp.bfloat16))[1]
    whole = split(from_huggingface(tmp_path / "whole"))[1]

    def check(whole, shards, half):
        assert whole.dtype == shards.dtype == jnp.float32
        np.testing.assert_array_equal(shards, whole.astype(jnp.bfloat16).astype(jnp.float32))
        np.testing.assert_array_equal(half, whole.astype(jnp.bfloat16))

    jax.tree.map(check, whole, shards, half)
