"""The config of a training run: model, data, optimizer, length, mesh."""

import dataclasses
import itertools
import math
from dataclasses import dataclass, field

from gptjax.config.checks import check, check_minimum, check_types, whole_number
from gptjax.config.mesh import MeshConfig
from gptjax.config.model import TransformerConfig
from gptjax.config.values import (
    WITH_MU_DTYPE,
    MuDtype,
    Objective,
    OptimizerName,
    Packing,
    Schedule,
    TrackerName,
)


@dataclass(frozen=True)
class DataConfig:
    """Sources, tokenizer, and what the model is trained to predict."""

    source: tuple[str, ...] = ("embedded",)
    """embedded (the language reference that every Python carries), files, globs, tfds:NAME,
    hf:NAME, tokens:SHARDS; gptjax/data/README.md has the options behind #."""
    target: tuple[str, ...] = ()
    """sequence_to_sequence: the target of each source, document by document."""
    weights: tuple[float, ...] = ()
    """Share of the rows drawn from each source; none takes every row of all sources equally."""
    stages: tuple[str, ...] = ()
    """Other shares from some steps on, STEP:SHARE,SHARE as in 5000:0.2,0.8; 0 leaves a source out.
    Each source goes on where it was."""
    validation: tuple[str, ...] = ()
    """Sources held out for validation; none holds out the last part of each source."""
    validation_target: tuple[str, ...] = ()
    """sequence_to_sequence: the target of each validation source."""
    validation_fraction: float = 0.1
    """Last part of each source, held out for validation."""
    tokenizer: str = "bytes"
    """bytes or characters; trained on the text: sentencepiece:SIZE, unigram:SIZE, bpe:SIZE; read
    from files: gpt2:PATH, gpt1:PATH, wordpiece:PATH, huggingface:PATH,
    sentencepiece:FILE.model."""
    objective: Objective = "causal"
    """What is predicted: the next token (causal); masked tokens, with next_sentence in pairs of
    segments; the target of a source; the rest of a text (prefix), or spans removed from it."""
    packing: Packing = "split"
    """Rows cut from concatenated documents, or documents side by side, masked from each other."""
    mask_rate: float = 0.15
    """masked_lm, next_sentence, span_corruption: share of tokens that are masked or removed."""
    whole_words: bool = False
    """masked_lm, next_sentence: mask whole words instead of single tokens."""
    mean_span: float = 3.0
    """span_corruption: mean length of a removed span, in tokens."""
    buckets: int = 4
    """sequence_to_sequence: number of lengths that pairs are bucketed by and padded to."""
    cache: str = ""
    """Directory that keeps tokenised text for later runs; empty keeps it for this run only."""
    streaming: bool = False
    """Tokenise on the fly during training: nothing is stored, and documents are shuffled."""

    def __post_init__(self) -> None:
        check_types(self)
        check_minimum(self, 1, "mean_span", "buckets")
        for name in ("validation_fraction", "mask_rate"):
            check(self, name, 0 < getattr(self, name) < 1, "between 0 and 1")
        check(self, "source", bool(self.source), "at least one source")
        self._check_counts()
        packs = self.packing == "split" or self.objective in ("causal", "masked_lm")
        check(self, "packing", packs, f"split with the objective {self.objective}")
        masks = not self.whole_words or self.objective in ("masked_lm", "next_sentence")
        check(self, "whole_words", masks, f"False with the objective {self.objective}")
        streams = not (self.streaming and self.objective == "next_sentence")
        check(self, "streaming", streams, "False with next_sentence, which pairs documents")

    def _check_counts(self) -> None:
        count = len(self.source)
        check(self, "weights", len(self.weights) in (0, count), f"a number for each of {count}")
        check(self, "weights", all(0 < w < math.inf for w in self.weights), "above 0")
        accepted = (
            f"STEP:SHARE,… with a share for each of {count}, steps rising from 2, beside weights "
            "and without streaming"
        )
        check(self, "stages", self._stages_fit(), accepted)
        pairs = self.objective == "sequence_to_sequence"
        for name, sources in (("target", self.source), ("validation_target", self.validation)):
            needed = len(sources) if pairs else 0
            accepted = f"{needed} of them with the objective {self.objective}"
            check(self, name, len(getattr(self, name)) == needed, accepted)

    def _stages_fit(self) -> bool:
        steps = [1, *(step for step, _ in self.later_weights)]
        rising = all(one < other for one, other in itertools.pairwise(steps))
        fits = all(
            len(weights) == len(self.source) and min(weights) >= 0 < sum(weights) < math.inf
            for _, weights in self.later_weights
        )
        mixed = bool(self.weights) and not self.streaming
        return not self.stages or (mixed and rising and fits)

    @property
    def later_weights(self) -> list[tuple[int, tuple[float, ...]]]:
        """The first step of each of `stages`, and its weights; step 0 of one that is not valid."""
        found = []
        for stage in self.stages:
            step, _, shares = stage.partition(":")
            try:
                weights = tuple(map(float, shares.split(",")))
            except ValueError:
                weights = ()
            found.append((whole_number(step) or 0, weights))
        return found


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: OptimizerName = "adamw"
    """How gradients become updates; weight decay is decoupled in all, as in AdamW. muon
    orthogonalises the updates of the blocks' matrices and leaves all else to AdamW."""
    learning_rate: float = 1e-3
    """Peak learning rate; with muon, that of AdamW."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of the matrices that Muon takes."""
    schedule: Schedule = "cosine"
    """After warmup: cosine decay, constant, or stable and then linear decay (wsd)."""
    warmup_steps: int | None = None
    """Steps of linear warmup from zero; None is 100, or a fifth of a shorter run."""
    decay_fraction: float = 0.2
    """wsd: last part of the run, over which the learning rate decays."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a fraction of the peak."""
    beta1: float = 0.9
    """Decay rate of the first moment; sgd: momentum; rmsprop has none."""
    beta2: float = 0.99
    """Decay rate of the second moment; lion: of its momentum; sgd has none."""
    epsilon: float = 1e-8
    """Added to the root of the second moment; lion and sgd have none."""
    mu_dtype: MuDtype = "float32"
    """Dtype of the first moment, one value per parameter; the second stays float32."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; norms and biases never decay."""
    clip_norm: float = 1.0
    """Maximum global norm of the gradient; 0 does not clip."""

    def __post_init__(self) -> None:
        check_types(self)
        check_minimum(self, 0, "weight_decay", "clip_norm")
        typed = self.mu_dtype == "float32" or self.name in WITH_MU_DTYPE
        check(self, "mu_dtype", typed, f"float32 with {self.name}")
        warms = self.warmup_steps is None or self.warmup_steps >= 0
        check(self, "warmup_steps", warms, "at least 0")
        for name in ("learning_rate", "muon_learning_rate", "epsilon"):
            check(self, name, getattr(self, name) > 0, "above 0")
        for name in ("beta1", "beta2"):
            check(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("decay_fraction", "min_lr_ratio"):
            check(self, name, 0 <= getattr(self, name) <= 1, "between 0 and 1")

    def warmup(self, steps: int) -> int:
        """Warmup steps of a run of `steps`, the default resolved."""
        return min(100, steps // 5) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True)
class TrainConfig:
    """Steps, batch size, loss terms, and how often to log, evaluate and save."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences per step (B)."""
    grad_accumulation: int = 1
    """Parts that a batch is split into, computed one after another (gradient accumulation)."""
    seed: int = 0
    """Seed of the parameters, the data order and the dropout."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread over the vocabulary."""
    z_loss: float = 0.0
    """Weight of the squared log-partition function, which keeps logits small."""
    balance_loss: float = 0.01
    """Weight of a mixture of experts' load-balancing loss (the Switch Transformer's value)."""
    router_z_loss: float = 0.001
    """Weight of the router's squared log-partition function (ST-MoE's value)."""
    loss_chunk: int = 0
    """Tokens whose logits are in memory at a time; 0 takes all at once."""
    steps_per_dispatch: int = 0
    """Most steps that one program makes before the host looks; 0 takes 1 on a CPU, and elsewhere as
    many as the host needs to keep up. It changes no result, but logged steps appear in groups."""
    log_every: int = 10
    """Steps between logged lines."""
    eval_every: int = 250
    """Steps between evaluations on the validation part."""
    checkpoint_every: int = 250
    """Steps between checkpoints; the last and the best are kept."""
    checkpoint_minutes: float = 0.0
    """Minutes after which a checkpoint is saved if none was; 0 saves by steps alone."""
    keep_every: int = 0
    """Steps between checkpoints that are kept as well, for later analysis; 0 keeps none."""
    watch: bool = False
    """Follow norms of parameters, gradients, updates and activations of each layer, attention
    scores, entropies and dead units, beside the loss (gptjax/training/watch.py)."""
    watch_every: int = 250
    """Steps between what `watch` measures, a multiple of `log_every`."""
    profile: str = ""
    """Steps whose time is profiled, `FIRST:LAST`, as 20:25: a table by part of the model, the page
    profile.html, and JAX's trace in profile/ for Perfetto and XProf."""
    track: tuple[TrackerName, ...] = ("tensorboard",)
    """Where logged scalars go beside metrics.jsonl: TensorBoard's files in the run's directory,
    Weights & Biases, MLflow or Trackio, which their own variables configure."""

    def __post_init__(self) -> None:
        check_types(self)
        check_minimum(
            self, 1, "steps", "batch_size", "grad_accumulation", "log_every", "eval_every"
        )
        check_minimum(self, 1, "checkpoint_every", "watch_every")
        check_minimum(self, 0, "seed", "z_loss", "balance_loss", "router_z_loss", "loss_chunk")
        check_minimum(self, 0, "keep_every", "steps_per_dispatch", "checkpoint_minutes")
        saved = self.keep_every % self.checkpoint_every == 0
        check(self, "keep_every", saved, f"a multiple of checkpoint_every {self.checkpoint_every}")
        check(self, "steps", self.steps < 1 << 31, "below 2**31")
        logged = not self.watch or self.watch_every % self.log_every == 0
        check(self, "watch_every", logged, f"a multiple of log_every {self.log_every}")
        window = self.profiled
        inside = 1 <= window.start < window.stop <= self.steps + 1
        wanted = f"FIRST:LAST, steps from 1 to {self.steps}, as 20:25"
        check(self, "profile", not self.profile or inside, wanted)
        once = len(set(self.track)) == len(self.track)
        check(self, "track", once, "each tracker once")
        check(self, "seed", self.seed < 1 << 32, "below 2**32")
        check(self, "label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1")
        divides = self.batch_size % self.grad_accumulation == 0
        check(self, "grad_accumulation", divides, f"a divisor of batch_size {self.batch_size}")

    @property
    def profiled(self) -> range:
        """The steps of `profile`; empty without, or if it is not `FIRST:LAST`."""
        first, _, last = map(whole_number, self.profile.partition(":"))
        return range(0) if first is None or last is None else range(first, last + 1)


@dataclass(frozen=True)
class ExperimentConfig:
    """The whole config of a training run; `config.json` stores it and rebuilds the run."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        check_types(self)
        shorter = self.optimizer.warmup(self.train.steps) < self.train.steps
        check(self.optimizer, "warmup_steps", shorter, f"below train.steps {self.train.steps}")
        begun = all(step <= self.train.steps for step, _ in self.data.later_weights)
        check(self.data, "stages", begun, f"of steps up to train.steps {self.train.steps}")
        alone = not self.mesh.pmap or self.train.steps_per_dispatch <= 1
        check(self.train, "steps_per_dispatch", alone, "0 or 1 with mesh.pmap")


def with_vocabulary(config: ExperimentConfig, vocab_size: int) -> ExperimentConfig:
    """The config with the tokenizer's vocabulary size, where the model leaves it open.

    Raises:
      InputError: a model with fewer tokens than the tokenizer.
    """
    if config.model.vocab_size == 0:
        model = dataclasses.replace(config.model, vocab_size=vocab_size)
        return dataclasses.replace(config, model=model)
    enough = config.model.vocab_size >= vocab_size
    check(config.model, "vocab_size", enough, f"at least the tokenizer's {vocab_size}")
    return config
