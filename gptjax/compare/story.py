"""What a report says, and in which order: the answer first, then what it rests on."""

import json
from collections.abc import Sequence
from typing import Any

from gptjax.compare import pictures, tables
from gptjax.compare.analysis import Standing, edge, standings
from gptjax.compare.document import (
    Code,
    Document,
    Heading,
    Items,
    Part,
    Section,
    Table,
    code,
)
from gptjax.compare.question import BUDGETS, MEASURES, parse_quantity
from gptjax.compare.results import Answer, Entry
from gptjax.compare.sizes import over_sizes
from gptjax.compare.tables import seconds_a_token
from gptjax.compare.wording import counted, duration, ends, joined, known, names, nats, ratio, short
from gptjax.config import to_dict
from gptjax.plots import signed

MEASURED = {
    "params": "parameters",
    "flops": "training FLOPs a token",
    "seconds": "seconds of training a token",
}
SPENT = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "seconds of training"}


def story(answer: Answer) -> Document:
    """The whole report."""
    ranked = {size: _best_first(standings(answer, size)) for size in answer.sizes}
    variants = [entry.variant for entry in answer.entries if entry.size == answer.sizes[0]]
    baseline = code(variants[0])
    others = counted(len(variants) - 1, "variant")
    title = f"{others} against {baseline}" if variants[1:] else f"{baseline} alone"
    sections = [_the_answer(answer, ranked)]
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
    return Document(title, _facts(answer), tuple(sections))


def _best_first(of_size: Sequence[Standing]) -> list[Standing]:
    return sorted(of_size, key=lambda each: each.mean if known(each.mean) else float("inf"))


def _facts(answer: Answer) -> tuple[str, ...]:
    facts = [
        f"{counted(answer.comparison.seeds, 'seed')} of each",
        f"{_budget(answer)} a run",
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


def _the_answer(answer: Answer, ranked: dict[str, list[Standing]]) -> Section:
    told: list[Part] = []
    if answer.entries[1:]:
        baseline = code(answer.entries[0].variant)
        told.append(
            f"Which variants predict held-out text better than the baseline {baseline}, and which "
            "worse, after the same training? They are compared by their loss on it, in nats a "
            "token: lower is better, and a difference below zero is a variant that is ahead."
        )
    for size, of_size in ranked.items():
        told.append((f"At {size}: " if size else "") + _verdicts(answer, of_size))
    told.append(_what_was_done(answer))
    return Section("The answer", tuple(told))


def _verdicts(answer: Answer, of_size: Sequence[Standing]) -> str:
    """Which variants are better than the baseline, which worse, and of which nobody can tell."""
    baseline = next(each for each in of_size if each.tone == "baseline")
    name = code(baseline.entry.variant)
    if len(of_size) == 1:
        return (
            f"{name} alone was run; it reached {_reached(baseline)}. There is nothing to compare."
        )
    if not known(baseline.mean):
        return f"No run of the baseline {name} finished, so nothing can be compared with it."
    groups: dict[str, list[Standing]] = {"better": [], "worse": [], "open": [], "failed": []}
    for each in of_size:
        if each is not baseline:
            groups[each.tone].append(each)
    if all(each.difference is None for each in of_size):
        best = names([each.entry.variant for each in of_size if known(each.mean)][:1])
        return (
            f"Nothing is said to be better or worse than {name}: with one seed of each, nobody "
            "knows how far two runs of the same variant lie apart, so there is no interval. The "
            f"lowest loss was that of {best}; that may be chance." + _ended(groups["failed"])
        )
    sentences = [
        f"{_list(groups[kind])} {_are(groups[kind])} {kind} than the baseline {name}."
        for kind in ("better", "worse")
        if groups[kind]
    ]
    for kind in ("better", "worse"):
        if not groups[kind]:
            sentences.append(f"No variant is shown to be {kind} than the baseline {name}.")
    undecided, withheld = [], []
    for each in groups["open"]:
        apart = each.difference and each.difference.excludes_zero
        (withheld if apart else undecided).append(each)
    if undecided:
        sentences.append(
            f"{_list(undecided)} {_are(undecided)} not separated from it: the runs do "
            "not tell whether better, worse or the same."
        )
    sentences += [f"Of {_list([each])}: {each.verdict}." for each in withheld]
    return " ".join(sentences) + _ended(groups["failed"]) + f" {name} reached {_reached(baseline)}."


def _reached(standing: Standing) -> str:
    interval = "" if standing.interval is None else f" (interval {ends(standing.interval)})"
    return f"{nats(standing.mean)} nats a token on held-out text{interval}"


def _are(of_kind: Sequence[Standing]) -> str:
    return "is" if len(of_kind) == 1 else "are"


def _list(of_kind: Sequence[Standing]) -> str:
    """Variants with their differences."""
    return joined(
        [
            f"{code(each.entry.variant)} ({signed(each.difference.mean)}, interval "
            f"{ends(each.difference, '{:+.4f}')})"
            if each.difference
            else f"{code(each.entry.variant)} (too few seeds finished)"
            for each in of_kind
        ]
    )


def _ended(failed: Sequence[Standing]) -> str:
    """Of variants without a single loss."""
    if not failed:
        return ""
    return f" No run of {names([each.entry.variant for each in failed])} finished."


def _what_was_done(answer: Answer) -> str:
    asked = answer.comparison
    sentences = [
        f"Each variant was trained with {counted(asked.seeds, 'seed')} on {_budget(answer)} a run "
        f"({answer.data}), seed by seed on the same batches in the same order, and evaluated on "
        "the same held-out tokens.",
        _matching(answer),
    ]
    rates = joined([f"{rate:g}" for rate in asked.rates])
    if len(asked.rates) > 1:
        sentences.append(
            f"Each took the best of the learning rates {rates}, chosen by "
            f"{counted(asked.search_seeds, 'seed')} that the comparison does not use"
            + (f", at width {asked.mup_width} and carried over by muP." if asked.mup_width else ".")
        )
    else:
        sentences.append(f"All took the learning rate {rates}.")
    if asked.seeds > 1:
        sentences.append(
            f"All statements on differences hold together with {100 * asked.confidence:g}% "
            "confidence."
        )
    failed = len(_failures(answer))
    if failed:
        sentences.append(f"{failed} of {counted(len(answer.outcomes), 'run')} failed.")
    return " ".join(sentences)


def _matching(answer: Answer) -> str:
    """What all variants have in common."""
    asked = answer.comparison
    within = f"within {100 * asked.tolerance:g}%"
    if asked.scale:
        name, sizes = parse_quantity("scale", asked.scale, MEASURES)
        wanted = joined([short(size) for size in sizes])
        return f"Widths were chosen so that all have {wanted} {MEASURED[name]}, {within}."
    if asked.match == "none":
        return "No width was changed: variants differ in what they have and in what they take."
    name, values = parse_quantity("match", asked.match, MEASURES)
    target = (
        f"{short(values[0])} {MEASURED[name]}" if values else f"the baseline's {MEASURED[name]}"
    )
    return f"Widths were chosen so that all have {target}, {within}."


def _of_size(answer: Answer, of_size: list[Standing]) -> list[Section]:
    entries = [entry for entry in answer.entries if entry.size == of_size[0].entry.size]
    baseline = entries[0]
    came_out: list[Part] = [
        f"Best first; the baseline {code(baseline.variant)} is shaded. Losses are nats a token on "
        "held-out text after the last step, lower is better."
        + (" One seed: there is no interval." if answer.comparison.seeds == 1 else ""),
        tables.results(answer, of_size, baseline),
    ]
    if len(entries) > 1:
        came_out.append(pictures.differences(answer, of_size, baseline))
    took: list[Part] = [
        "Measured in turn with all others on the machine named at the end. A step's memory is what "
        "XLA plans for it: arguments, results and all between.",
        tables.costs(of_size),
    ]
    quality = pictures.frontier(entries, of_size)
    along = pictures.curves(entries)
    sections = [
        Section("What came out", tuple(came_out)),
        *([Section("Along training", tuple(along))] if along else []),
        Section("What it took", (*took, *([quality] if quality else []))),
        _rates(answer, entries),
        _matched(answer, entries),
    ]
    return sections


def _rates(answer: Answer, entries: Sequence[Entry]) -> Section:
    picture = pictures.searched(entries)
    if picture is None:
        rates = joined([f"{rate:g}" for rate in answer.comparison.rates])
        told = f"No search: all variants took {rates}. One that wants another rate is at a loss."
        return Section("Learning rates", (told,))
    edges = tuple(sentence for entry in entries if (sentence := edge(entry)))
    parts: list[Part] = [
        "The rate of the lowest mean loss was taken; the seeds that chose it are not compared.",
        *([Items(edges)] if edges else []),
        picture,
        tables.searched(entries),
    ]
    return Section("Learning rates", tuple(parts))


def _matched(answer: Answer, entries: Sequence[Entry]) -> Section:
    """What was made equal, and by what else a difference might be explained."""
    first = entries[0]
    compared = {
        "Parameters": lambda entry: entry.parameters,
        "Training FLOPs a token": lambda entry: entry.training_flops,
        "Seconds of training a token": seconds_a_token,
        "Tokens trained on": lambda entry: entry.steps,
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
        "What was matched, and what was not",
        (
            _matching(answer) + " Whatever else differs may explain a difference as well:",
            Items(tuple(remaining)),
            tables.matched(entries),
        ),
    )


def _failures(answer: Answer) -> list[Any]:
    return [run for run in answer.outcomes if run.error or not known(run.validation_loss)]


def _failed(answer: Answer) -> Section:
    failed = _failures(answer)
    if not failed:
        told = f"None: all {counted(len(answer.outcomes), 'run')} finished."
        return Section("Failed runs", (told,))
    return Section(
        "Failed runs",
        (
            f"{len(failed)} of {counted(len(answer.outcomes), 'run')}. A mean is one of the seeds "
            "that finished, so a variant that failed is judged by its luckier seeds.",
            tables.failures(failed),
        ),
    )


def _how_to_read(answer: Answer) -> Section:
    asked = answer.comparison
    level = f"{100 * asked.confidence:g}%"
    sizes = joined(answer.sizes) if any(answer.sizes) else "one size"
    return Section(
        "How to read this",
        (
            Items(
                (
                    f"An interval of a mean (Student's t) says where the mean of endlessly many "
                    f"seeds would lie: of such intervals, {level} hold it. Those of two variants "
                    "may overlap and their difference still be sure, as the seeds are paired.",
                    "A difference is taken seed by seed, each variant's loss minus the baseline's "
                    "of the same seed: what the order of the batches does to both alike drops out.",
                    "With many variants one will look better by chance. Holm's correction widens "
                    f"the intervals so that all statements together are right with {level} "
                    "confidence; better or worse is said only where an interval excludes zero.",
                    "Not separated is no proof of being equal: the difference may be anywhere in "
                    "its interval, and more seeds would narrow that.",
                    f"What this does not show: other data than {answer.data}, a longer or shorter "
                    f"training than {_budget(answer)}, other sizes than {sizes}, other batch sizes "
                    "or optimizers. The order of variants may turn with any of them.",
                    "The learning rate is the only setting that each variant chose for itself."
                    if len(asked.rates) > 1
                    else "No setting was chosen for each variant by itself.",
                )
            ),
        ),
    )


def _configs(answer: Answer) -> Section:
    parts: list[Part] = ["The fields in which the variants differ, and each one's config in full."]
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
    parts.append(Code(_json(to_dict(answer.comparison)), "The question in full"))
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
            "Every run is a line of `results.jsonl`, with its whole curve, and a row of "
            "`results.csv`.",
        ),
    )
