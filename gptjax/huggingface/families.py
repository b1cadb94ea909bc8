"""Tables that map fields of a `config.json` to ours, one per family; used by configs.py."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptjax.config import TransformerConfig
from gptjax.huggingface.particulars import (
    HuggingFaceConfig,
    read_bert,
    read_gptj,
    read_llama,
    read_marian,
    read_mistral,
    read_neo,
    read_neox,
    read_qwen2,
    write_bert,
    write_llama,
    write_marian,
    write_mistral,
    write_neo,
    write_neox,
    write_qwen2,
)

_GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
_PLAIN = {
    **dict.fromkeys(_GELU_TANH, "gelu_tanh"),
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}
_GATED |= dict.fromkeys(reversed(_GELU_TANH), "geglu_tanh")
_GPT1 = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}


@dataclass(frozen=True)
class Translation:
    """The fields of one family."""

    architecture: str
    """The transformers class that computes logits."""
    sizes: Mapping[str, str]
    """Their required field → ours."""
    optional: Mapping[str, tuple[str, Any]]
    """Their field → ours, and its default if absent; null is our 0."""
    activation: tuple[str, Mapping[str, str], str]
    """Their field, their names → ours, and the default name."""
    dropouts: tuple[str, ...]
    """Their dropout rates; the first is ours."""
    ours: Mapping[str, Any] = field(default_factory=dict)
    """Our fields that are fixed in the family."""
    constant: Mapping[str, Any] = field(default_factory=dict)
    """Their fields with the only supported value, which is also the default."""
    read: Callable[[HuggingFaceConfig], dict[str, Any]] = lambda given: {}
    """Returns further fields of ours from theirs."""
    write: Callable[[TransformerConfig], dict[str, Any]] = lambda config: {}
    """Returns further fields of theirs from ours."""


_GPT_SIZES = {
    "vocab_size": "vocab_size",
    "n_embd": "width",
    "n_layer": "depth",
    "n_head": "heads",
}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "max_position_embeddings": "context_length",
}
_LLAMA_OPTIONAL = {
    "num_key_value_heads": ("kv_heads", None),
    "head_dim": ("head_dim", None),
    "rms_norm_eps": ("norm_epsilon", 1e-6),
    "tie_word_embeddings": ("tie_embeddings", False),
}
_LLAMA: dict[str, Any] = {
    "sizes": {**_SIZES, "intermediate_size": "mlp_dim"},
    "activation": ("hidden_act", _GATED, "silu"),
    "dropouts": ("attention_dropout",),
    "ours": {"position_embedding": "rotary", "norm": "rmsnorm", "bias": False},
}

TRANSLATIONS: dict[str, Translation] = {
    "gpt2": Translation(
        architecture="GPT2LMHeadModel",
        sizes={**_GPT_SIZES, "n_positions": "context_length"},
        optional={
            "n_inner": ("mlp_dim", None),
            "layer_norm_epsilon": ("norm_epsilon", 1e-5),
            "tie_word_embeddings": ("tie_embeddings", True),
        },
        activation=("activation_function", _PLAIN, "gelu_new"),
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        constant={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "openai-gpt": Translation(
        architecture="OpenAIGPTLMHeadModel",
        sizes={**_GPT_SIZES, "n_positions": "context_length"},
        optional={
            "layer_norm_epsilon": ("norm_epsilon", 1e-5),
            "tie_word_embeddings": ("tie_embeddings", True),
        },
        activation=("afn", _GPT1, "gelu"),
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        ours={"norm_placement": "post", "final_norm": False},
    ),
    "gpt_neo": Translation(
        architecture="GPTNeoForCausalLM",
        sizes={
            "vocab_size": "vocab_size",
            "hidden_size": "width",
            "num_layers": "depth",
            "num_heads": "heads",
            "max_position_embeddings": "context_length",
        },
        optional={
            "intermediate_size": ("mlp_dim", None),
            "layer_norm_epsilon": ("norm_epsilon", 1e-5),
            "tie_word_embeddings": ("tie_embeddings", True),
        },
        activation=("activation_function", _PLAIN, "gelu_new"),
        dropouts=("resid_dropout", "embed_dropout", "attention_dropout"),
        ours={"attention_scaled": False, "query_bias": False},
        read=read_neo,
        write=write_neo,
    ),
    "gptj": Translation(
        architecture="GPTJForCausalLM",
        sizes={**_GPT_SIZES, "n_positions": "context_length"},
        optional={
            "n_inner": ("mlp_dim", None),
            "layer_norm_epsilon": ("norm_epsilon", 1e-5),
            "tie_word_embeddings": ("tie_embeddings", False),
        },
        activation=("activation_function", _PLAIN, "gelu_new"),
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        ours={
            "position_embedding": "rotary",
            "pairing": "interleaved",
            "norm_placement": "parallel_shared",
            "query_bias": False,
            "output_bias": False,
            "head_bias": True,
        },
        read=read_gptj,
        write=lambda config: {"rotary_dim": config.rotary_dim},
    ),
    "gpt_neox": Translation(
        architecture="GPTNeoXForCausalLM",
        sizes={**_SIZES, "intermediate_size": "mlp_dim"},
        optional={
            "layer_norm_eps": ("norm_epsilon", 1e-5),
            "tie_word_embeddings": ("tie_embeddings", False),
        },
        activation=("hidden_act", _PLAIN, "gelu"),
        dropouts=("hidden_dropout", "attention_dropout"),
        ours={"position_embedding": "rotary"},
        read=read_neox,
        write=write_neox,
    ),
    "llama": Translation(
        architecture="LlamaForCausalLM",
        optional={**_LLAMA_OPTIONAL, "mlp_bias": ("bias", False)},
        read=read_llama,
        write=write_llama,
        **_LLAMA,
    ),
    "mistral": Translation(
        architecture="MistralForCausalLM",
        optional=_LLAMA_OPTIONAL,
        constant={"attention_bias": False},
        read=read_mistral,
        write=write_mistral,
        **_LLAMA,
    ),
    "qwen2": Translation(
        architecture="Qwen2ForCausalLM",
        optional=_LLAMA_OPTIONAL,
        read=read_qwen2,
        write=write_qwen2,
        **_LLAMA,
    ),
    "bert": Translation(
        architecture="BertModel",
        sizes={**_SIZES, "intermediate_size": "mlp_dim"},
        optional={
            "type_vocab_size": ("token_types", 2),
            "layer_norm_eps": ("norm_epsilon", 1e-12),
        },
        activation=("hidden_act", _PLAIN, "gelu"),
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        ours={
            "family": "encoder",
            "norm_placement": "post",
            "embedding_norm": True,
            "final_norm": False,
        },
        constant={
            "tie_word_embeddings": True,
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "add_cross_attention": False,
        },
        read=read_bert,
        write=write_bert,
    ),
    "marian": Translation(
        architecture="MarianMTModel",
        sizes={
            "vocab_size": "vocab_size",
            "d_model": "width",
            "encoder_layers": "encoder_depth",
            "decoder_layers": "depth",
            "decoder_attention_heads": "heads",
            "decoder_ffn_dim": "mlp_dim",
            "max_position_embeddings": "context_length",
        },
        optional={"scale_embedding": ("embedding_scaled", False)},
        activation=("activation_function", _PLAIN, "gelu"),
        dropouts=("dropout", "attention_dropout"),
        ours={
            "family": "encoder_decoder",
            "position_embedding": "sinusoidal",
            "norm_placement": "post",
            "final_norm": False,
            "head_bias": True,
        },
        constant={
            "tie_word_embeddings": True,
            "share_encoder_decoder_embeddings": True,
            "static_position_embeddings": True,
            "normalize_before": False,
            "normalize_embedding": False,
            "add_final_layer_norm": False,
        },
        read=read_marian,
        write=write_marian,
    ),
}
"""By `model_type`; the first that fits a model is written."""
