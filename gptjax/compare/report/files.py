"""Files of a report: an HTML page, the same in Markdown, and all runs as data.

| file | content |
|---|---|
| report.html | the self-contained page |
| report.md, figures/ | the same in Markdown, its figures as SVG |
| results.jsonl | one `Outcome` per line, with its curve; NaN and infinities are strings, "nan" |
| results.csv | one `Outcome` per row, with its variant's parameters and training FLOPs |
"""

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

from gptjax.compare.report.document import to_html, to_markdown
from gptjax.compare.report.sections import report_document
from gptjax.compare.results import Answer, Outcome, read_record
from gptjax.config import SEAL, InputError, parse_json, sealed, unsealed
from gptjax.system.disk import write_error
from gptjax.system.outputs import write_whole

PAGE, MARKDOWN, LINES, ROWS, FIGURES = (
    "report.html",
    "report.md",
    "results.jsonl",
    "results.csv",
    "figures",
)
CURVES = ("curve_steps", "curve_losses")
"""Fields of an outcome too long for a spreadsheet cell."""


def write_report(answer: Answer, directory: Path) -> None:
    """Write all files, each atomically; the same answer gives the same bytes.

    Raises:
      InputError: a directory that cannot be written.
    """
    document = report_document(answer)
    files = {LINES: _lines(answer), ROWS: _rows(answer)}
    files |= {f"{FIGURES}/{picture.name}.svg": picture.svg for picture in document.pictures}
    files |= {MARKDOWN: to_markdown(document), PAGE: to_html(document)}
    try:
        (directory / FIGURES).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_whole(directory / name, text, overwrite=True)
    except OSError as error:
        raise write_error(error, directory) from error


def read_results(directory: Path) -> tuple[Outcome, ...]:
    """Returns the outcomes of all runs, from results.jsonl.

    Raises:
      InputError: no such file, or a line that is no outcome.
    """
    path = directory / LINES
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from error
    return tuple(_outcome(line, f"line {n + 1} of {path}") for n, line in enumerate(lines))


def _outcome(line: bytes, where: str) -> Outcome:
    values = parse_json(line, where)
    if isinstance(values, dict):
        values = unsealed(values, where) if SEAL in values else values  # Older ones have none.
        losses = values.get("curve_losses")
        values["validation_loss"] = _number(values.get("validation_loss"))
        if isinstance(losses, list):
            values["curve_losses"] = [_number(loss) for loss in losses]
    return read_record(Outcome, values, where)


def _plain(value: Any) -> Any:
    """Returns a number that strict JSON can hold, or a string."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _number(value: Any) -> Any:
    """Returns the number that `_plain` made a string of."""
    return float(value) if value in ("nan", "inf", "-inf") else value


def _lines(answer: Answer) -> str:
    lines = []
    for run in answer.outcomes:
        values = {name: _plain(value) for name, value in dataclasses.asdict(run).items()}
        values["curve_losses"] = [_plain(loss) for loss in run.curve_losses]
        lines.append(json.dumps(sealed(values), ensure_ascii=False, allow_nan=False) + "\n")
    return "".join(lines)


def _rows(answer: Answer) -> str:
    entries = {(entry.variant, entry.size): entry for entry in answer.entries}
    rows = []
    for run in answer.outcomes:
        entry = entries.get((run.variant, run.size))
        row = {n: value for n, value in dataclasses.asdict(run).items() if n not in CURVES}
        row["parameters"] = entry.parameters if entry else ""
        row["training_flops"] = entry.training_flops * run.tokens if entry else ""
        rows.append(row)
    names = [f.name for f in dataclasses.fields(Outcome) if f.name not in CURVES]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*names, "parameters", "training_flops"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
