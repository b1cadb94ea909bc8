"""Write the golden models: tiny ones of transformers with random parameters, and what they compute.

    python tests/golden/make_golden.py

Needs the extra `parity`, and imports its packages by name, for the linters run without it.
tests/huggingface/test_huggingface.py reads what it writes, without PyTorch.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

torch = importlib.import_module("torch")
transformers = importlib.import_module("transformers")

HERE = Path(__file__).parent
VOCABULARY, CONTEXT = 17, 8

GPT = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 8, "n_layer": 2, "n_head": 2}
SIZES = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GOLDEN = {
    "gpt2": ("GPT2LMHeadModel", GPT),
    "openai-gpt": ("OpenAIGPTLMHeadModel", GPT),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": CONTEXT,
            "hidden_size": 8,
            "num_layers": 2,
            "num_heads": 2,
            "window_size": 3,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**SIZES, "rotary_pct": 0.5}),
    "bert": ("BertForPreTraining", {**SIZES, "hidden_size": 8, "num_attention_heads": 2}),
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 3}),
    "qwen2": ("Qwen2ForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "marian": (
        "MarianMTModel",
        {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": CONTEXT,
            "d_model": 8,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 12,
            "decoder_ffn_dim": 12,
            "activation_function": "swish",
            "scale_embedding": True,
            "pad_token_id": VOCABULARY - 1,
            "decoder_start_token_id": VOCABULARY - 1,
        },
    ),
}


LENGTHS, NEW_TOKENS = (2, 5), 3
"""Of the prompts that are continued, or of a translator's sources, and how far."""


def continued(model, name: str, tokens: np.ndarray) -> dict[str, Any]:
    """What `transformers.generate` decodes with its cache: chosen [2, 3], chosen_logits [2, 3, V].

    Prompts stand at the right of their rows, as transformers wants them, and sources at the left.
    """
    longest = max(LENGTHS)
    rows = np.zeros((len(LENGTHS), longest), int)
    valid = np.zeros_like(rows)
    for row, length in enumerate(LENGTHS):
        places = slice(length) if name == "marian" else slice(longest - length, None)
        rows[row, places], valid[row, places] = tokens[row, :length], 1
    output = model.generate(
        torch.tensor(rows),
        attention_mask=torch.tensor(valid),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        pad_token_id=VOCABULARY - 1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = np.stack([each.numpy() for each in output.logits], axis=1)
    return {"chosen": output.sequences[:, -NEW_TOKENS:].numpy(), "chosen_logits": logits}


def looked(output) -> dict[str, np.ndarray]:
    """Attention weights [L, 2, N, T, S] by the names that `gptjax.probe` has for them."""
    names = {
        "attention": "attentions" if "attentions" in output else "decoder_attentions",
        "cross_attention": "cross_attentions",
        "encoder_attention": "encoder_attentions",
    }
    found = {ours: output.get(theirs) for ours, theirs in names.items()}
    return {name: torch.stack(layers).numpy() for name, layers in found.items() if layers}


def write(name: str) -> None:
    """One directory: config.json, model.safetensors, expected.npz.

    That holds tokens [2, T], logits, and attention weights by name.
    """
    class_name, fields = GOLDEN[name]
    torch.manual_seed(0)
    kind = getattr(transformers, class_name)
    model = kind(kind.config_class(**fields)).eval()
    model.set_attn_implementation("eager")  # Others return no weights.
    tokens = np.random.default_rng(0).integers(0, VOCABULARY - 1, (2, CONTEXT))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        given = {"input_ids": torch.tensor(tokens)}
        if name == "marian":
            model.final_logits_bias.add_(torch.randn_like(model.final_logits_bias))
            given["decoder_input_ids"] = torch.tensor(tokens[:, ::-1].copy())
        output = model(**given, output_attentions=True)
        # An encoder continues nothing; the GPT-1 of transformers has no cache, and sees padding.
        more: dict[str, Any] = (
            {} if name in ("bert", "openai-gpt") else continued(model, name, tokens)
        )
    logits = output.prediction_logits if name == "bert" else output.logits
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    np.savez(
        HERE / name / "expected.npz", tokens=tokens, logits=logits.numpy(), **looked(output), **more
    )


if __name__ == "__main__":
    for name in GOLDEN:
        write(name)
