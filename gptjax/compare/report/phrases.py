"""Numbers and lists as phrases of a report."""

import math
from collections.abc import Sequence

from gptjax.compare.analysis.statistics import Interval
from gptjax.compare.report.document import code

UNKNOWN = "–"
PREFIXES = ("", " k", " M", " G", " T", " P", " E")


def nats(value: float | None) -> str:
    """Returns a loss as text, nats per token."""
    return f"{value:.4f}" if known(value) else UNKNOWN


def known(value: float | None) -> bool:
    """Whether a number is there and finite."""
    return value is not None and math.isfinite(value)


def ends(interval: Interval | None, form: str = "{:.4f}") -> str:
    """Returns an interval as text: low to high."""
    if interval is None:
        return UNKNOWN
    return " to ".join(form.format(end).replace("-", "−") for end in interval[1:])


def short(value: float | None) -> str:
    """Returns three digits and a prefix: 6.84 M."""
    if value is None or not known(value):
        return UNKNOWN
    scaled, thousands = value, 0
    while abs(scaled) >= 999.5 and thousands < len(PREFIXES) - 1:
        scaled, thousands = scaled / 1000, thousands + 1
    return f"{scaled:.3g}{PREFIXES[thousands]}"


def memory(size: int | None) -> str:
    """Returns bytes as text, in MiB."""
    return UNKNOWN if size is None else f"{size / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """Returns a duration as 3 h 12 min, 4 min 5 s or 7.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def ratio(value: float | None, reference: float | None) -> str:
    """Returns the ratio to the reference: ×1.25."""
    if value is None or not reference or not known(value / reference):
        return UNKNOWN
    return f"×{value / reference:.3g}" if value / reference >= 10 else f"×{value / reference:.2f}"


def counted(count: int, noun: str) -> str:
    """Returns a count with its noun: 1 run, 2 runs."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def enumerated(words: Sequence[str]) -> str:
    """Returns a list in a sentence: a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def names(variants: Sequence[str]) -> str:
    """Returns variants as a list in a sentence."""
    return enumerated([code(variant) for variant in variants])
