"""The exact number of parameters, FLOPs and bytes of a config, without building the model."""

from collections.abc import Iterator
from dataclasses import dataclass

from gptjax.config import TransformerConfig
from gptjax.config.values import (
    ENCODER_HEADS,
    GATES,
    PLACEMENTS,
    RELATIVE_BUCKETS,
    AttentionKind,
    exhaustive,
)

BYTES_PER_PARAMETER = {
    # Both optimizers keep float32 moments: AdamW two per parameter, Muon one per matrix.
    "parameters": 4,
    "gradients": 4,
    "optimizer (AdamW)": 8,
}


@dataclass(frozen=True)
class Part:
    """One kind of parameter over the whole model."""

    name: str
    matrices: int
    """The number of matrices (or vectors) of this kind."""
    parameters: int
    """Their parameters in total."""
    flops: int
    """Forward FLOPs per token of products with them; an embedding lookup or a norm has none."""


@dataclass(frozen=True)
class ModelCost:
    """The parameters of a model and its FLOPs per token.

    A multiply-add counts as two FLOPs; norms, activations and softmax are left out, as in Kaplan et
    al. 2020 (section 2.1) and PaLM (appendix B). The backward pass costs twice the forward pass;
    rematerialisation is not counted. In an encoder-decoder the tokens are the target's, and the
    source is as long as the target.
    """

    parts: tuple[Part, ...]
    unembedding_flops: int
    """Forward FLOPs per token of the head, whose matrix may be the embedding's."""
    attention_flops: int
    """Forward FLOPs per token of Q Kᵀ and of the weighted values, at full context length and
    without the savings of a causal or local mask (PaLM's convention)."""

    @property
    def parameters(self) -> int:
        """The total number of parameters."""
        return sum(part.parameters for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """The parameters used per token: of a mixture of experts, only the chosen experts'."""
        return self.parameters - sum(part.parameters - part.flops // 2 for part in self._sparse())

    @property
    def matrix_flops(self) -> int:
        """Forward FLOPs per token of products with parameters."""
        return self.unembedding_flops + sum(part.flops for part in self.parts)

    @property
    def forward_flops(self) -> int:
        """FLOPs per token of a forward pass."""
        return self.matrix_flops + self.attention_flops

    @property
    def training_flops(self) -> int:
        """FLOPs per token of a forward and a backward pass."""
        return 3 * self.forward_flops

    @property
    def state_bytes(self) -> dict[str, int]:
        """Bytes of the float32 training state, by kind."""
        return {kind: each * self.parameters for kind, each in BYTES_PER_PARAMETER.items()}

    def _sparse(self) -> list[Part]:
        return [part for part in self.parts if part.name.startswith("expert ")]


def model_cost(config: TransformerConfig) -> ModelCost:
    """The cost of the model of `config`; tests compare it with the built model's arrays."""
    counts: dict[str, list[int]] = {}
    for name, matrices, parameters, flops in _parts(config):
        total = counts.setdefault(name, [0, 0, 0])
        for index, count in enumerate((matrices, parameters, flops)):
            total[index] += count
    # Biases and norms, which are spread over the whole model, come last.
    names = sorted(counts, key=lambda name: name in ("biases", "norms"))
    parts = tuple(Part(name, *counts[name]) for name in names if counts[name][0])
    return ModelCost(parts, 2 * config.vocab_size * config.width, _attention_flops(config))


Count = tuple[str, int, int, int]
"""Name, matrices, parameters, FLOPs per token."""


def _matrix(name: str, count: int, fan_in: int, fan_out: int, *, bias: bool) -> Iterator[Count]:
    """`count` matrices that multiply every token, and their biases."""
    size = count * fan_in * fan_out
    yield name, count, size, 2 * size
    yield "biases", count * bias, count * bias * fan_out, 0


def _parts(config: TransformerConfig) -> Iterator[Count]:
    width, vocabulary = config.width, config.vocab_size * config.width
    yield "embedding", 1, vocabulary, 0
    if config.position_embedding == "learned":
        yield "positions", 1, config.context_length * width, 0
    if config.token_types:
        yield "token_types", 1, config.token_types * width, 0
    if config.family == "recurrent":
        yield from _matrix("input gates", config.depth, width, 4 * width, bias=config.bias)
        yield from _matrix("recurrent gates", config.depth, width, 4 * width, bias=False)
    else:
        if config.family == "encoder_decoder":
            yield from _stack(config, config.encoder_depth or config.depth, cross=False)
        yield from _stack(config, config.depth, cross=config.family == "encoder_decoder")
    yield from _norms(config, config.embedding_norm + config.final_norm * _stacks(config))
    yield from _encoder_heads(config)
    if not config.tie_embeddings:
        yield "unembedding", 1, vocabulary, 0
    yield "head bias", int(config.head_bias), config.head_bias * config.vocab_size, 0


def _encoder_heads(config: TransformerConfig) -> Iterator[Count]:
    """BERT's heads with their biases and norm; the pooler and next-sentence head apply to one token
    per sequence, so that their FLOPs per token are left out."""
    width, heads = config.width, ENCODER_HEADS[config.encoder_heads]
    if "pooler" in heads:
        yield "pooler", 2, width * width + width, 0
    if "masked_lm" in heads:
        yield "masked-LM head", 4, width * width + 3 * width, 2 * width * width
    if "next_sentence" in heads:
        yield "next-sentence head", 2, 2 * width + 2, 0


def _stacks(config: TransformerConfig) -> int:
    return 2 if config.family == "encoder_decoder" else 1


def _norms(config: TransformerConfig, count: int) -> Iterator[Count]:
    vectors = count * (2 if config.bias and config.norm == "layernorm" else 1)
    yield "norms", vectors, vectors * config.width, 0


def _stack(config: TransformerConfig, depth: int, *, cross: bool) -> Iterator[Count]:
    """The blocks of a decoder or an encoder, and their relative positions."""
    if config.position_embedding == "relative":
        yield "relative positions", 1, RELATIVE_BUCKETS * config.heads, 0
    yield from _attention(config, depth, "")
    if cross:
        yield from _attention(config, depth, "cross ")
    compressed = (
        depth // len(config.attention_pattern) * config.attention_pattern.count("compressed")
    )
    heads = config.actual_kv_heads * config.actual_head_dim
    query_bias = config.bias if config.query_bias is None else config.query_bias
    # Each group of `compression` tokens is multiplied once.
    size = compressed * config.compression * heads * heads
    yield "compression", 2 * compressed, 2 * size, 2 * 2 * size // config.compression
    yield "biases", 2 * compressed * query_bias, 2 * compressed * query_bias * heads, 0
    yield from _mlp(config, depth)
    placement, layers = PLACEMENTS[config.norm_placement], 3 if cross else 2
    yield from _norms(config, placement.norms * (1 if placement.shared else layers) * depth)


def _attention(config: TransformerConfig, depth: int, kind: str) -> Iterator[Count]:
    width, heads = config.width, config.heads * config.actual_head_dim
    kv_heads = config.actual_kv_heads * config.actual_head_dim
    query_bias = config.bias if config.query_bias is None else config.query_bias
    output_bias = config.bias if config.output_bias is None else config.output_bias
    yield from _matrix(f"{kind}query", depth, width, heads, bias=query_bias)
    yield from _matrix(f"{kind}key", depth, width, kv_heads, bias=query_bias)
    yield from _matrix(f"{kind}value", depth, width, kv_heads, bias=query_bias)
    yield from _matrix(f"{kind}output", depth, heads, width, bias=output_bias)
    vectors = 2 * depth * config.qk_norm
    yield "norms", vectors, vectors * config.actual_head_dim, 0


def _mlp(config: TransformerConfig, depth: int) -> Iterator[Count]:
    width, hidden, experts = config.width, config.actual_mlp_dim, config.num_experts
    directions = [("up", width, hidden), ("down", hidden, width)]
    if config.activation in GATES:
        directions.insert(1, ("gate", width, hidden))
    if not experts:
        for name, fan_in, fan_out in directions:
            yield from _matrix(name, depth, fan_in, fan_out, bias=config.bias)
        return
    yield from _matrix("router", depth, width, experts, bias=False)
    for name, fan_in, fan_out in directions:
        size = depth * fan_in * fan_out
        flops = 2 * size * config.experts_per_token
        yield f"expert {name}", depth * experts, size * experts, flops


def _attention_flops(config: TransformerConfig) -> int:
    """FLOPs per token: two products with head_dim per head and key, Q Kᵀ and weights · V."""
    if config.family == "recurrent":
        return 0
    pattern, context_length = config.attention_pattern, config.context_length
    keys = exhaustive(
        AttentionKind,
        {
            "full": context_length,
            "local": context_length,
            "compressed": 1 + context_length // config.compression,
        },
    )
    total_keys = config.depth // len(pattern) * sum(keys[kind] for kind in pattern)
    if config.family == "encoder_decoder":
        encoder_depth = config.encoder_depth or config.depth
        total_keys += (encoder_depth + config.depth) * context_length
    return 2 * 2 * config.heads * config.actual_head_dim * total_keys
