"""Parameters, FLOPs and bytes of a config, by exact counting, before anything is built."""

from dataclasses import dataclass

from gptjax.config import TransformerConfig

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
    multiplied: bool
    """Whether every token is multiplied by them (a looked-up table or a norm is not)."""


@dataclass(frozen=True)
class Ledger:
    """What a model is made of and what a token costs.

    A multiply-add counts as two operations; norms, activations and softmax are left out, as in
    Kaplan et al. 2020 (section 2.1) and PaLM (appendix B). The backward pass costs twice the
    forward pass; recomputation (remat) is not counted as useful.
    """

    parts: tuple[Part, ...]
    matrix_flops: int
    """Forward operations a token in products with parameters."""
    attention_flops: int
    """Forward operations a token in Q Kᵀ and in the mixture of values, at full context and
    without the saving that a causal mask allows (PaLM's convention)."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(part.parameters for part in self.parts)

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


def ledger(config: TransformerConfig) -> Ledger:
    """Count a decoder from its config alone; the tests hold it against the leaves built."""
    depth, width, hidden = config.depth, config.width, config.hidden_width
    bias = depth * config.bias

    def matrices(name: str, fan_in: int, fan_out: int) -> Part:
        return Part(name, depth, depth * fan_in * fan_out, multiplied=True)

    norms = 2 * depth + 1
    norm_vectors = 2 if config.bias and config.norm == "layernorm" else 1
    unembedding = config.vocab_size * width
    parts = [
        Part("embedding", 1, unembedding, multiplied=False),
        Part("positions", 1, config.context * width, multiplied=False),
        matrices("query", width, width),
        matrices("key", width, width),
        matrices("value", width, width),
        matrices("output", width, width),
        matrices("up", width, hidden),
        matrices("down", hidden, width),
        Part("biases", 6 * bias, bias * (5 * width + hidden), multiplied=False),
        Part("norms", norm_vectors * norms, norm_vectors * norms * width, multiplied=False),
        Part("unembedding", 1, unembedding, multiplied=True),
    ]
    absent = {
        "positions": config.positions != "learned",
        "biases": not config.bias,
        "unembedding": config.tied,
    }
    parts = [part for part in parts if not absent.get(part.name, False)]
    multiplied = sum(part.parameters for part in parts if part.multiplied)
    return Ledger(
        parts=tuple(parts),
        matrix_flops=2 * (multiplied + (unembedding if config.tied else 0)),
        attention_flops=2 * 2 * depth * config.context * width,
    )
