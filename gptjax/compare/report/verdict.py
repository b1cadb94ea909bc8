"""The verdict of a comparison: at a glance, and in sentences."""

from collections.abc import Mapping, Sequence

from gptjax.compare.analysis.verdicts import Standing
from gptjax.compare.report.document import Verdict, code
from gptjax.compare.report.phrases import counted, ends, joined, known, names, nats
from gptjax.compare.results import Answer
from gptjax.plots import signed

Ranked = Mapping[str, Sequence[Standing]]
"""Of each size, best first."""
GROUPS = {
    "better": "▼ better",
    "worse": "▲ worse",
    "open": "○ not separated",
    "withheld": "○ withheld",
    "failed": "✕ failed",
}
"""What may be said of a variant, and how it is called at a glance; the marks are the figures'."""


def title(ranked: Ranked) -> str:
    """The verdict in a line; of several sizes what they are asked."""
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
        "withheld": f"not judged against {name}, since runs failed",
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
    return f"Of {counted(others, 'variant')} {joined(pieces)}"


def at_a_glance(ranked: Ranked) -> tuple[tuple[str, tuple[Verdict, ...]], ...]:
    """By size, the variants that are better, worse, not separated, and that failed."""
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
    """A variant with its difference."""
    name = code(standing.entry.variant)
    return f"{name} {signed(standing.difference.mean)}" if standing.difference else name


def in_sentences(answer: Answer, ranked: Ranked) -> list[str]:
    """The question, and what each size lets one say, a paragraph each."""
    paragraphs = []
    if answer.entries[1:]:
        baseline = code(answer.entries[0].variant)
        paragraphs.append(
            f"Which variants predict held-out text better than the baseline {baseline}, and which "
            "worse, after the same training? They are compared by their loss on it, in nats per "
            "token: lower is better, and a difference below zero is a variant that is ahead."
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
    """The variants without the baseline, by what may be said of them."""
    groups: dict[str, list[Standing]] = {kind: [] for kind in GROUPS}
    for each in of_size:
        apart = each.difference is not None and each.difference.excludes_zero
        if each.tone != "baseline":
            groups["withheld" if each.tone == "open" and apart else each.tone].append(each)
    return groups


def _verdicts(of_size: Sequence[Standing]) -> str:
    """Which variants are better than the baseline, which worse, and of which nobody can tell."""
    baseline = _baseline(of_size)
    name = code(baseline.entry.variant)
    if len(of_size) == 1:
        return (
            f"{name} alone was run; it reached {_reached(baseline)}. There is nothing to compare."
        )
    if not known(baseline.mean):
        return f"No run of the baseline {name} finished, so nothing can be compared with it."
    groups = _groups(of_size)
    if _one_seed(of_size):
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
    if groups["open"]:
        sentences.append(
            f"{_list(groups['open'])} {_are(groups['open'])} not separated from it: the runs do "
            "not tell whether better, worse or the same."
        )
    sentences += [f"Of {_list([each])}: {each.verdict}." for each in groups["withheld"]]
    return " ".join(sentences) + _ended(groups["failed"]) + f" {name} reached {_reached(baseline)}."


def _reached(standing: Standing) -> str:
    interval = "" if standing.interval is None else f" (interval {ends(standing.interval)})"
    return f"{nats(standing.mean)} nats per token on held-out text{interval}"


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
