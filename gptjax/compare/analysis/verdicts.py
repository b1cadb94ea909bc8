"""What may be said of each variant: better, worse, or not separated, and what would separate it.

A verdict is a statement of Holm's test on paired differences (statistics.py) and nothing else. A
run that failed has no loss, and the seeds that are left are those on which a variant did well:
dropping the others flatters it. So nothing is said in favour of a side whose runs failed; what is
said against it, although flattered, may stand.
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
"""A verdict in a word: open is not told apart, or withheld because of failed runs; failed is a
variant of which no run finished."""
MOST_SEEDS = 1000
"""More than these is told as such, not as a number."""


class Standing(NamedTuple):
    """A variant among those of its size."""

    entry: Entry
    losses: np.ndarray
    """[runs], of the final runs that finished, by seed; nats per token."""
    mean: float
    """Of them; nan where none finished."""
    deviation: float | None
    """Of the sample; None of a single run."""
    interval: Interval | None
    """Student's, of the mean, at the comparison's confidence for itself alone."""
    difference: Interval | None
    """From the baseline, over the seeds that finished in both, with Holm's level at this look; None
    for the baseline and where there are fewer than two such seeds."""
    trimmed: Interval | None
    """The same of the trimmed mean, of which no verdict is taken."""
    tone: Tone
    verdict: str
    """What the differences let one say, in words."""


def standings(answer: Answer, size: str) -> list[Standing]:
    """Where each variant of a size stands, in the order asked for.

    All verdicts of a size together, those of earlier looks too, are wrong with at most the chance
    1 - confidence; those of several sizes are so each for itself.
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
    """A sentence where the best learning rate ended its grid; None where it did not.

    Beyond the grid there may be a better one, by which the variant was not judged.
    """
    rates = sorted(entry.searched)
    rate = entry.optimizer.learning_rate
    if len(rates) < 2 or rates[0] < rate < rates[-1]:
        return None
    end, beyond = ("smallest", "smaller") if rate <= rates[0] else ("largest", "larger")
    return (
        f"{entry.variant} did best at {rate:g}, the {end} learning rate that was tried: "
        f"a {beyond} one may be better still."
    )


def finished_runs(runs: Iterable[Outcome]) -> dict[int, Outcome]:
    """The runs by seed, without those that failed."""
    return {run.seed: run for run in runs if _reached(run) is not None}


def finished(entry: Entry) -> dict[int, float]:
    """The losses of final runs by seed, without those that failed."""
    reached = {run.seed: _reached(run) for run in entry.finals}
    return {seed: loss for seed, loss in reached.items() if loss is not None}


def _reached(run: Outcome) -> float | None:
    """The loss of a run that finished."""
    loss = run.validation_loss
    return loss if loss is not None and math.isfinite(loss) else None


def seed_differences(entry: Entry, baseline: Entry) -> np.ndarray:
    """[seeds], of those that finished in both: above 0 where the variant is worse."""
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
    """In a word and in more, of the differences seed by seed."""
    name = baseline.variant
    if not finished(entry):
        return "failed", f"nothing to compare with {name}"
    if len(gaps) < 2:
        if not _failed(entry) and not _failed(baseline):
            return "open", "one seed: no interval"
        return "open", f"{('no seed', 'one seed')[len(gaps)]} in common with {name}: no interval"
    interval = t_interval(gaps, level)
    if not interval.excludes_zero:
        # Whoever adds seeds looks once more, and may spend less of the error then.
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
