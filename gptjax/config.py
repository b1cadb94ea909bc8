"""Every choice that an experiment can make, as frozen dataclasses that are validated when made.

A wrong value is an `InputError` of one sentence that names the field, the value and what is
accepted. The command line is made from these classes (`--model.depth 6`), and the text under a
field is its `--help`.
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

    vocab_size: int = 0
    """Tokens in the vocabulary (V); 0 takes the tokenizer's."""
    context: int = 128
    """The most tokens that a sequence may have (T)."""
    depth: int = 4
    """Blocks (L)."""
    width: int = 128
    """Width of the residual stream (D)."""
    heads: int = 4
    """Attention heads (N); the head width H is width / heads."""
    hidden: int = 0
    """Width of the feed-forward layer (F); 0 takes 4 x width."""
    positions: Literal["learned", "rotary", "none"] = "learned"
    """How a token knows where it stands."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """The normalisation before attention, before the feed-forward layer and before the head."""
    feedforward: Literal["relu", "relu2", "gelu", "gelu_tanh"] = "gelu_tanh"
    """The feed-forward layer's activation; gelu_tanh is GPT-2's."""
    bias: bool = True
    """Biases in the linear layers and the layer norms."""
    tied: bool = True
    """The head reuses the token embedding."""
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
        """Width of one head (H)."""
        return self.width // self.heads

    @property
    def hidden_width(self) -> int:
        """Width of the feed-forward layer (F), the default resolved."""
        return self.hidden or 4 * self.width

    def __post_init__(self) -> None:
        _check_types(self)
        _check_minimum(self, 1, "context", "depth", "width", "heads")
        _check_minimum(self, 0, "vocab_size", "hidden")
        _check(self, "heads", self.width % self.heads == 0, f"a divisor of width {self.width}")
        _check(self, "dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        if self.positions == "rotary":
            even = self.head_width % 2 == 0
            accepted = f"a number that leaves an even head width (rotary), not {self.head_width}"
            _check(self, "heads", even, accepted)


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes tokens."""

    path: str | None = None
    """A UTF-8 text file; none takes the language reference that every Python carries."""
    tokenizer: str = "bytes"
    """bytes, characters, or sentencepiece:SIZE (trained on the text)."""
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
        _check_minimum(self, 1, "steps", "batch_size", "accumulate")
        _check_minimum(self, 1, "log_every", "eval_every", "checkpoint_every")
        _check_minimum(self, 0, "seed", "z_loss", "loss_chunk")
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
