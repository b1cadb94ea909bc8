"""The table of a profiled step, as text."""

from gptjax.training.profile.parts import MEANINGS, Row, StepTimes

HEAD = ("part", "ms", "share", "GFLOP", "GFLOP/s", "GB", "GB/s", "roofline ms", "reached")
"""Of one device and step: time, FLOPs of the cost model, bytes to and from memory, the least time
that the peaks allow, and its share of the time taken."""


def heading(found: StepTimes) -> str:
    """One sentence: which steps, their time, their FLOPs."""
    rate = found.flops / found.seconds
    return (
        f"Steps {found.first:,} to {found.last:,}: {1e3 * found.seconds:,.2f} ms each, on one "
        f"device {1e-9 * found.flops:,.2f} GFLOP and {1e-9 * rate:,.1f} GFLOP/s, "
        f"{rate / found.peaks.flops:.1%} of the peak."
    )


def cells(row: Row, total: float) -> tuple[str, ...]:
    """A row under `HEAD`; of a step that takes `total` seconds."""

    def number(value: float, digits: int = 2) -> str:
        return f"{value:,.{digits}f}" if value else ""

    rates = [1e-9 * value / row.seconds if row.seconds else 0.0 for value in (row.flops, row.bytes)]
    return (
        row.part,
        f"{1e3 * row.seconds:,.2f}",
        f"{row.seconds / total:.1%}",
        number(1e-9 * row.flops),
        number(rates[0], 1),
        number(1e-9 * row.bytes, 3),
        number(rates[1], 1),
        number(1e3 * row.bound),
        f"{row.bound / row.seconds:.0%}" if row.bound and row.seconds else "",
    )


def table(found: StepTimes) -> str:
    """The heading, a line for each part, and what the last ones are."""
    rows = [HEAD, *(cells(row, found.seconds) for row in found.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]
    return "\n".join([heading(found), *lines, *notes(found)])


def notes(found: StepTimes) -> list[str]:
    """What the last rows are, and the peaks of the roofline."""
    flops, bandwidth = found.peaks.flops, found.peaks.bandwidth
    lines = [f"{row.part}: {MEANINGS[row.part]}." for row in found.rows if row.part in MEANINGS]
    if any(row.bound > row.seconds for row in found.rows):
        lines.append("reached: above 100% where arrays stay in a cache, not going through memory.")
    return [
        *lines,
        f"Peaks of a device: {1e-9 * flops:,.1f} GFLOP/s and {1e-9 * bandwidth:,.1f} GB/s "
        f"({found.peaks.source}).",
    ]
