"""Parameters, FLOPs and bytes of a config, by exact counting, before anything is built."""

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
    # Both optimizers keep float32 moments: AdamW two a parameter, Muon one a matrix.
    "parameters": 4,
    "gradients": 4,
    "optimizer (AdamW)": 8,
}


@dataclass(frozen=True)
class Part:
    """One kind of parameter over the whole model."""

    name: str
    matrices: int
    """How many matrices (or vectors) of this kind there are."""
    parameters: int
    """Their numbers together."""
    flops: int
    """Forward operations a token in products with them; a looked-up table or a norm has none."""


@dataclass(frozen=True)
class ModelCost:
    """What a model is made of and what a token costs.

    A multiply-add counts as two operations; norms, activations and softmax are left out, as in
    Kaplan et al. 2020 (section 2.1) and PaLM (appendix B). The backward pass costs twice the
    forward pass; recomputation (remat) is not counted as useful. In an encoder-decoder a token is
    one of the target, and the source is as long.
    """

    parts: tuple[Part, ...]
    unembedding_flops: int
    """Forward operations a token in the head, whose matrix may be the embedding's."""
    attention_flops: int
    """Forward operations a token in Q Kᵀ and in the weighted values, at full context and
    without the saving that a causal or local mask allows (PaLM's convention)."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(part.parameters for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """Those that a token meets: of a mixture of experts, the chosen ones' alone."""
        return self.parameters - sum(part.parameters - part.flops // 2 for part in self._sparse())

    @property
    def matrix_flops(self) -> int:
        """Forward operations a token in products with parameters."""
        return self.unembedding_flops + sum(part.flops for part in self.parts)

    @property
    def forward_flops(self) -> int:
        """Operations a token in a forward pass."""
        return self.matrix_flops + self.attention_flops

    @property
    def training_flops(self) -> int:
        """Operations a token in a forward and a backward pass."""
        return 3 * self.forward_flops

    @property
    def state_bytes(self) -> dict[str, int]:
        """Bytes of float32 training state by kind."""
        return {kind: each * self.parameters for kind, each in BYTES_PER_PARAMETER.items()}

    def _sparse(self) -> list[Part]:
        return [part for part in self.parts if part.name.startswith("expert ")]


def model_cost(config: TransformerConfig) -> ModelCost:
    """Count a model from its config alone; the tests hold it against the leaves built."""
    counts: dict[str, list[int]] = {}
    for name, matrices, parameters, flops in _parts(config):
        total = counts.setdefault(name, [0, 0, 0])
        for index, number in enumerate((matrices, parameters, flops)):
            total[index] += number
    # What is spread over the whole model comes after what has a place in it.
    names = sorted(counts, key=lambda name: name in ("biases", "norms"))
    parts = tuple(Part(name, *counts[name]) for name in names if counts[name][0])
    return ModelCost(parts, 2 * config.vocab_size * config.width, _attention_flops(config))


Count = tuple[str, int, int, int]
"""Name, matrices, parameters, FLOPs per token."""


def _matrix(name: str, count: int, fan_in: int, fan_out: int, *, bias: bool) -> Iterator[Count]:
    """`count` matrices that every token is multiplied by, and their biases."""
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
    """BERT's, each with its biases and norm; pooler and next sentence see one token a sequence."""
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
    """The blocks of a decoder or an encoder, and what they share."""
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
    # A token belongs to one group, which is multiplied once for all its tokens.
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
    """A key costs each query two products of the heads' width."""
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
    seen = config.depth // len(pattern) * sum(keys[kind] for kind in pattern)
    if config.family == "encoder_decoder":
        encoder_depth = config.encoder_depth or config.depth
        seen += (encoder_depth + config.depth) * context_length
    return 2 * 2 * config.heads * config.actual_head_dim * seen
