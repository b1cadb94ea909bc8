"""profile.html: the table of a profiled step with a bar for each part."""

import html
from pathlib import Path
from string import Template

from gptjax.training.profile.parts import Row, StepTimes
from gptjax.training.profile.table import HEAD, cells, heading, notes

BAR = HEAD.index("share") + 1
"""The column of the bars."""


def page(found: StepTimes) -> str:
    """Returns the page, which loads nothing from elsewhere."""
    longest = max(row.seconds for row in found.rows)
    names = [*HEAD[:BAR], "time, roofline", *HEAD[BAR:]]
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    rows = "".join(_row(row, found.seconds, longest) for row in found.rows)
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=f"Time of steps {found.first:,} to {found.last:,}",
        heading=html.escape(heading(found)),
        head=head,
        rows=rows,
        notes="".join(f"<li>{html.escape(note)}</li>" for note in notes(found)),
    )


def _row(row: Row, total: float, longest: float) -> str:
    name, *numbers = map(html.escape, cells(row, total))
    width, bound = (100 * value / longest for value in (row.seconds, row.bound))
    columns = [f"<td>{number}</td>" for number in numbers]
    columns.insert(
        BAR - 1,
        f'<td class="bar" aria-hidden="true"><div style="width: {width:.2f}%"></div>'
        f'<div class="bound" style="width: {min(bound, 100):.2f}%"></div></td>',
    )
    return f'<tr><th scope="row">{name}</th>{"".join(columns)}</tr>'
