"""The figures of a report, with their captions."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from gptjax import plots
from gptjax.compare.analysis.scaling import Law
from gptjax.compare.analysis.verdicts import Standing, finished, finished_runs, seed_differences
from gptjax.compare.report.dark import follow_scheme
from gptjax.compare.report.document import Picture
from gptjax.compare.report.tables import seconds_per_token
from gptjax.compare.results import Answer, Entry

LOSS = "validation loss, nats per token"
NONE = np.empty(0)
BEYOND = 1.5
"""How far a law is extrapolated in the figure, as a ratio of sizes."""


def _picture(
    name: str, size: str, title: str, draw: Callable[..., Figure], caption: str
) -> Picture:
    """Returns the figure that `draw` draws, at a page's width and at a phone's."""
    name = re.sub("[^0-9a-zA-Z]+", "-", f"{name} {size}").strip("-")
    wide, narrow = (
        follow_scheme(plots.to_svg(draw(width=width), f"{name}{ending}"))
        for width, ending in ((plots.PAGE, ""), (plots.NARROW, "-narrow"))
    )
    return Picture(name, title, wide, narrow, caption)


def differences(answer: Answer, standings: Sequence[Standing], baseline: Entry) -> Picture:
    """Returns the differences from the baseline with their intervals."""
    others = [standing for standing in standings if standing.entry is not baseline]
    runs = [seed_differences(standing.entry, baseline) for standing in others]
    intervals = [
        standing.difference or (values.mean() if len(values) else np.nan, np.nan, np.nan)
        for standing, values in zip(others, runs, strict=True)
    ]
    draw = partial(
        plots.differences,
        [standing.entry.variant for standing in others],
        np.array(intervals, float),
        runs=runs,
        separated=[standing.tone in ("better", "worse") for standing in others],
        label="validation loss minus the baseline's, nats per token",
        sides=("better", "worse"),
    )
    paired = any(standing.difference for standing in others)
    caption = (
        "A triangle is a mean over seeds that is called better or worse; a ring is one that is "
        "not: its interval contains zero, or runs failed that may have been worse. Intervals are "
        f"simultaneous (Holm), at {100 * answer.comparison.confidence:g}% confidence. "
        "Dots are single seeds, each minus the same seed of the baseline."
        if paired
        else "Too few seeds for an interval: differences may be chance."
    )
    return _picture(
        "differences",
        standings[0].entry.size,
        f"Each variant against {baseline.variant}",
        draw,
        caption,
    )


def _curve(entry: Entry) -> plots.Points:
    """Returns tokens, and losses of the seeds that finished."""
    runs = [run for run in finished_runs(entry.finals).values() if run.steps and run.curve_steps]
    runs = [run for run in runs if run.curve_steps == runs[0].curve_steps]
    if not runs:
        return plots.Points(NONE, np.empty((0, 1)))
    tokens = np.array(runs[0].curve_steps) * runs[0].tokens / runs[0].steps
    return plots.Points(tokens, np.array([run.curve_losses for run in runs], float).T)


def curves(entries: Sequence[Entry]) -> list[Picture]:
    """Returns the loss curves, and their differences from the baseline's."""
    size = entries[0].size
    drawn = {entry.variant: _curve(entry) for entry in entries}
    if not any(len(points.x) for points in drawn.values()):
        return []
    draw = partial(plots.curves_by_variant, drawn, xlabel="training tokens", ylabel=LOSS)
    pictures = [
        _picture(
            "curves",
            size,
            "Validation loss over training",
            draw,
            "Mean over seeds, and their range as a band. The first fifth of training, steep in all "
            "variants, may be cut off at the top.",
        )
    ]
    panels = {
        entry.variant: points
        for entry in entries[1:]
        if len((points := _apart(entry, entries[0])).x)
    }
    if panels:
        draw_panels = partial(
            plots.difference_panels,
            panels,
            xlabel="training tokens",
            ylabel="loss minus the baseline's, nats per token",
        )
        pictures.append(
            _picture(
                "along",
                size,
                f"Difference from {entries[0].variant} over training",
                draw_panels,
                "Below the line a variant is ahead. Mean over seeds and their range, each minus "
                "the same seed of the baseline; the band is no confidence interval. A difference "
                "that still grows or shrinks at the end depends on the budget.",
            )
        )
    return pictures


def _apart(entry: Entry, baseline: Entry) -> plots.Points:
    """Returns differences of the curves over seeds that finished in both, at the same steps."""
    ours, theirs = finished_runs(entry.finals), finished_runs(baseline.finals)
    pairs = [
        (ours[seed], theirs[seed])
        for seed in ours
        if seed in theirs
        and ours[seed].curve_steps == theirs[seed].curve_steps
        and ours[seed].tokens == theirs[seed].tokens
        and ours[seed].curve_steps
    ]
    if not pairs:
        return plots.Points(NONE, np.empty((0, 1)))
    run = pairs[0][0]
    values = [np.subtract(one.curve_losses, other.curve_losses) for one, other in pairs]
    return plots.Points(np.array(run.curve_steps) * run.tokens / run.steps, np.array(values).T)


def frontier(entries: Sequence[Entry], standings: Sequence[Standing]) -> Picture | None:
    """Returns loss against cost per token."""
    by_variant = {standing.entry.variant: standing for standing in standings}
    of_each = [by_variant[entry.variant] for entry in entries]
    intervals = np.array(
        [standing.interval or (standing.mean, np.nan, np.nan) for standing in of_each], float
    )
    costs = {
        "training MFLOPs per token": np.array([entry.training_flops / 1e6 for entry in entries]),
        "measured training µs per token": 1e6 * np.array(list(map(seconds_per_token, entries))),
    }
    costs = {
        name: cost for name, cost in costs.items() if np.isfinite(cost + intervals[:, 0]).any()
    }
    if not costs:
        return None
    draw = partial(
        plots.frontier, [entry.variant for entry in entries], costs, intervals, ylabel=LOSS
    )
    return _picture(
        "frontier",
        entries[0].size,
        "Quality and cost",
        draw,
        "Lower is better, left is cheaper. Rings mark the Pareto front, variants that no other "
        "beats in both, joined by a line; bars are the intervals of the means. Where bars overlap, "
        "whether a variant is on the front may be chance.",
    )


def scaling(answer: Answer, fitted: Mapping[str, Law]) -> Picture:
    """Returns loss against parameters, with the fitted laws."""
    measured, lines = {}, {}
    for name in dict.fromkeys(entry.variant for entry in answer.entries):
        entries = [entry for entry in answer.entries if entry.variant == name]
        sizes = np.array([entry.parameters for entry in entries], float)
        losses = np.full((len(entries), answer.comparison.seeds), np.nan)
        for row, entry in zip(losses, entries, strict=True):
            reached = list(finished(entry).values())
            row[: len(reached)] = reached
        measured[name] = plots.Points(sizes, losses)
        if name in fitted:
            x = np.geomspace(sizes.min() / BEYOND, sizes.max() * BEYOND, 100)
            law = fitted[name]
            lines[name] = plots.FittedLine(x, law.predict(x), *law.predict_interval(x))
    draw = partial(plots.scaling, measured, lines, xlabel="parameters", ylabel=LOSS)
    caption = "Each mark is a run, and both axes are logarithmic."
    if lines:
        caption += (
            " Lines are fitted laws; bands are pointwise bootstrap intervals over seeds, at "
            f"{100 * answer.comparison.confidence:g}% confidence; "
            "beyond the marks they are extrapolated."
        )
    return _picture("scaling", "", "Loss by size", draw, caption)


def searched(entries: Sequence[Entry]) -> Picture | None:
    """Returns loss by learning rate."""
    entries = [entry for entry in entries if entry.searched]
    if not entries:
        return None
    drawn = {}
    for entry in entries:
        rates = sorted(entry.searched)
        seeds = max(map(len, entry.searched.values()))
        losses = np.full((len(rates), max(seeds, 1)), np.nan)
        for row, rate in zip(losses, rates, strict=True):
            row[: len(entry.searched[rate])] = [
                np.nan if loss is None else loss for loss in entry.searched[rate]
            ]
        drawn[entry.variant] = plots.Points(np.array(rates), losses)
    draw = partial(
        plots.loss_by_rate,
        drawn,
        [entry.optimizer.learning_rate for entry in entries],
        ylabel=LOSS,
    )
    return _picture(
        "rates",
        entries[0].size,
        "Learning-rate search",
        draw,
        "Dots are runs of the search seeds, lines their mean, and a ring is the chosen rate. "
        "Failed runs and losses far above are not drawn; the table has them.",
    )
