"""What several sizes say together: the loss by parameters, its laws, and where they cross."""

from collections.abc import Mapping

from gptjax.compare.analysis.scaling import SIZES, Crossing, Law, crossings, laws, unfitted
from gptjax.compare.report import figures, tables
from gptjax.compare.report.document import Items, Part, Section, code
from gptjax.compare.report.phrases import counted, known, names, short
from gptjax.compare.results import Answer

FURTHER = 10
"""How far beyond what was measured a crossing is looked for, as a ratio of sizes."""


def over_sizes(answer: Answer) -> Section:
    """Loss against parameters, of all variants."""
    fitted = laws(answer)
    parts: list[Part] = [figures.scaling(answer, fitted)]
    if len(answer.sizes) < SIZES:
        parts.append(
            f"No law is fitted to {counted(len(answer.sizes), 'size')}: one of E, A and alpha "
            f"needs at least {SIZES}."
        )
        return Section("Over sizes", tuple(parts))
    if fitted:
        parts += [
            "A law is L = E + A N^-alpha: N is the number of parameters, L the loss, and E what is "
            "left of it at any size. Its intervals, by the bootstrap over seeds, say how far seeds "
            "put it off; they do not know whether it is the right law. The last column is what a "
            "size's mean loss is off the curve.",
            tables.laws(fitted),
        ]
    said = (*unfitted(answer), *_notes(fitted), *_crossings(answer, fitted))
    return Section("Over sizes", (*parts, *([Items(said)] if said else [])))


def _notes(fitted: Mapping[str, Law]) -> list[str]:
    """What each fit cannot tell; what several cannot is told once."""
    of_note: dict[str, list[str]] = {}
    for variant, law in fitted.items():
        for note in law.notes:
            of_note.setdefault(note, []).append(variant)
    return [f"{names(variants)}: {note}" for note, variants in of_note.items()]


def _crossings(answer: Answer, fitted: Mapping[str, Law]) -> list[str]:
    """Where each variant's law crosses the baseline's."""
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
        looked = f"between {short(within[0])} and {short(within[1])} parameters"
        found = crossings(law, fitted[baseline], within)
        sentences += [_crossing(variant, baseline, each, looked) for each in found]
        if not found:
            ahead = law.predict(largest) < fitted[baseline].predict(largest)
            sentences.append(
                f"The laws of {code(variant)} and {code(baseline)} do not cross {looked}, where "
                f"that of {code(variant if ahead else baseline)} is the lower one."
            )
    return sentences


def _crossing(variant: str, baseline: str, crossing: Crossing, looked: str) -> str:
    above, below = (variant, baseline) if crossing.better_above else (baseline, variant)
    where = (
        "beyond what was measured of both, so extrapolated"
        if crossing.extrapolated
        else "within what was measured of both"
    )
    sure = "there are no resamples to say how surely"
    if known(crossing.share):
        low, high = crossing.interval
        sure = f"{100 * crossing.share:.0f}% of resamples cross so {looked}"
        sure += f", at {short(low)} to {short(high)}" if known(low) else ""
    return (
        f"The law of {code(below)} is the lower one below {short(crossing.parameters)} parameters, "
        f"that of {code(above)} above: {where}; {sure}."
    )
