"""What a comparison comes to: outcomes of single runs, and what is known of each variant."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from gptjax.compare.question import Comparison
from gptjax.config import InputError, OptimizerConfig, TransformerConfig, from_dict
from gptjax.config.checks import check_types

Record = TypeVar("Record", "Outcome", "Look")


@dataclass(frozen=True)
class Outcome:
    """What one run came to: a line of results.jsonl."""

    variant: str
    size: str
    """Of --scale, as params=1M; empty without."""
    purpose: Literal["search", "final"]
    """Whether it helped to choose the learning rate, or is compared."""
    seed: int
    learning_rate: float
    steps: int
    tokens: int
    """That it was trained on."""
    validation_loss: float | None
    """After the last step, nats per token; None of a run that failed."""
    curve_steps: tuple[int, ...]
    """When it was evaluated."""
    curve_losses: tuple[float, ...]
    """What came out, nats per token."""
    seconds: float
    """Its share of the wall time of the runs that it was trained with, compilation included."""
    error: str
    """Why it failed, in a sentence; empty if it did not."""
    directory: str
    """Of the run, below that of the comparison."""


def read_record(kind: type[Record], values: Any, where: str) -> Record:
    """An outcome or a look from what JSON has of it; `where` names it in an error.

    Raises:
      InputError: a field that is missing, unknown or of another type.
    """
    fields = values if isinstance(values, dict) else {}
    missing = [field.name for field in dataclasses.fields(kind) if field.name not in fields]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}: it is of no comparison, or another.")
    record = from_dict(kind, fields, where)
    lost = {name: None for name, value in vars(record).items() if value != value}  # A loss, if nan.
    try:
        check_types(dataclasses.replace(record, **lost))
    except InputError as error:
        raise InputError(f"{where} is damaged: {error}") from error
    return record


class Costs(NamedTuple):
    """What a variant takes, measured in turn with all others."""

    tokens_per_second: float
    """Of training, one run on all devices."""
    peak_bytes: int
    """That the step holds at once, by XLA's plan of it: arguments, results and all between."""
    compile_seconds: float
    """Of the training step."""
    decode_tokens_per_second: float | None
    """One sequence with its cache; None of a family that does not decode."""
    tpu_peak_bytes: int | None
    """Of the same step compiled for a TPU v5e; None without libtpu."""


@dataclass(frozen=True)
class Look:
    """A report of a variant's difference from the baseline, on the seeds that both finished."""

    variant: str
    size: str
    day: str
    """When it was made, as 2026-11-27."""
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    """[seeds], directories of the variant's runs."""
    baseline_runs: tuple[str, ...]
    """[seeds], of the baseline's."""


@dataclass(frozen=True)
class Entry:
    """A variant at one size."""

    variant: str
    size: str
    model: TransformerConfig
    """As matched."""
    optimizer: OptimizerConfig
    """With the learning rate that its final runs took."""
    parameters: int
    training_flops: int
    """A token."""
    target: float | None
    """Of what was matched; None where nothing was."""
    reached: float | None
    """What the variant has of it."""
    steps: int
    searched: dict[float, tuple[float | None, ...]]
    """Validation losses of the search's seeds by learning rate; empty where there was no choice."""
    finals: tuple[Outcome, ...]
    """By seed, failed ones too."""
    costs: Costs | None
    """None where they could not be measured."""
    looks: tuple[Look, ...] = ()
    """At the difference from the baseline, this report's the last; empty where seeds are too few,
    and where their number was fixed beforehand, so that there is one look only."""


@dataclass(frozen=True)
class Answer:
    """All that the report is made of."""

    comparison: Comparison
    command: str
    """That was run."""
    commit: str
    """Of the code; empty outside a repository."""
    environment: dict[str, Any]
    """Of `gptjax.runs.directory.environment`: versions, device, machine."""
    data: str
    """What was trained and evaluated on, in a line."""
    sizes: tuple[str, ...]
    """One empty one without --scale."""
    entries: tuple[Entry, ...]
    """By size, then by variant in the order asked for; the first of each size is the baseline."""
    outcomes: tuple[Outcome, ...]
    """Of all runs, the search's and the failed ones too."""
    notes: tuple[str, ...]
    """Sentences on what could not be done or matched."""
    seconds: float
    """Wall time of all runs, in whichever calls they ran."""
