"""Verdicts: each variant better, worse or not separated, and how many seeds would separate it.

A verdict is the result of Holm's test on paired differences (statistics.py) and nothing else. A
failed run has no loss, and the remaining seeds are those on which a variant did well: dropping the
others is survivorship bias. So no verdict favours a side whose runs failed; one against it stands.
"""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from gptjax.compare.analysis.statistics import (
    Interval,
    at_next_look,
    holm_levels,
    seeds_needed,
    t_interval,
    trimmed_interval,
)
from gptjax.compare.results import Answer, Entry, Outcome

Tone = Literal["baseline", "better", "worse", "open", "failed"]
"""A verdict in a word: open is not separated, or withheld because runs failed; failed is a variant
without a finished run."""
MOST_SEEDS = 1000
"""Larger numbers of seeds are not given as a number."""


class Standing(NamedTuple):
    """A variant among those of its size."""

    entry: Entry
    losses: np.ndarray
    """[runs], losses of the final runs that finished, by seed; nats per token."""
    mean: float
    """Mean of the losses; nan where none finished."""
    deviation: float | None
    """Sample standard deviation; None for a single run."""
    interval: Interval | None
    """Student's interval of the mean, at the comparison's confidence, without Holm's correction."""
    difference: Interval | None
    """Difference from the baseline over the seeds that finished in both, with Holm's level at this
    look; None for the baseline and for fewer than two such seeds."""
    trimmed: Interval | None
    """The same for the trimmed mean, which decides no verdict."""
    tone: Tone
    verdict: str
    """The verdict as a phrase."""


def standings(answer: Answer, size: str) -> list[Standing]:
    """Returns the standing of each variant of a size, in the order given.

    The family-wise error rate of all verdicts of a size, over all looks, is at most
    1 - confidence; each size is a family of its own.
    """
    entries = [entry for entry in answer.entries if entry.size == size]
    confidence = answer.comparison.confidence
    baseline = entries[0]
    gaps = [(entry, seed_differences(entry, baseline)) for entry in entries[1:]]
    asked = [(values, len(entry.looks)) for entry, values in gaps if len(values) > 1]
    levels = iter(
        holm_levels([values for values, _ in asked], confidence, [look for _, look in asked])
    )
    found = [_standing(baseline, np.empty(0), confidence, confidence, "baseline", "baseline")]
    for entry, values in gaps:
        level = next(levels) if len(values) > 1 else confidence
        tone, verdict = _verdict(entry, baseline, values, level)
        found.append(_standing(entry, values, level, confidence, tone, verdict))
    return found


def edge(entry: Entry) -> str | None:
    """Returns a sentence if the best learning rate is at the edge of its grid, else None.

    A better rate may lie beyond the grid.
    """
    rates = sorted(entry.searched)
    rate = entry.optimizer.learning_rate
    if len(rates) < 2 or rates[0] < rate < rates[-1]:
        return None
    end, beyond = ("smallest", "smaller") if rate <= rates[0] else ("largest", "larger")
    return (
        f"{entry.variant} did best at {rate:g}, the {end} learning rate tried: "
        f"a {beyond} one may be better still."
    )


def finished_runs(runs: Iterable[Outcome]) -> dict[int, Outcome]:
    """Returns the runs by seed, without those that failed."""
    return {run.seed: run for run in runs if _reached(run) is not None}


def finished(entry: Entry) -> dict[int, float]:
    """Returns the losses of final runs by seed, without those that failed."""
    reached = {run.seed: _reached(run) for run in entry.finals}
    return {seed: loss for seed, loss in reached.items() if loss is not None}


def _reached(run: Outcome) -> float | None:
    """Returns the loss of a run that finished."""
    loss = run.validation_loss
    return loss if loss is not None and math.isfinite(loss) else None


def seed_differences(entry: Entry, baseline: Entry) -> np.ndarray:
    """Returns the paired differences [seeds that finished in both], above 0 where it is worse."""
    losses, reference = finished(entry), finished(baseline)
    return np.array([losses[seed] - reference[seed] for seed in losses if seed in reference], float)


def _failed(entry: Entry) -> int:
    return len(entry.finals) - len(finished(entry))


def _standing(
    entry: Entry, gaps: np.ndarray, level: float, confidence: float, tone: Tone, verdict: str
) -> Standing:
    losses = np.array(list(finished(entry).values()), float)
    several = len(losses) > 1
    return Standing(
        entry=entry,
        losses=losses,
        mean=float(np.mean(losses)) if len(losses) else float("nan"),
        deviation=float(np.std(losses, ddof=1)) if several else None,
        interval=t_interval(losses, confidence) if several else None,
        difference=t_interval(gaps, level) if len(gaps) > 1 else None,
        trimmed=trimmed_interval(gaps, level) if len(gaps) > 1 else None,
        tone=tone,
        verdict=_with_failures(verdict, entry),
    )


def _with_failures(verdict: str, entry: Entry) -> str:
    failed, runs = _failed(entry), len(entry.finals)
    return f"{failed} of {runs} runs failed; {verdict}" if failed else verdict


def _verdict(entry: Entry, baseline: Entry, gaps: np.ndarray, level: float) -> tuple[Tone, str]:
    """Returns the verdict as a word and as a phrase, from the paired differences."""
    name = baseline.variant
    if not finished(entry):
        return "failed", f"nothing to compare with {name}"
    if len(gaps) < 2:
        if not _failed(entry) and not _failed(baseline):
            return "open", "one seed: no interval"
        return "open", f"{('no seed', 'one seed')[len(gaps)]} in common with {name}: no interval"
    interval = t_interval(gaps, level)
    if not interval.excludes_zero:
        # Adding seeds takes another look, which may spend less of the error.
        then = at_next_look(level, len(entry.looks))
        return "open", f"not separated from {name}; {_what_would(gaps, then)}"
    tone: Tone = "worse" if interval.low > 0 else "better"
    flattered = baseline if tone == "worse" else entry
    if not _failed(flattered):
        return tone, f"{tone} than {name}"
    whose = "its" if flattered is entry else f"{name}'s"
    return "open", f"not called {tone} than {name}, since {whose} failed runs may be the bad ones"


def _what_would(gaps: np.ndarray, level: float) -> str:
    more = seeds_needed(gaps, level, most=MOST_SEEDS)
    if more is None:
        return f"not even {MOST_SEEDS} more seeds would separate a difference of this size"
    seeds = "seed" if more == 1 else "seeds"
    return f"about {more} more {seeds} would separate a difference of this size"
