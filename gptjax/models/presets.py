"""The configs of published models, and of small ones of our own, by name."""

import dataclasses

from gptjax.config import InputError, TransformerConfig, near_names


def _gpt2(depth: int, width: int, heads: int) -> TransformerConfig:
    """GPT-2 (Radford et al. 2019, table 2; heads from the released hyper-parameters)."""
    return TransformerConfig(
        vocab_size=50257, context_length=1024, depth=depth, width=width, heads=heads, dropout=0.1
    )


def _gpt3(depth: int, width: int, heads: int, head_dim: int) -> TransformerConfig:
    """GPT-3 (Brown et al. 2020, table 2.1), alternating dense and locally banded attention.

    The band's width is not published; 256 is GPT-Neo's. The table gives the 1.3B model 24 heads of
    128, which contradicts its width of 2048 and its 1.3 billion parameters: it has 16 here.
    """
    return TransformerConfig(
        vocab_size=50257,
        context_length=2048,
        depth=depth,
        width=width,
        heads=heads,
        head_dim=head_dim,
        attention="full,local",
        window=256,
    )


def _transformer(depth: int, width: int, heads: int, dropout: float) -> TransformerConfig:
    """The Transformer (Vaswani et al. 2017, table 3), English–German: 37,000 shared tokens."""
    return TransformerConfig(
        family="encoder_decoder",
        vocab_size=37000,
        context_length=512,
        depth=depth,
        width=width,
        heads=heads,
        position_embedding="sinusoidal",
        pairing="interleaved",
        norm_placement="post",
        final_norm=False,
        activation="relu",
        embedding_scaled=True,
        dropout=dropout,
    )


def _bert(depth: int, width: int, heads: int) -> TransformerConfig:
    """BERT (Devlin et al. 2018, section 3), with the uncased English vocabulary."""
    return TransformerConfig(
        family="encoder",
        vocab_size=30522,
        context_length=512,
        depth=depth,
        width=width,
        heads=heads,
        token_types=2,
        norm_placement="post",
        norm_epsilon=1e-12,
        embedding_norm=True,
        final_norm=False,
        activation="gelu",
        head_bias=True,
        encoder_heads="pretraining",
        dropout=0.1,
    )


_SMALL = TransformerConfig(vocab_size=256, context_length=128, depth=4, width=128, heads=4)
"""The size of the presets for comparisons on a CPU; each differs from GPT-2 as its name says."""

_LLAMA_STYLE = dataclasses.replace(
    _SMALL,
    position_embedding="rotary",
    norm="rmsnorm",
    activation="swiglu",
    mlp_dim=344,
    kv_heads=2,
    bias=False,
)

_TRANSFORMER_DECODER = dataclasses.replace(
    _SMALL,
    position_embedding="sinusoidal",
    pairing="interleaved",
    activation="relu",
    embedding_scaled=True,
)

PRESETS: dict[str, TransformerConfig] = {
    # experiments/quickstart.py, on bytes.
    "quickstart": TransformerConfig(
        vocab_size=256, context_length=128, depth=4, width=128, heads=4
    ),
    # nanoGPT's CPU configuration, on the 65 characters of Tiny Shakespeare.
    "shakespeare-char": TransformerConfig(vocab_size=65, context_length=64, bias=False),
    "transformer-tiny": dataclasses.replace(
        _transformer(2, 128, 4, 0.1), vocab_size=256, context_length=128
    ),
    "transformer-base": _transformer(6, 512, 8, 0.1),
    "transformer-big": _transformer(6, 1024, 16, 0.3),
    # Google's smallest released BERT (Turc et al. 2019).
    "bert-tiny": _bert(2, 128, 2),
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    # Radford et al. 2018, section 4.1.
    "gpt1": TransformerConfig(
        vocab_size=40478,
        context_length=512,
        depth=12,
        width=768,
        heads=12,
        norm_placement="post",
        final_norm=False,
        dropout=0.1,
    ),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "gpt3-125m": _gpt3(12, 768, 12, 64),
    "gpt3-350m": _gpt3(24, 1024, 16, 64),
    "gpt3-760m": _gpt3(24, 1536, 16, 96),
    "gpt3-1.3b": _gpt3(24, 2048, 16, 128),
    "gpt3-2.7b": _gpt3(32, 2560, 32, 80),
    "gpt3-6.7b": _gpt3(32, 4096, 32, 128),
    "gpt3-13b": _gpt3(40, 5140, 40, 128),
    "gpt3-175b": _gpt3(96, 12288, 96, 128),
    # Liu et al. 2018, section 4.2: T-D, and T-DMCA, which alternates local and compressed layers.
    "transformer-decoder": _TRANSFORMER_DECODER,
    "t-dmca": dataclasses.replace(_TRANSFORMER_DECODER, attention="local,compressed", window=64),
    # EleutherAI's released configurations.
    "gpt-j-6b": TransformerConfig(
        vocab_size=50400,
        context_length=2048,
        depth=28,
        width=4096,
        heads=16,
        position_embedding="rotary",
        pairing="interleaved",
        rotary_fraction=0.25,
        norm_placement="parallel_shared",
        query_bias=False,
        output_bias=False,
        tie_embeddings=False,
        head_bias=True,
    ),
    "gpt-neox-20b": TransformerConfig(
        vocab_size=50432,
        context_length=2048,
        depth=44,
        width=6144,
        heads=64,
        position_embedding="rotary",
        rotary_fraction=0.25,
        norm_placement="parallel",
        activation="gelu_tanh",
        tie_embeddings=False,
    ),
    "pythia-160m": TransformerConfig(
        vocab_size=50304,
        context_length=2048,
        depth=12,
        width=768,
        heads=12,
        position_embedding="rotary",
        rotary_fraction=0.25,
        norm_placement="parallel",
        activation="gelu",
        tie_embeddings=False,
    ),
    # Hugging Face's SmolLM, a Llama, in its released configuration.
    "smollm-135m": TransformerConfig(
        vocab_size=49152,
        context_length=2048,
        depth=30,
        width=576,
        heads=9,
        kv_heads=3,
        mlp_dim=1536,
        position_embedding="rotary",
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
    ),
    "gpt-j-style": dataclasses.replace(
        _SMALL,
        position_embedding="rotary",
        pairing="interleaved",
        rotary_fraction=0.5,
        norm_placement="parallel_shared",
    ),
    "neox-style": dataclasses.replace(
        _SMALL, position_embedding="rotary", rotary_fraction=0.25, norm_placement="parallel"
    ),
    "llama-style": _LLAMA_STYLE,
    "mistral-style": dataclasses.replace(_LLAMA_STYLE, attention="local", window=64),
    "gemma-style": dataclasses.replace(
        _LLAMA_STYLE,
        norm_placement="sandwich",
        activation="geglu_tanh",
        attention="local,full",
        window=64,
        attention_softcap=50.0,
        logit_softcap=30.0,
        embedding_scaled=True,
    ),
    "alibi": dataclasses.replace(_SMALL, position_embedding="alibi", embedding_norm=True),
    "relative": dataclasses.replace(
        _SMALL, position_embedding="relative", norm="rmsnorm", bias=False
    ),
    "multi-query": dataclasses.replace(_SMALL, kv_heads=1),
    "qk-norm": dataclasses.replace(_SMALL, qk_norm=True),
    "post-norm": dataclasses.replace(_SMALL, norm_placement="post", final_norm=False),
    "relu2": dataclasses.replace(_SMALL, activation="relu2"),
    "moe": dataclasses.replace(_LLAMA_STYLE, num_experts=8, mlp_dim=172),
    "lstm": dataclasses.replace(
        _SMALL, family="recurrent", depth=2, width=256, position_embedding="none", final_norm=False
    ),
}


def preset(name: str) -> TransformerConfig:
    """The config of the model called `name`.

    Raises:
      InputError: an unknown name; similar names are listed.
    """
    if name not in PRESETS:
        raise InputError(f"Unknown preset {name!r}: {near_names(name, PRESETS)}")
    return PRESETS[name]
