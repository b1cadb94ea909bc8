"""The tables of a report."""

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from gptjax.compare.analysis.scaling import Law
from gptjax.compare.analysis.statistics import Interval
from gptjax.compare.analysis.verdicts import Standing, finished, seed_differences
from gptjax.compare.report.document import Table, code
from gptjax.compare.report.phrases import UNKNOWN, ends, known, memory, nats, ratio, short
from gptjax.compare.results import Answer, Entry, Outcome
from gptjax.config import to_dict
from gptjax.plots import signed

COEFFICIENTS = {"E": ".3f", "A": ".3g", "alpha": ".3f"}
"""Coefficients of a law L(N), and the format of each."""

TRIMMED = 5
"""The least number of seeds of which a trimmed mean drops one at either end."""


def results(answer: Answer, standings: Sequence[Standing], baseline: Entry) -> Table:
    """Returns the table of verdicts, differences and losses."""
    level = f"{100 * answer.comparison.confidence:g}%"
    others = [each.entry for each in standings if each.entry is not baseline]
    trimmed = any(len(seed_differences(entry, baseline)) >= TRIMMED for entry in others)
    rows = []
    for standing in standings:
        spread = f" ± {nats(standing.deviation)}" if known(standing.deviation) else ""
        pairs = seed_differences(standing.entry, baseline)
        apart = np.mean(pairs) if len(pairs) and standing.entry is not baseline else None
        row = [
            code(standing.entry.variant),
            standing.verdict,
            UNKNOWN if apart is None else signed(float(apart)),
            ends(standing.difference, "{:+.4f}"),
            nats(standing.mean) + spread,
            ends(standing.interval),
            f"{len(finished(standing.entry))} of {len(standing.entry.finals)}",
        ]
        if trimmed:
            row.insert(4, _difference(standing.trimmed if len(pairs) >= TRIMMED else None))
        rows.append(tuple(row))
    head = [
        "Variant",
        "Verdict",
        "Difference from the baseline",
        "Interval of the difference, Holm",
        "Validation loss, mean ± sd",
        f"{level} interval of the mean",
        "Seeds",
    ]
    if trimmed:
        head.insert(4, "Trimmed mean of the differences, interval")
    return Table(tuple(head), tuple(rows), tuple(each.tone for each in standings), words=(1,))


def _difference(interval: Interval | None) -> str:
    """Returns a difference with its interval."""
    if interval is None:
        return UNKNOWN
    return f"{signed(interval.mean)} ({ends(interval, '{:+.4f}')})"


def costs(standings: Sequence[Standing]) -> Table:
    """Returns the table of costs, in the order of the results."""
    rows = []
    for entry in (standing.entry for standing in standings):
        cost = entry.costs
        rows.append(
            (
                code(entry.variant),
                f"{entry.parameters:,}",
                short(entry.training_flops),
                f"{entry.steps:,}",
                f"{entry.optimizer.learning_rate:g}",
                short(cost.tokens_per_second) if cost else UNKNOWN,
                memory(cost.peak_bytes) if cost else UNKNOWN,
                f"{cost.compile_seconds:.1f}" if cost else UNKNOWN,
                short(cost.decode_tokens_per_second) if cost else UNKNOWN,
                memory(cost.tpu_peak_bytes) if cost else UNKNOWN,
            )
        )
    head = (
        "Variant",
        "Parameters",
        "Training FLOPs per token",
        "Steps",
        "Peak learning rate",
        "Training tokens/s",
        "Peak memory of a step",
        "Compilation, s",
        "Decoded tokens/s",
        "Peak memory on a TPU v5e",
    )
    tones = tuple("baseline" if each.tone == "baseline" else "" for each in standings)
    return Table(head, tuple(rows), tones)


def seconds_per_token(entry: Entry) -> float:
    """Returns training seconds per token; NaN where unmeasured."""
    return 1 / entry.costs.tokens_per_second if entry.costs else math.nan


def matched(entries: Sequence[Entry]) -> Table:
    """Returns the table of sizes and costs relative to the baseline: possible confounders."""
    first = entries[0]
    rows = tuple(
        (
            code(entry.variant),
            UNKNOWN if entry.target is None else short(entry.target),
            UNKNOWN if entry.reached is None else short(entry.reached),
            off_target(entry),
            ratio(entry.parameters, first.parameters),
            ratio(entry.training_flops, first.training_flops),
            ratio(seconds_per_token(entry), seconds_per_token(first)),
            ratio(entry.steps, first.steps),
            f"{entry.model.depth}",
            f"{entry.model.width}",
            f"{entry.model.heads}",
            f"{entry.model.actual_mlp_dim}",
        )
        for entry in entries
    )
    head = (
        "Variant",
        "Target",
        "Reached",
        "Off by",
        "Parameters",
        "FLOPs per token",
        "Seconds per token",
        "Tokens",
        "Depth",
        "Width",
        "Heads",
        "MLP width",
    )
    tones = tuple("baseline" if entry is first else "" for entry in entries)
    return Table(head, rows, tones)


def off_target(entry: Entry) -> str:
    """Returns a variant's deviation from its matching target, in percent."""
    if not entry.target or not known(entry.reached) or entry.reached is None:
        return UNKNOWN
    return f"{100 * (entry.reached / entry.target - 1):+z.2f}%".replace("-", "−")


def searched(entries: Sequence[Entry]) -> Table:
    """Returns the table of mean losses by learning rate, with the chosen rate marked."""
    rates = sorted({rate for entry in entries for rate in entry.searched})
    rows = []
    for entry in entries:
        cells = [code(entry.variant)]
        for rate in rates:
            losses = entry.searched.get(rate, ())
            reached = [loss for loss in losses if loss is not None and known(loss)]
            failed = len(losses) - len(reached)
            cell = nats(float(np.mean(reached))) if reached else UNKNOWN
            cell += f" ({failed} of {len(losses)} failed)" if failed else ""
            cells.append(cell + (" ◀ chosen" if rate == entry.optimizer.learning_rate else ""))
        rows.append(tuple(cells))
    return Table(("Variant", *(f"{rate:g}" for rate in rates)), tuple(rows))


def laws(fitted: Mapping[str, Law]) -> Table:
    """Returns the table of fitted laws L = E + A N^-alpha."""
    rows = []
    for variant, law in fitted.items():
        cells = []
        for name, form in COEFFICIENTS.items():
            low, high = law.intervals[name]
            interval = f" ({low:{form}} to {high:{form}})" if known(low) else ""
            cells.append(f"{law.coefficients[name]:{form}}{interval}")
        rows.append((code(variant), *cells, nats(law.largest_residual)))
    return Table(("Variant", "E, nats", "A", "alpha", "Largest residual, nats"), tuple(rows))


def failures(outcomes: Sequence[Outcome]) -> Table:
    """Returns the table of failed runs, with reasons."""
    rows = tuple(
        (
            code(run.variant),
            run.size or UNKNOWN,
            run.purpose,
            f"{run.seed}",
            f"{run.learning_rate:g}",
            f"{run.steps:,}",
            run.error or f"the validation loss is {run.validation_loss}",
            code(run.directory),
        )
        for run in outcomes
    )
    head = ("Variant", "Size", "Purpose", "Seed", "Learning rate", "Steps", "Why", "Directory")
    return Table(head, rows, ("failed",) * len(rows), words=(6, 7))


def fields(entries: Sequence[Entry]) -> Table:
    """Returns the fields in which the configs differ: one row each, one column per variant."""
    configs = [
        {
            f"{part}.{name}": value
            for part, config in (("model", entry.model), ("optimizer", entry.optimizer))
            for name, value in to_dict(config).items()
        }
        for entry in entries
    ]
    rows = tuple(
        (code(name), *(code(json.dumps(config[name])) for config in configs))
        for name in configs[0]
        if any(config[name] != configs[0][name] for config in configs)
    )
    return Table(("Field", *(code(entry.variant) for entry in entries)), rows)
