"""Results of a comparison: outcomes of single runs, and what is known of each variant."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from gptjax.compare.question import Comparison
from gptjax.config import InputError, OptimizerConfig, TransformerConfig, from_dict
from gptjax.config.checks import check_types

Record = TypeVar("Record", "Outcome", "Look")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run: a line of results.jsonl."""

    variant: str
    size: str
    """A size of --scale, as params=1M; empty without --scale."""
    purpose: Literal["search", "final"]
    """Whether it served to choose the learning rate, or is compared."""
    seed: int
    learning_rate: float
    steps: int
    tokens: int
    """Training tokens."""
    validation_loss: float | None
    """After the last step, nats per token; None of a run that failed."""
    curve_steps: tuple[int, ...]
    """Steps of the evaluations."""
    curve_losses: tuple[float, ...]
    """Validation losses at these steps, nats per token."""
    seconds: float
    """Its share of the wall time of the runs trained together, compilation included."""
    error: str
    """Why it failed, as a sentence; empty if it did not."""
    directory: str
    """The run's directory, relative to the comparison's."""


def read_record(kind: type[Record], values: Any, where: str) -> Record:
    """Returns an outcome or a look from its JSON; `where` names it in errors.

    Raises:
      InputError: a field that is missing, unknown or of another type.
    """
    fields = values if isinstance(values, dict) else {}
    missing = [field.name for field in dataclasses.fields(kind) if field.name not in fields]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}: it is not of this comparison.")
    record = from_dict(kind, fields, where)
    lost = {name: None for name, value in vars(record).items() if value != value}  # A loss, if nan.
    try:
        check_types(dataclasses.replace(record, **lost))
    except InputError as error:
        raise InputError(f"{where} is damaged: {error}") from error
    return record


class Costs(NamedTuple):
    """Costs of a variant, all variants timed in turn."""

    tokens_per_second: float
    """Training throughput, one run on all devices."""
    peak_bytes: int
    """Peak memory of the step by XLA's plan: arguments, results and temporaries."""
    compile_seconds: float
    """Compilation time of the training step."""
    decode_tokens_per_second: float | None
    """One sequence with its KV cache; None for a family that does not decode."""
    tpu_peak_bytes: int | None
    """Peak memory of the same step compiled for a TPU v5e; None without libtpu."""


@dataclass(frozen=True)
class Look:
    """A look (interim analysis): a report of a difference, on the seeds that both finished."""

    variant: str
    size: str
    day: str
    """Date of the report, as 2026-11-27."""
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    """[seeds], directories of the variant's runs."""
    baseline_runs: tuple[str, ...]
    """[seeds], directories of the baseline's runs."""


@dataclass(frozen=True)
class Entry:
    """A variant at one size."""

    variant: str
    size: str
    model: TransformerConfig
    """The matched model."""
    optimizer: OptimizerConfig
    """With the learning rate of its final runs."""
    parameters: int
    training_flops: int
    """Per token."""
    target: float | None
    """Target value of the matched measure; None where nothing is matched."""
    reached: float | None
    """The variant's value of it."""
    steps: int
    searched: dict[float, tuple[float | None, ...]]
    """Validation losses of the search seeds by learning rate; empty without a search."""
    finals: tuple[Outcome, ...]
    """By seed, including failed runs."""
    costs: Costs | None
    """None where they could not be measured."""
    looks: tuple[Look, ...] = ()
    """Looks at the difference from the baseline, this report's last; empty where seeds are too few,
    or where their number was fixed in advance, so that there is a single look."""


@dataclass(frozen=True)
class Answer:
    """Everything the report is made from."""

    comparison: Comparison
    command: str
    """The command line."""
    commit: str
    """Git commit of the code; empty outside a repository."""
    environment: dict[str, Any]
    """From `gptjax.runs.result.environment`: versions, device, machine."""
    data: str
    """Description of the data, in one line."""
    sizes: tuple[str, ...]
    """A single empty string without --scale."""
    entries: tuple[Entry, ...]
    """By size, then by variant in the order given; the first of each size is the baseline."""
    outcomes: tuple[Outcome, ...]
    """Outcomes of all runs, including the search's and failed ones."""
    notes: tuple[str, ...]
    """Sentences on what could not be measured or matched."""
    seconds: float
    """Wall time of all runs, over all calls."""
