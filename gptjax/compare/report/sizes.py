"""The scaling section of a report: loss by parameters, fitted laws, and where they cross."""

from collections.abc import Mapping

from gptjax.compare.analysis.scaling import SIZES, Crossing, Law, crossings, laws, unfitted
from gptjax.compare.report import figures, tables
from gptjax.compare.report.document import Items, Part, Section, code
from gptjax.compare.report.phrases import counted, known, names, short
from gptjax.compare.results import Answer

FURTHER = 10
"""How far beyond the measured sizes crossings are searched, as a ratio of sizes."""


def over_sizes(answer: Answer) -> Section:
    """Returns the section on loss against parameters, over all variants."""
    fitted = laws(answer)
    parts: list[Part] = [figures.scaling(answer, fitted)]
    if len(answer.sizes) < SIZES:
        parts.append(
            f"No law is fitted to {counted(len(answer.sizes), 'size')}: E, A and alpha "
            f"need at least {SIZES}."
        )
        return Section("Scaling", tuple(parts))
    if fitted:
        parts += [
            "A law is L = E + A N^-alpha: N is the number of parameters, L the loss, and E the "
            "irreducible loss. Intervals are by the bootstrap over seeds; they cover the variance "
            "between seeds, not whether the law has the right form. The last column is the largest "
            "distance of a size's mean loss from the curve.",
            tables.laws(fitted),
        ]
    said = (*unfitted(answer), *_notes(fitted), *_crossings(answer, fitted))
    return Section("Scaling", (*parts, *([Items(said)] if said else [])))


def _notes(fitted: Mapping[str, Law]) -> list[str]:
    """Returns the caveats of the fits, each once with all its variants."""
    of_note: dict[str, list[str]] = {}
    for variant, law in fitted.items():
        for note in law.notes:
            of_note.setdefault(note, []).append(variant)
    return [f"{names(variants)}: {note}" for note, variants in of_note.items()]


def _crossings(answer: Answer, fitted: Mapping[str, Law]) -> list[str]:
    """Returns sentences on where each variant's law crosses the baseline's."""
    baseline = answer.entries[0].variant
    if baseline not in fitted:
        return []
    sentences = []
    for variant, law in fitted.items():
        if variant == baseline:
            continue
        smallest, largest = (
            end(end(each.parameters) for each in (law, fitted[baseline])) for end in (min, max)
        )
        within = (float(smallest) / FURTHER, float(largest) * FURTHER)
        searched = f"between {short(within[0])} and {short(within[1])} parameters"
        found = crossings(law, fitted[baseline], within)
        sentences += [_crossing(variant, baseline, each, searched) for each in found]
        if not found:
            ahead = law.predict(largest) < fitted[baseline].predict(largest)
            sentences.append(
                f"The laws of {code(variant)} and {code(baseline)} do not cross {searched}, where "
                f"that of {code(variant if ahead else baseline)} is lower."
            )
    return sentences


def _crossing(variant: str, baseline: str, crossing: Crossing, searched: str) -> str:
    above, below = (variant, baseline) if crossing.better_above else (baseline, variant)
    where = (
        "outside the range measured for both, so extrapolated"
        if crossing.extrapolated
        else "within the range measured for both"
    )
    sure = "without resamples there is no uncertainty"
    if known(crossing.share):
        low, high = crossing.interval
        sure = f"{100 * crossing.share:.0f}% of resamples cross so {searched}"
        sure += f", at {short(low)} to {short(high)}" if known(low) else ""
    return (
        f"The law of {code(below)} is lower below {short(crossing.parameters)} parameters, "
        f"that of {code(above)} above: {where}; {sure}."
    )
