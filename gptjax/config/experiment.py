"""A training run: its data, its optimizer, its length, and the model."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from gptjax.config.checks import check, check_minimum, check_types
from gptjax.config.model import TransformerConfig


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
        check_types(self)
        check(self, "validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1")


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
        check_types(self)
        check_minimum(self, 0, "warmup_steps", "weight_decay", "clip_norm")
        for name in ("learning_rate", "muon_learning_rate", "epsilon"):
            check(self, name, getattr(self, name) > 0, "above 0")
        for name in ("beta1", "beta2"):
            check(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("decay_fraction", "final_fraction"):
            check(self, name, 0 <= getattr(self, name) <= 1, "between 0 and 1")


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
        check_types(self)
        check_minimum(self, 1, "steps", "batch_size", "accumulate", "log_every", "eval_every")
        check_minimum(self, 1, "checkpoint_every")
        check_minimum(self, 0, "seed", "z_loss", "balance_loss", "router_z_loss", "loss_chunk")
        check(self, "seed", self.seed < 1 << 32, "below 2**32")
        check(self, "label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1")
        divides = self.batch_size % self.accumulate == 0
        check(self, "accumulate", divides, f"a divisor of batch_size {self.batch_size}")


@dataclass(frozen=True)
class ExperimentConfig:
    """One training run, wholly: `config.json` holds it, and rebuilds the run."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_types(self)
        shorter = self.optimizer.warmup_steps < self.train.steps
        check(self.optimizer, "warmup_steps", shorter, f"below train.steps {self.train.steps}")


def with_vocabulary(config: ExperimentConfig, vocab_size: int) -> ExperimentConfig:
    """The config with the tokenizer's vocabulary, where the model leaves it open.

    Raises:
      InputError: a model with fewer tokens than the tokenizer.
    """
    if config.model.vocab_size == 0:
        model = dataclasses.replace(config.model, vocab_size=vocab_size)
        return dataclasses.replace(config, model=model)
    enough = config.model.vocab_size >= vocab_size
    check(config.model, "vocab_size", enough, f"at least the tokenizer's {vocab_size}")
    return config
