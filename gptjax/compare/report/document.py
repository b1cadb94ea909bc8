"""A report as a format-independent document: sections of sentences, tables and figures.

One document becomes an HTML page and a Markdown file, so that the two cannot differ. In a sentence
or a cell, text between two backticks is code; everything else is literal.
"""

import html
import re
from pathlib import Path
from string import Template
from typing import NamedTuple

PAGE = Path(__file__).parent / "page"
PARTS = re.compile("(?<=[,:=])")
"""Where a name may be broken across lines."""
NUMBERS = re.compile("[^0-9a-z]+")


class Table(NamedTuple):
    """Rows under a header; the first column names the row."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    tones: tuple[str, ...] = ()
    """The colour class of each row: better, worse, open, failed or baseline; empty for none."""
    words: tuple[int, ...] = ()
    """Columns of text besides the first; the others hold numbers."""


class Picture(NamedTuple):
    """A figure with its caption."""

    name: str
    """Name of its file, and prefix of its ids on the page."""
    title: str
    svg: str
    """One svg element (`plots.to_svg`)."""
    narrow: str
    """The same for a phone's screen."""
    caption: str


class Items(NamedTuple):
    """A list of sentences."""

    sentences: tuple[str, ...]


class Code(NamedTuple):
    """Preformatted lines, folded under a summary if there is one."""

    text: str
    summary: str = ""


class Heading(NamedTuple):
    """A heading within a section."""

    title: str


Part = str | Heading | Table | Picture | Items | Code
"""A string is a paragraph."""


class Section(NamedTuple):
    """A section: its heading and its parts."""

    title: str
    parts: tuple[Part, ...]


class Verdict(NamedTuple):
    """A verdict with the variants that it is about, for the summary on top."""

    tone: str
    """Colour class: better, worse, open or failed."""
    label: str
    who: tuple[str, ...]


class Document(NamedTuple):
    """The whole report."""

    title: str
    glance: tuple[tuple[str, tuple[Verdict, ...]], ...]
    """The summary on top: verdicts by size, whose name is empty if there is one size."""
    facts: tuple[str, ...]
    """Short facts under the title."""
    sections: tuple[Section, ...]

    @property
    def pictures(self) -> list[Picture]:
        """Returns all figures, in order."""
        return [p for section in self.sections for p in section.parts if isinstance(p, Picture)]


def to_html(document: Document) -> str:
    """Returns one self-contained HTML page, without scripts."""
    sections = document.sections
    anchors = [_anchor(section.title) for section in sections]
    return Template((PAGE / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(document.title.replace("`", "")),
        heading=_html_line(document.title),
        style=(PAGE / "page.css").read_text(encoding="utf-8"),
        glance="".join(_html_verdicts(size, of_size) for size, of_size in document.glance),
        facts="".join(f"<li>{_html_line(fact)}</li>" for fact in document.facts),
        contents="".join(
            f'<li><a href="#{anchor}">{_html_line(section.title)}</a></li>'
            for anchor, section in zip(anchors, sections, strict=True)
        ),
        sections="\n".join(
            f'<section id="{anchor}">\n<h2>{_html_line(section.title)}</h2>\n'
            + "\n".join(_html_part(part) for part in section.parts)
            + "\n</section>"
            for anchor, section in zip(anchors, sections, strict=True)
        ),
    )


def _anchor(title: str) -> str:
    return NUMBERS.sub("-", title.lower()).strip("-")


def _html_verdicts(size: str, verdicts: tuple[Verdict, ...]) -> str:
    name = f"<h2>{_html_line(size)}</h2>\n" if size else ""
    rows = "".join(
        f'<div class="{each.tone}"><dt>{_html_line(each.label)}</dt> '
        f"<dd>{' '.join(f'<span>{_html_line(one)}</span>' for one in each.who)}</dd></div>\n"
        for each in verdicts
    )
    return f'{name}<dl class="glance">\n{rows}</dl>\n' if rows else ""


def _html_part(part: Part) -> str:
    match part:
        case str():
            return f"<p>{_html_line(part)}</p>"
        case Heading():
            return f"<h3>{_html_line(part.title)}</h3>"
        case Table():
            return _html_table(part)
        case Picture():
            named = f'<svg role="img" aria-label="{html.escape(part.title)}"'
            drawn = "\n".join(
                f'<div class="drawn {width}">{svg.replace("<svg", named, 1)}</div>'
                for width, svg in (("wide", part.svg), ("narrow", part.narrow))
            )
            return (
                f"<figure>{drawn}\n<figcaption><b>{_html_line(part.title)}.</b> "
                f"{_html_line(part.caption)}</figcaption></figure>"
            )
        case Items():
            items = "".join(f"<li>{_html_line(sentence)}</li>\n" for sentence in part.sentences)
            return f"<ul>\n{items}</ul>"
        case Code():
            code = f'<pre class="box" tabindex="0"><code>{html.escape(part.text)}</code></pre>'
            if not part.summary:
                return code
            return f"<details><summary>{_html_line(part.summary)}</summary>{code}</details>"


def _html_table(table: Table) -> str:
    kinds = ["words" if column in (0, *table.words) else "" for column in range(len(table.head))]

    def cells(row: tuple[str, ...]) -> str:
        first, *others = map(_html_line, row)
        return f'<th scope="row">{first}</th>' + "".join(
            f'<td class="{kind}">{cell}</td>' if kind else f"<td>{cell}</td>"
            for kind, cell in zip(kinds[1:], others, strict=True)
        )

    head = "".join(
        f'<th scope="col" class="{kind}">{_html_line(name)}</th>'
        for kind, name in zip(kinds, table.head, strict=True)
    )
    tones = table.tones or ("",) * len(table.rows)
    rows = "".join(
        f'<tr class="{tone}">{cells(row)}</tr>\n'
        for tone, row in zip(tones, table.rows, strict=True)
    )
    return (
        '<div class="box" role="region" aria-label="Table" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>"
    )


def _html_line(text: str) -> str:
    return "".join(
        f"<code>{PARTS.sub('<wbr>', html.escape(piece))}</code>" if code else html.escape(piece)
        for piece, code in _pieces(text)
    )


def to_markdown(document: Document) -> str:
    """Returns the document in Markdown, with its figures in figures/."""
    blocks = [f"# {_markdown_line(document.title)}"]
    for size, verdicts in document.glance:
        lines = [
            f"- **{_markdown_line(each.label)}**: {', '.join(map(_markdown_line, each.who))}"
            for each in verdicts
        ]
        blocks += [_markdown_line(size)] * bool(size and lines) + ["\n".join(lines)] * bool(lines)
    blocks += [" · ".join(_markdown_line(fact) for fact in document.facts)]
    for section in document.sections:
        blocks += [f"## {_markdown_line(section.title)}"]
        blocks += [_markdown_part(part) for part in section.parts]
    return "\n\n".join(blocks) + "\n"


def _markdown_part(part: Part) -> str:
    match part:
        case str():
            return _markdown_line(part)
        case Heading():
            return f"### {_markdown_line(part.title)}"
        case Table():
            head, *rows = [[_cell(cell) for cell in row] for row in (part.head, *part.rows)]
            rule = [":--" if column in (0, *part.words) else "--:" for column in range(len(head))]
            return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))
        case Picture():
            title = _markdown_line(part.title)
            caption = _markdown_line(part.caption)
            return f"![{title}](figures/{part.name}.svg)\n\n*{title}.* {caption}"
        case Items():
            return "\n".join(f"- {_markdown_line(sentence)}" for sentence in part.sentences)
        case Code():
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", part.text)), default=0))
            code = f"{fence}text\n{part.text}\n{fence}"
            if not part.summary:
                return code
            return f"<details><summary>{_html_line(part.summary)}</summary>\n\n{code}\n\n</details>"


def _cell(text: str) -> str:
    """Returns a Markdown table cell, with bars escaped, which would end it even in code."""
    return _markdown_line(text.replace("|", "\0")).replace("\0", r"\|")


def _markdown_line(text: str) -> str:
    return "".join(
        f"`{piece}`" if code else re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", piece)
        for piece, code in _pieces(text)
    )


def _pieces(text: str) -> list[tuple[str, bool]]:
    """Returns a line's pieces and whether each is code; an unpaired backtick is literal."""
    pieces = " ".join(text.split()).split("`")
    if len(pieces) % 2 == 0:
        return [("`".join(pieces), False)]
    return [(piece, place % 2 == 1) for place, piece in enumerate(pieces) if piece]


def code(text: str) -> str:
    """Returns a name as code in a sentence, whatever characters it has."""
    return f"`{text.replace('`', chr(39))}`" if text else "–"
