"""Every choice of an experiment, as frozen dataclasses that are validated when made.

A wrong value is an `InputError` of one sentence: the field, the value and what is accepted. These
classes are the command line (`--model.depth 6`); the text under a field is its `--help`.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar


class InputError(ValueError):
    """A mistake in what the user gave; its message is one sentence for the user."""


def near_names(name: str, known: Iterable[str]) -> str:
    """The sentence's end for an unknown `name`: its near ones among `known`, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}."


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a model. The letters are the axes of every docstring in gptjax."""

    family: Literal["decoder", "encoder", "encoder_decoder", "recurrent"] = "decoder"
    """GPT, BERT, the original Transformer, or the LSTM that it displaced."""
    vocab_size: int = 0
    """Tokens in the vocabulary (V); 0 takes the tokenizer's."""
    context: int = 128
    """The most tokens that a sequence may have (T)."""
    depth: int = 4
    """Blocks (L); an encoder-decoder has as many in its decoder."""
    encoder_depth: int = 0
    """Blocks in the encoder of an encoder-decoder; 0 takes depth."""
    width: int = 128
    """Width of the residual stream (D)."""
    heads: int = 4
    """Attention heads (N)."""
    kv_heads: int = 0
    """Key and value heads (K), each shared by heads / kv_heads queries; 0 takes heads."""
    head_size: int = 0
    """Width of one head (H); 0 takes width / heads."""
    hidden: int = 0
    """Width of the feed-forward layer (F); 0 takes 4 x width."""
    positions: Literal["learned", "sinusoidal", "rotary", "alibi", "relative", "none"] = "learned"
    """How a token knows where it stands."""
    pairing: Literal["halves", "neighbours"] = "halves"
    """Which two channels share an angle (rotary, sinusoidal): i and i + H/2, or 2i and 2i + 1."""
    rotary_fraction: float = 1.0
    """rotary: the share of a head's channels that turn."""
    rotary_base: float = 10_000.0
    """rotary: the longest wavelength over 2 pi, about."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """The normalisation of the residual stream."""
    norm_placement: Literal["pre", "post", "sandwich", "parallel", "parallel_shared"] = "pre"
    """Before a layer, after its sum, both sides of it, or attention and feed-forward at once."""
    norm_epsilon: float = 1e-5
    """Added to the variance."""
    embedding_norm: bool = False
    """Normalise the embeddings too (BERT, BLOOM)."""
    final_norm: bool = True
    """Normalise after the last block."""
    attention: str = "full"
    """full, local (window), compressed, or a pattern repeated over the blocks: full,local."""
    window: int = 0
    """local: how many tokens a query sees, its own included."""
    compression: int = 3
    """compressed: keys and values that a strided convolution joins into one."""
    attention_scaled: bool = True
    """Divide the scores by the root of the head width."""
    attention_cap: float = 0.0
    """Scores bounded softly by cap tanh(score / cap); 0 does not."""
    qk_norm: bool = False
    """RMS-normalise each query and key."""
    feedforward: Literal[
        "relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu", "geglu_tanh"
    ] = "gelu_tanh"
    """The feed-forward layer's activation, the last three gated; gelu_tanh is GPT-2's."""
    experts: int = 0
    """Feed-forward layers that each token chooses among (E); 0 is one for all."""
    experts_per_token: int = 2
    """Experts that a token goes to."""
    capacity_factor: float = 0.0
    """Tokens that an expert takes over its even share, the rest dropped in training; 0 is all."""
    bias: bool = True
    """Biases in the linear layers and the layer norms."""
    query_bias: bool | None = None
    """Biases of query, key and value; None follows bias."""
    output_bias: bool | None = None
    """Bias of attention's output; None follows bias."""
    tied: bool = True
    """The head reuses the token embedding."""
    head_bias: bool = False
    """A bias a token in the head."""
    logit_cap: float = 0.0
    """Logits bounded softly by cap tanh(logit / cap); 0 does not."""
    embedding_scaled: bool = False
    """Multiply token embeddings by the root of the width."""
    segments: int = 0
    """encoder: kinds of segments that have an embedding (BERT: 2)."""
    encoder_heads: Literal["none", "pooler", "masked_lm", "pretraining"] = "none"
    """encoder: BERT's pooler, its masked-LM transformation, or both and next sentence."""
    dropout: float = 0.0
    """Share of activations dropped in training: after the embedding, in attention, in residuals."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations; parameters, softmax, norms and loss stay float32."""
    scan_layers: bool = False
    """Run the blocks as one scanned loop (compiles faster when deep), not one after another."""
    remat: bool = False
    """Recompute each block in the backward pass (less memory, one forward pass more)."""

    @property
    def head_width(self) -> int:
        """Width of one head (H), the default resolved."""
        return self.head_size or self.width // self.heads

    @property
    def key_value_heads(self) -> int:
        """Key and value heads (K), the default resolved."""
        return self.kv_heads or self.heads

    @property
    def hidden_width(self) -> int:
        """Width of the feed-forward layer (F), the default resolved."""
        return self.hidden or 4 * self.width

    @property
    def rotary_width(self) -> int:
        """Channels of a head that turn, an even number."""
        return int(self.rotary_fraction * self.head_width) // 2 * 2

    @property
    def attention_pattern(self) -> tuple[str, ...]:
        """The kinds of attention of consecutive blocks, over which the stack repeats."""
        return tuple(self.attention.split(","))

    def __post_init__(self) -> None:
        _check_types(self)
        _check_minimum(self, 1, "context", "depth", "width", "heads", "compression")
        _check_minimum(self, 0, "vocab_size", "encoder_depth", "kv_heads", "head_size", "hidden")
        _check_minimum(self, 0, "window", "experts", "capacity_factor", "attention_cap")
        _check_minimum(self, 0, "logit_cap", "segments")
        _check(self, "dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        _check(self, "norm_epsilon", self.norm_epsilon > 0, "above 0")
        _check(self, "rotary_base", self.rotary_base > 0, "above 0")
        divides = bool(self.head_size) or self.width % self.heads == 0
        _check(self, "heads", divides, f"a divisor of width {self.width}")
        divides = self.heads % self.key_value_heads == 0
        _check(self, "kv_heads", divides, f"a divisor of heads {self.heads}")
        self._check_attention()
        self._check_positions()
        self._check_family()
        among = self.experts == 0 or 1 <= self.experts_per_token <= self.experts
        _check(self, "experts_per_token", among, f"between 1 and experts {self.experts}")

    def _check_attention(self) -> None:
        pattern = self.attention_pattern
        known = set(pattern) <= {"full", "local", "compressed"}
        _check(self, "attention", known, "full, local, compressed, or several joined by commas")
        for name in ("depth", "encoder_depth"):
            divides = getattr(self, name) % len(pattern) == 0
            _check(self, name, divides, f"a multiple of the {len(pattern)} kinds of attention")
        windowed = ("local" in pattern) == (self.window > 0)
        _check(self, "window", windowed, "above 0 with local attention, and 0 without")
        causal = "compressed" not in pattern or self.family == "decoder"
        _check(self, "attention", causal, f"without compressed in the family {self.family}")

    def _check_positions(self) -> None:
        if self.positions == "rotary":
            _check(self, "rotary_fraction", 0 < self.rotary_fraction <= 1, "above 0 and at most 1")
            even = self.rotary_fraction < 1 or self.head_width % 2 == 0
            accepted = f"a number that leaves an even head width (rotary), not {self.head_width}"
            _check(self, "heads", even and self.rotary_width > 0, accepted)
        if self.positions == "sinusoidal":
            _check(self, "width", self.width % 2 == 0, "even with sinusoidal positions")
        causal = self.positions != "alibi" or self.family == "decoder"
        _check(self, "positions", causal, f"something else in the family {self.family}")
        if "compressed" in self.attention_pattern:
            added = self.positions in ("learned", "sinusoidal", "none")
            accepted = "learned, sinusoidal or none with compressed attention"
            _check(self, "positions", added, accepted)

    def _check_family(self) -> None:
        if self.family == "encoder_decoder":
            serial = "parallel" not in self.norm_placement
            _check(self, "norm_placement", serial, "pre, post or sandwich with cross-attention")
        else:
            _check(self, "encoder_depth", not self.encoder_depth, f"0 in the family {self.family}")
        encoder = self.family == "encoder"
        alone: dict[str, Any] = {} if encoder else {"segments": 0, "encoder_heads": "none"}
        if self.family == "recurrent":
            alone |= {"positions": "none", "attention": "full", "experts": 0}
        for name, value in alone.items():
            _check(self, name, getattr(self, name) == value, f"{value} in the family {self.family}")


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes tokens."""

    path: str | None = None
    """A UTF-8 text file; none takes the language reference that every Python carries."""
    tokenizer: str = "bytes"
    """bytes or characters; learnt from the text: sentencepiece:SIZE, unigram:SIZE, bpe:SIZE; read:
    gpt2:PATH, gpt1:PATH, wordpiece:PATH, huggingface:PATH, sentencepiece:FILE.model."""
    validation_fraction: float = 0.1
    """The last part of the text, never trained on."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self, "validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the matrices of the blocks and leaves all else to AdamW."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of the matrices that Muon takes."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """After the warm-up: cosine decay, constant, or stable and then a linear decay (wsd)."""
    warmup_steps: int = 100
    """Steps of linear warm-up from zero."""
    decay_fraction: float = 0.2
    """wsd: the last part of the run, in which the rate decays."""
    final_fraction: float = 0.1
    """The learning rate at the end over its peak."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.99
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; norms and biases never decay."""
    clip_norm: float = 1.0
    """The largest global norm of the gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_minimum(self, 0, "warmup_steps", "weight_decay", "clip_norm")
        for name in ("learning_rate", "muon_learning_rate", "epsilon"):
            _check(self, name, getattr(self, name) > 0, "above 0")
        for name in ("beta1", "beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("decay_fraction", "final_fraction"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "between 0 and 1")


@dataclass(frozen=True)
class TrainConfig:
    """How long, on how much, and how often to look."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences a step (B)."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after another (gradient accumulation)."""
    seed: int = 0
    """Seed of the parameters, the data order and the dropout."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread over the vocabulary."""
    z_loss: float = 0.0
    """Weight of the squared log-partition function, which keeps logits small."""
    balance_loss: float = 0.01
    """Weight of the loss that balances a mixture of experts (the Switch Transformer's value)."""
    router_z_loss: float = 0.001
    """Weight of the squared log-partition of its router (ST-MoE's value)."""
    loss_chunk: int = 0
    """Tokens whose logits exist at a time; 0 takes all at once."""
    log_every: int = 10
    """Steps between two logged lines."""
    eval_every: int = 250
    """Steps between two evaluations on the validation part."""
    checkpoint_every: int = 250
    """Steps between two checkpoints; the last and the best are kept."""

    def __post_init__(self) -> None:
        _check_types(self)
        _check_minimum(self, 1, "steps", "batch_size", "accumulate", "log_every", "eval_every")
        _check_minimum(self, 1, "checkpoint_every")
        _check_minimum(self, 0, "seed", "z_loss", "balance_loss", "router_z_loss", "loss_chunk")
        _check(self, "seed", self.seed < 1 << 32, "below 2**32")
        _check(self, "label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1")
        divides = self.batch_size % self.accumulate == 0
        _check(self, "accumulate", divides, f"a divisor of batch_size {self.batch_size}")


@dataclass(frozen=True)
class ExperimentConfig:
    """One training run, wholly: `config.json` holds it, and rebuilds the run."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _check_types(self)
        shorter = self.optimizer.warmup_steps < self.train.steps
        _check(self.optimizer, "warmup_steps", shorter, f"below train.steps {self.train.steps}")


def with_vocabulary(config: ExperimentConfig, vocab_size: int) -> ExperimentConfig:
    """The config with the tokenizer's vocabulary, where the model leaves it open.

    Raises:
      InputError: a model with fewer tokens than the tokenizer.
    """
    if config.model.vocab_size == 0:
        model = dataclasses.replace(config.model, vocab_size=vocab_size)
        return dataclasses.replace(config, model=model)
    enough = config.model.vocab_size >= vocab_size
    _check(config.model, "vocab_size", enough, f"at least the tokenizer's {vocab_size}")
    return config


Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested dicts of plain values, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(kind: type[Config], values: dict[str, Any], where: str = "config.json") -> Config:
    """A config of class `kind` from nested dicts.

    Raises:
      InputError: a field that `kind` lacks, or a value that it does not accept.
    """
    hints = typing.get_type_hints(kind)
    if not isinstance(values, dict):
        raise InputError(f"{where} holds {values!r} where the fields of {kind.__name__} belong.")
    for name in values:
        if name not in hints:
            raise InputError(f"{where} has an unknown field {name!r}: {near_names(name, hints)}")
    nested = {
        name: from_dict(hints[name], value, f"{where}: {name}")
        if dataclasses.is_dataclass(hints[name])
        else value
        for name, value in values.items()
    }
    return kind(**nested)


def differences(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two nested dicts differ, as `model.depth: 4 -> 6`."""
    found = []
    for name in [*first, *(name for name in second if name not in first)]:
        old, new = first.get(name), second.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: {old} -> {new}")
    return found


def _check(config: Any, name: str, accepted: bool, what: str) -> None:
    if not accepted:
        value = getattr(config, name)
        raise InputError(f"{type(config).__name__}.{name} is {value!r}: it must be {what}.")


def _check_minimum(config: Any, least: int, *names: str) -> None:
    for name in names:
        _check(config, name, getattr(config, name) >= least, f"at least {least}")


def _check_types(config: Any) -> None:
    """Each field holds a value of its annotated type; an int is taken where a float is asked.

    NaN and infinity are no numbers to choose.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            _check(config, name, value in choices, f"one of {', '.join(choices)}")
            continue
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        accepted = any(
            type(value) is kind or (kind is float and type(value) is int) for kind in kinds
        )
        names = ["None" if kind is types.NoneType else kind.__name__ for kind in kinds]
        _check(config, name, accepted, " or ".join(names))
        if isinstance(value, float):
            _check(config, name, math.isfinite(value), "finite")
