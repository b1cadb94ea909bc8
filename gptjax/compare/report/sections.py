"""The sections of a report, in order: the verdict first, then the evidence."""

import json
from collections.abc import Sequence
from typing import Any

from gptjax.compare.analysis.verdicts import Standing, edge, standings
from gptjax.compare.question import BUDGETS, MEASURES, parse_quantity
from gptjax.compare.report import figures, tables, verdict
from gptjax.compare.report.document import (
    Code,
    Document,
    Heading,
    Items,
    Part,
    Section,
    Table,
    code,
)
from gptjax.compare.report.phrases import counted, duration, enumerated, known, names, ratio, short
from gptjax.compare.report.sizes import over_sizes
from gptjax.compare.report.tables import seconds_per_token
from gptjax.compare.results import Answer, Entry
from gptjax.config import to_dict

MEASURED = {
    "params": "parameters",
    "flops": "training FLOPs per token",
    "seconds": "training seconds per token",
}
SPENT = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "seconds of training"}


def report_document(answer: Answer) -> Document:
    """Returns the whole report."""
    ranked = {size: _best_first(standings(answer, size)) for size in answer.sizes}
    said = verdict.in_sentences(answer, ranked)
    sections = [Section("Verdict", (*said, _what_was_done(answer)))]
    sections += [over_sizes(answer)] if len(answer.sizes) > 1 else []
    for size, of_size in ranked.items():
        parts = _of_size(answer, of_size)
        if size:
            inner = [part for each in parts for part in (Heading(each.title), *each.parts)]
            parts = [Section(f"At {size}", tuple(inner))]
        sections += parts
    sections += [
        _failed(answer),
        *([Section("Notes", (Items(answer.notes),))] if answer.notes else []),
        _how_to_read(answer),
        _configs(answer),
        _how_it_was_run(answer),
    ]
    return Document(
        verdict.title(ranked), verdict.at_a_glance(ranked), _facts(answer), tuple(sections)
    )


def _best_first(of_size: Sequence[Standing]) -> list[Standing]:
    return sorted(of_size, key=lambda each: each.mean if known(each.mean) else float("inf"))


def _facts(answer: Answer) -> tuple[str, ...]:
    facts = [
        f"{counted(answer.comparison.seeds, 'seed')} per variant",
        f"{_budget(answer)} per run",
        counted(len(answer.outcomes), "run"),
        duration(answer.seconds),
        str(answer.environment.get("device", "")),
        f"commit {answer.commit[:12]}" if answer.commit else "",
    ]
    if any(answer.sizes):
        facts.insert(2, counted(len(answer.sizes), "size"))
    return tuple(fact for fact in facts if fact)


def _budget(answer: Answer) -> str:
    name, values = parse_quantity("budget", answer.comparison.budget, BUDGETS)
    return f"{short(values[0])} {SPENT[name]}" if values else name


def _what_was_done(answer: Answer) -> str:
    asked = answer.comparison
    sentences = [
        f"Each variant was trained with {counted(asked.seeds, 'seed')} on {_budget(answer)} per "
        f"run ({answer.data}), seed by seed on the same batches in the same order, and evaluated "
        "on the same held-out tokens.",
        _matching(answer),
    ]
    rates = enumerated([f"{rate:g}" for rate in asked.rates])
    if len(asked.rates) > 1:
        sentences.append(
            f"Each took the best of the learning rates {rates}, chosen with "
            f"{counted(asked.search_seeds, 'seed')} not used in the comparison"
            + (f", at width {asked.mup_width}, transferred by muP." if asked.mup_width else ".")
        )
    else:
        sentences.append(f"All have the learning rate {rates}.")
    if asked.seeds > 1:
        sentences.append(
            f"All verdicts hold simultaneously with {100 * asked.confidence:g}% confidence."
        )
    sentences += _looks(answer)
    failed = len(_failures(answer))
    if failed:
        sentences.append(f"{failed} of {counted(len(answer.outcomes), 'run')} failed.")
    return " ".join(sentences)


def _looks(answer: Answer) -> list[str]:
    """Returns sentences on seeds that were added after an earlier report."""
    looks: dict[tuple[str, ...], list[str]] = {}
    for entry in answer.entries:
        taken = tuple(f"{counted(len(each.seeds), 'seed')} on {each.day}" for each in entry.looks)
        looks.setdefault(taken, []).append(entry.variant)
    return [
        f"Seeds were added after an interim look: this is look {len(taken)} at {names(variants)} "
        f"({', then '.join(taken)}), which may spend 1/{len(taken) * (len(taken) + 1)} of the "
        "total error, so its intervals are wider than with a number of seeds fixed in advance."
        for taken, variants in looks.items()
        if len(taken) > 1
    ]


def _matching(answer: Answer) -> str:
    """Returns a sentence on what the variants are matched by."""
    asked = answer.comparison
    within = f"within {100 * asked.tolerance:g}%"
    if asked.scale:
        name, sizes = parse_quantity("scale", asked.scale, MEASURES)
        wanted = enumerated([short(size) for size in sizes])
        return f"Widths were chosen so that all have {wanted} {MEASURED[name]}, {within}."
    if asked.match == "none":
        return "No width was changed: variants differ in size and in cost."
    name, values = parse_quantity("match", asked.match, MEASURES)
    target = (
        f"{short(values[0])} {MEASURED[name]}" if values else f"the baseline's {MEASURED[name]}"
    )
    return f"Widths were chosen so that all have {target}, {within}."


def _of_size(answer: Answer, of_size: list[Standing]) -> list[Section]:
    entries = [entry for entry in answer.entries if entry.size == of_size[0].entry.size]
    baseline = entries[0]
    came_out: list[Part] = [
        f"Best first; the baseline {code(baseline.variant)} is shaded. Losses are nats per token "
        "on held-out text after the last step, lower is better."
        + (" One seed: there is no interval." if answer.comparison.seeds == 1 else ""),
        tables.results(answer, of_size, baseline),
    ]
    if len(entries) > 1:
        came_out.append(figures.differences(answer, of_size, baseline))
    took: list[Part] = [
        "All variants timed in turn, on the machine named at the end. A step's memory is "
        "XLA's plan: arguments, results and temporaries.",
        tables.costs(of_size),
    ]
    quality = figures.frontier(entries, of_size)
    along = figures.curves(entries)
    sections = [
        Section("Results", tuple(came_out)),
        *([Section("Over training", tuple(along))] if along else []),
        Section("Costs", (*took, *([quality] if quality else []))),
        _rates(answer, entries),
        _matched(answer, entries),
    ]
    return sections


def _rates(answer: Answer, entries: Sequence[Entry]) -> Section:
    picture = figures.searched(entries)
    if picture is None:
        rates = enumerated([f"{rate:g}" for rate in answer.comparison.rates])
        sentence = f"No search: all variants have {rates}, which may not suit each of them."
        return Section("Learning rates", (sentence,))
    edges = tuple(sentence for entry in entries if (sentence := edge(entry)))
    parts: list[Part] = [
        "The rate with the lowest mean loss was chosen; the search seeds are not compared.",
        *([Items(edges)] if edges else []),
        picture,
        tables.searched(entries),
    ]
    return Section("Learning rates", tuple(parts))


def _matched(answer: Answer, entries: Sequence[Entry]) -> Section:
    """Returns what was matched, and what else might explain a difference."""
    first = entries[0]
    compared = {
        "Parameters": lambda entry: entry.parameters,
        "Training FLOPs per token": lambda entry: entry.training_flops,
        "Training seconds per token": seconds_per_token,
        "Training tokens": lambda entry: entry.steps,
        "Depth": lambda entry: entry.model.depth,
    }
    remaining = []
    for name, measure in compared.items():
        ratios = {
            entry.variant: measure(entry) / measure(first) for entry in entries if measure(first)
        }
        ratios = {variant: value for variant, value in ratios.items() if known(value)}
        if len(ratios) < 2:
            continue
        least, most = (end(ratios, key=lambda variant: ratios[variant]) for end in (min, max))
        if max(ratios[most], 1 / ratios[least]) <= 1 + answer.comparison.tolerance:
            remaining.append(f"{name}: the same within {100 * answer.comparison.tolerance:g}%.")
        else:
            remaining.append(
                f"{name}: from {ratio(ratios[least], 1)} ({code(least)}) to "
                f"{ratio(ratios[most], 1)} ({code(most)}) of the baseline's."
            )
    return Section(
        "Matching",
        (
            _matching(answer) + " Anything else that differs is a confounder:",
            Items(tuple(remaining)),
            tables.matched(entries),
        ),
    )


def _failures(answer: Answer) -> list[Any]:
    return [run for run in answer.outcomes if run.error or not known(run.validation_loss)]


def _failed(answer: Answer) -> Section:
    failed = _failures(answer)
    if not failed:
        sentence = f"None: all {counted(len(answer.outcomes), 'run')} finished."
        return Section("Failed runs", (sentence,))
    return Section(
        "Failed runs",
        (
            f"{len(failed)} of {counted(len(answer.outcomes), 'run')}. Means are over the seeds "
            "that finished, which favours variants with failed runs.",
            tables.failures(failed),
        ),
    )


def _how_to_read(answer: Answer) -> Section:
    asked = answer.comparison
    level = f"{100 * asked.confidence:g}%"
    sizes = enumerated(answer.sizes) if any(answer.sizes) else "one size"
    return Section(
        "How to read this",
        (
            Items(
                (
                    f"The confidence interval of a mean (Student's t) contains the mean over all "
                    f"possible seeds in {level} of studies. Intervals of two variants may overlap "
                    "although their difference is significant, as the seeds are paired.",
                    "Differences are paired: each variant's loss minus the baseline's with the "
                    "same seed, so that effects of the batch order on both cancel.",
                    "With many variants one will look better by chance. Holm's correction widens "
                    f"the intervals so that all verdicts hold simultaneously with {level} "
                    "confidence; better or worse is said only if an interval excludes zero.",
                    "Adding seeds takes another look. The first look at a difference may spend "
                    f"half of the {100 * (1 - asked.confidence):.3g}% of error, the second a "
                    f"sixth, the third a twelfth, and so on, so that all looks together keep "
                    f"{level}. How many seeds would separate a difference is estimated for the "
                    "next look.",
                    "The trimmed mean drops a fifth of the differences at either end: it shows the "
                    "typical seed if one is an outlier, and decides no verdict. If its interval is "
                    "far narrower than the other, look at the dots: a seed may be an outlier, or "
                    "the others similar by chance.",
                    "Not separated does not mean equal: the difference may be anywhere in its "
                    "interval, and more seeds would narrow that.",
                    f"Not tested: other data than {answer.data}, a longer or shorter "
                    f"training than {_budget(answer)}, other sizes than {sizes}, other batch sizes "
                    "or optimizers. The ranking may change with any of them.",
                    "The learning rate is the only hyperparameter tuned for each variant."
                    if len(asked.rates) > 1
                    else "No hyperparameter was tuned for each variant.",
                )
            ),
        ),
    )


def _configs(answer: Answer) -> Section:
    parts: list[Part] = ["The fields in which the variants differ, and each config in full."]
    for size in answer.sizes:
        entries = [entry for entry in answer.entries if entry.size == size]
        if size:
            parts.append(Heading(f"At {size}"))
        parts.append(tables.fields(entries))
        parts += [
            Code(
                _json({"model": to_dict(entry.model), "optimizer": to_dict(entry.optimizer)}),
                code(entry.variant),
            )
            for entry in entries
        ]
    parts.append(Code(_json(to_dict(answer.comparison)), "The comparison in full"))
    return Section("Configs", tuple(parts))


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def _how_it_was_run(answer: Answer) -> Section:
    environment = dict(answer.environment)
    versions = environment.pop("versions", {})
    rows = [
        ("Commit", answer.commit or "outside a repository"),
        ("Data", answer.data),
        ("Wall time of all runs", f"{duration(answer.seconds)} ({answer.seconds:,.1f} s)"),
        *((name.capitalize(), str(value)) for name, value in environment.items()),
        *((name, str(value)) for name, value in versions.items()),
    ]
    return Section(
        "How it was run",
        (
            Code(answer.command),
            Table(("What", "Value"), tuple(rows), words=(1,)),
            "Every run is a line of `results.jsonl`, with its curve, and a row of `results.csv`.",
        ),
    )
