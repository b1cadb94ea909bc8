"""The verdict of a comparison: title, summary, and sentences."""

from collections.abc import Mapping, Sequence

from gptjax.compare.analysis.verdicts import Standing
from gptjax.compare.report.document import Verdict, code
from gptjax.compare.report.phrases import counted, ends, enumerated, known, names, nats
from gptjax.compare.results import Answer
from gptjax.plots import signed

Ranked = Mapping[str, Sequence[Standing]]
"""Standings by size, best first."""
GROUPS = {
    "better": "▼ better",
    "worse": "▲ worse",
    "open": "○ not separated",
    "withheld": "○ withheld",
    "failed": "✕ failed",
}
"""Verdicts and their labels in the summary; the marks are those of the figures."""


def title(ranked: Ranked) -> str:
    """Returns the verdict in one line; with several sizes, what is compared."""
    first = next(iter(ranked.values()))
    name = code(_baseline(first).entry.variant)
    groups = _groups(first)
    others = len(first) - 1
    if not others:
        return f"{name} alone"
    if len(ranked) > 1:
        return f"{counted(others, 'variant')} against {name} at {len(ranked)} sizes"
    if not known(_baseline(first).mean):
        return f"No run of the baseline {name} finished"
    if _one_seed(first):
        return f"No verdict on {counted(others, 'variant')} against {name}: too few seeds"
    said = {
        "better": f"better than {name}",
        "worse": f"worse than {name}",
        "open": f"not separated from {name}",
        "withheld": f"not judged against {name}, as runs failed",
        "failed": "without a run that finished",
    }
    counts = {kind: each for kind, each in groups.items() if each}
    if others == 1:
        ((kind, (only,)),) = counts.items()
        return f"{code(only.entry.variant)} is {said[kind]}"
    short = {"open": "not separated", "withheld": "not judged", "failed": "failed"}
    pieces = [
        f"{len(each)} {_are(each)} {said[kind]}"
        if not place
        else f"{len(each)} {short.get(kind, kind)}"
        for place, (kind, each) in enumerate(counts.items())
    ]
    return f"Of {counted(others, 'variant')} {enumerated(pieces)}"


def at_a_glance(ranked: Ranked) -> tuple[tuple[str, tuple[Verdict, ...]], ...]:
    """Returns, by size, the variants that are better, worse, not separated, and failed."""
    return tuple(
        (
            size,
            tuple(
                Verdict(
                    "open" if kind == "withheld" else kind,
                    "○ no interval" if kind == "open" and _one_seed(of_size) else GROUPS[kind],
                    tuple(map(_short, members)),
                )
                for kind, members in _groups(of_size).items()
                if members
            ),
        )
        for size, of_size in ranked.items()
    )


def _short(standing: Standing) -> str:
    """Returns a variant with its difference."""
    name = code(standing.entry.variant)
    return f"{name} {signed(standing.difference.mean)}" if standing.difference else name


def in_sentences(answer: Answer, ranked: Ranked) -> list[str]:
    """Returns the question, and one paragraph of verdicts per size."""
    paragraphs = []
    if answer.entries[1:]:
        baseline = code(answer.entries[0].variant)
        paragraphs.append(
            f"Which variants predict held-out text better than the baseline {baseline}, and which "
            "worse, after the same training? They are compared by validation loss, in nats per "
            "token: lower is better, and a difference below zero means better than the baseline."
        )
    for size, of_size in ranked.items():
        paragraphs.append((f"At {size}: " if size else "") + _verdicts(of_size))
    return paragraphs


def _baseline(of_size: Sequence[Standing]) -> Standing:
    return next(each for each in of_size if each.tone == "baseline")


def _one_seed(of_size: Sequence[Standing]) -> bool:
    """Whether there are too few seeds for any interval."""
    return all(each.difference is None for each in of_size)


def _groups(of_size: Sequence[Standing]) -> dict[str, list[Standing]]:
    """Returns the variants without the baseline, by verdict."""
    groups: dict[str, list[Standing]] = {kind: [] for kind in GROUPS}
    for each in of_size:
        apart = each.difference is not None and each.difference.excludes_zero
        if each.tone != "baseline":
            groups["withheld" if each.tone == "open" and apart else each.tone].append(each)
    return groups


def _verdicts(of_size: Sequence[Standing]) -> str:
    """Returns sentences on which variants are better, worse, or not separated."""
    baseline = _baseline(of_size)
    name = code(baseline.entry.variant)
    if len(of_size) == 1:
        return f"Only {name} was run; it reached {_reached(baseline)}. There is nothing to compare."
    if not known(baseline.mean):
        return f"No run of the baseline {name} finished, so nothing can be compared with it."
    groups = _groups(of_size)
    if _one_seed(of_size):
        best = names([each.entry.variant for each in of_size if known(each.mean)][:1])
        return (
            f"No verdict against {name}: with one seed per variant, the variance between seeds is "
            f"unknown, so there is no interval. The lowest loss was that of {best}; that may be "
            "chance." + _ended(groups["failed"])
        )
    sentences = [
        f"{_list(groups[kind])} {_are(groups[kind])} {kind} than the baseline {name}."
        for kind in ("better", "worse")
        if groups[kind]
    ]
    for kind in ("better", "worse"):
        if not groups[kind]:
            sentences.append(f"No variant is shown to be {kind} than the baseline {name}.")
    if groups["open"]:
        sentences.append(
            f"{_list(groups['open'])} {_are(groups['open'])} not separated from it: the runs do "
            "not show whether better, worse or the same."
        )
    sentences += [f"Of {_list([each])}: {each.verdict}." for each in groups["withheld"]]
    return " ".join(sentences) + _ended(groups["failed"]) + f" {name} reached {_reached(baseline)}."


def _reached(standing: Standing) -> str:
    interval = "" if standing.interval is None else f" (interval {ends(standing.interval)})"
    return f"{nats(standing.mean)} nats per token on held-out text{interval}"


def _are(of_kind: Sequence[Standing]) -> str:
    return "is" if len(of_kind) == 1 else "are"


def _list(of_kind: Sequence[Standing]) -> str:
    """Returns variants with their differences."""
    return enumerated(
        [
            f"{code(each.entry.variant)} ({signed(each.difference.mean)}, interval "
            f"{ends(each.difference, '{:+.4f}')})"
            if each.difference
            else f"{code(each.entry.variant)} (too few seeds finished)"
            for each in of_kind
        ]
    )


def _ended(failed: Sequence[Standing]) -> str:
    """Returns a sentence on variants without a finished run."""
    if not failed:
        return ""
    return f" No run of {names([each.entry.variant for each in failed])} finished."
