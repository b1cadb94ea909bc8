"""The shape of a model."""

from dataclasses import dataclass
from typing import Any, cast, get_args

from gptjax.config.checks import check, check_minimum, check_types
from gptjax.config.values import (
    PLACEMENTS,
    Activation,
    AttentionKernel,
    AttentionKind,
    AttentionNormalizer,
    Dtype,
    EncoderHeads,
    Family,
    NormName,
    NormPlacement,
    Pairing,
    PositionEmbedding,
    Remat,
)

MOST_BLOCKS = 1 << 16
"""The deepest published models have a thousand (DeepNet, Wang et al. 2022)."""


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a model. The letters are the axis names of every docstring in gptjax."""

    family: Family = "decoder"
    """GPT, BERT, the original Transformer, or the LSTM that it displaced."""
    vocab_size: int = 0
    """Tokens in the vocabulary (V); 0 takes the tokenizer's."""
    context_length: int = 128
    """Maximum sequence length in tokens (T)."""
    depth: int = 4
    """Number of blocks (L); of an encoder-decoder, in its decoder."""
    encoder_depth: int = 0
    """Number of blocks in the encoder of an encoder-decoder; 0 takes depth."""
    width: int = 128
    """Width of the residual stream (D)."""
    heads: int = 4
    """Attention heads (N)."""
    kv_heads: int = 0
    """Key and value heads (K), each shared by heads / kv_heads queries; 0 takes heads."""
    head_dim: int = 0
    """Dimension of one head (H); 0 takes width / heads."""
    mlp_dim: int = 0
    """Hidden dimension of the MLP (F); 0 takes 4 x width."""
    position_embedding: PositionEmbedding = "learned"
    """How positions are encoded."""
    pairing: Pairing = "half"
    """Channels that share an angle (rotary, sinusoidal): i and i + H/2, or 2i and 2i + 1."""
    rotary_fraction: float = 1.0
    """rotary: fraction of a head's channels that are rotated."""
    rope_theta: float = 10_000.0
    """rotary: base of the frequencies; the longest wavelength is about 2 pi times it."""
    norm: NormName = "layernorm"
    """The normalisation of the residual stream."""
    norm_placement: NormPlacement = "pre"
    """A norm before each layer (pre), after the residual sum (post), on both sides of the layer
    (sandwich), or before attention and MLP in parallel, one each or shared."""
    norm_epsilon: float = 1e-5
    """Added to the variance."""
    embedding_norm: bool = False
    """Normalise the embeddings too (BERT, BLOOM)."""
    final_norm: bool = True
    """Normalise after the last block."""
    attention: str = "full"
    """full, local (window), compressed, or a pattern repeated over the blocks, as in full,local."""
    window: int = 0
    """local: how many tokens each query attends to, its own included."""
    compression: int = 3
    """compressed: how many keys and values a strided convolution merges into one."""
    attention_scaled: bool = True
    """Divide the scores by the root of the head dim."""
    attention_kernel: AttentionKernel = "auto"
    """auto: the platform's fastest for this config; splash runs on TPUs, cudnn on GPUs, and triton,
    which drops attention weights too, on GPUs where cudnn does not support the config."""
    attention_normalizer: AttentionNormalizer = "softmax"
    """How scores become weights: softmax over the keys, or a sigmoid of each score."""
    attention_softcap: float = 0.0
    """Soft cap of the attention scores, cap tanh(score / cap); 0 is none."""
    qk_norm: bool = False
    """RMSNorm of each query and key."""
    activation: Activation = "gelu_tanh"
    """The MLP's activation, the last three gated; gelu_tanh is GPT-2's."""
    num_experts: int = 0
    """Expert MLPs that tokens are routed among (E); 0 is a single MLP for all."""
    experts_per_token: int = 2
    """Experts that each token is routed to."""
    capacity_factor: float = 0.0
    """Tokens per expert over an even share; training drops those above it; 0 drops none."""
    bias: bool = True
    """Biases in the linear layers and the layer norms."""
    query_bias: bool | None = None
    """Biases of query, key and value; None follows bias."""
    output_bias: bool | None = None
    """Bias of attention's output; None follows bias."""
    tie_embeddings: bool = True
    """The head reuses the token embedding."""
    head_bias: bool = False
    """A bias per token in the head."""
    logit_softcap: float = 0.0
    """Soft cap of the logits, cap tanh(logit / cap); 0 is none."""
    logit_scale: float = 1.0
    """Factor of the head's input (Cohere's name; how muP scales a wider model)."""
    embedding_scaled: bool = False
    """Multiply token embeddings by the root of the width."""
    token_types: int = 0
    """encoder: number of token types, each with an embedding (BERT's segments: 2)."""
    encoder_heads: EncoderHeads = "none"
    """encoder: BERT's pooler, its masked-LM transform, or both and the next-sentence head."""
    dropout: float = 0.0
    """Dropout rate in training: after the embedding, in attention, before residual sums."""
    dtype: Dtype = "float32"
    """Compute dtype (activations); parameters, softmax, norms and loss stay float32. float16, for
    GPUs without bfloat16, trains with dynamic loss scaling."""
    scan_layers: bool = False
    """Run the blocks as one scanned loop (compiles faster when deep) instead of unrolled."""
    remat: Remat = "none"
    """What the backward pass recomputes of a block: nothing; everything (full); everything but
    products with weights (dots), or but attention's inputs and the MLP's first products (names);
    or everything, with the block's input kept in host memory (offload)."""
    remat_layers: int = 1
    """Consecutive blocks recomputed together; only the input of the first is kept."""
    microbatches: int = 0
    """Microbatches that a batch is split into for a pipeline; 0 takes about 4 per stage."""

    @property
    def actual_head_dim(self) -> int:
        """Dimension of one head (H), the default resolved."""
        return self.head_dim or self.width // self.heads

    @property
    def actual_kv_heads(self) -> int:
        """Key and value heads (K), the default resolved."""
        return self.kv_heads or self.heads

    @property
    def actual_mlp_dim(self) -> int:
        """Hidden dimension of the MLP (F), the default resolved."""
        return self.mlp_dim or 4 * self.width

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated, an even number."""
        return int(self.rotary_fraction * self.actual_head_dim) // 2 * 2

    @property
    def attention_pattern(self) -> tuple[AttentionKind, ...]:
        """The kinds of attention of consecutive blocks, repeated over the stack."""
        return cast(tuple[AttentionKind, ...], tuple(self.attention.split(",")))

    def __post_init__(self) -> None:
        check_types(self)
        check_minimum(
            self, 1, "context_length", "depth", "width", "heads", "compression", "remat_layers"
        )
        check_minimum(self, 0, "vocab_size", "encoder_depth", "kv_heads", "head_dim", "mlp_dim")
        check_minimum(self, 0, "window", "num_experts", "capacity_factor", "attention_softcap")
        check_minimum(self, 0, "logit_softcap", "token_types", "microbatches")
        for name in ("depth", "encoder_depth"):
            check(self, name, getattr(self, name) <= MOST_BLOCKS, f"at most {MOST_BLOCKS}")
        check(self, "dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        check(self, "norm_epsilon", self.norm_epsilon > 0, "above 0")
        check(self, "rope_theta", self.rope_theta > 0, "above 0")
        check(self, "logit_scale", self.logit_scale > 0, "above 0")
        divides = bool(self.head_dim) or self.width % self.heads == 0
        check(self, "heads", divides, f"a divisor of width {self.width}")
        divides = self.heads % self.actual_kv_heads == 0
        check(self, "kv_heads", divides, f"a divisor of heads {self.heads}")
        grouped = self.remat_layers == 1 or self._groups_divide()
        accepted = (
            "1, or with scan_layers a divisor of depth and a multiple of the pattern's length"
        )
        check(self, "remat_layers", grouped, accepted)
        self._check_attention()
        self._check_positions()
        self._check_family()
        among = self.num_experts == 0 or 1 <= self.experts_per_token <= self.num_experts
        check(self, "experts_per_token", among, f"between 1 and num_experts {self.num_experts}")

    def _groups_divide(self) -> bool:
        """Whether layers are scanned in whole groups of whole repeats of the attention pattern."""
        whole = self.remat_layers % len(self.attention_pattern) == 0
        depths = self.depth, self.encoder_depth or self.depth
        return whole and self.scan_layers and all(d % self.remat_layers == 0 for d in depths)

    def _check_attention(self) -> None:
        pattern = self.attention_pattern
        kinds = get_args(AttentionKind)
        accepted = f"{', '.join(kinds)}, or several joined by commas"
        check(self, "attention", set(pattern) <= set(kinds), accepted)
        for name in ("depth", "encoder_depth"):
            divides = getattr(self, name) % len(pattern) == 0
            check(self, name, divides, f"a multiple of the {len(pattern)} kinds of attention")
        windowed = ("local" in pattern) == (self.window > 0)
        check(self, "window", windowed, "above 0 with local attention, and 0 without")
        causal = "compressed" not in pattern or self.family == "decoder"
        check(self, "attention", causal, f"without compressed in the family {self.family}")

    def _check_positions(self) -> None:
        if self.position_embedding == "rotary":
            check(self, "rotary_fraction", 0 < self.rotary_fraction <= 1, "above 0 and at most 1")
            even = self.rotary_fraction < 1 or self.actual_head_dim % 2 == 0
            accepted = f"a number that leaves an even head dim (rotary), not {self.actual_head_dim}"
            check(self, "heads", even and self.rotary_dim > 0, accepted)
        if self.position_embedding == "sinusoidal":
            check(self, "width", self.width % 2 == 0, "even with sinusoidal positions")
        causal = self.position_embedding != "alibi" or self.family == "decoder"
        check(self, "position_embedding", causal, f"something else in the family {self.family}")
        if "compressed" in self.attention_pattern:
            added = self.position_embedding in ("learned", "sinusoidal", "none")
            accepted = "learned, sinusoidal or none with compressed attention"
            check(self, "position_embedding", added, accepted)

    def _check_family(self) -> None:
        if self.family == "encoder_decoder":
            serial = [name for name, each in PLACEMENTS.items() if not each.parallel]
            accepted = f"{', '.join(serial[:-1])} or {serial[-1]} with cross-attention"
            check(self, "norm_placement", self.norm_placement in serial, accepted)
        else:
            check(self, "encoder_depth", not self.encoder_depth, f"0 in the family {self.family}")
        encoder = self.family == "encoder"
        alone: dict[str, Any] = {} if encoder else {"token_types": 0, "encoder_heads": "none"}
        if self.family == "recurrent":
            alone |= {"position_embedding": "none", "attention": "full", "num_experts": 0}
        for name, value in alone.items():
            check(self, name, getattr(self, name) == value, f"{value} in the family {self.family}")
