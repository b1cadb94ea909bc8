"""Is B better than A? Variants under one budget, several seeds, intervals, costs, and a report.

    python experiments/compare.py --variants quickstart llama-style lstm --budget tokens=1M

The first variant is the baseline. Add --dry-run to see the plan and how long it would take; the
same command goes on where it was stopped, and trains only what is missing. The report is
report.html in --out, with report.md, results.csv and results.jsonl beside it.
"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from gptjax.cli import run_command
from gptjax.compare.question import Comparison
from gptjax.compare.study import compare, describe, summary


def main(
    comparison: Annotated[Comparison, tyro.conf.arg(name="")],
    out: Path = Path("runs/compare"),
    dry_run: bool = False,
) -> None:
    """The experiment's own flags.

    Args:
      comparison: The question.
      out: Directory of all runs and the report; runs that are there are not repeated.
      dry_run: Print the plan and how long it would take, and train nothing.
    """
    if dry_run:
        print(describe(comparison, out))
        return
    try:
        answer = compare(comparison, out, f"python {shlex.join(sys.argv)}")
    except KeyboardInterrupt:
        print(f"\nWhat has finished is kept in {out}: the same command goes on.", file=sys.stderr)
        raise
    print(
        f"{summary(answer)}\nIn {out}: report.html, report.md, results.csv, results.jsonl, runs/."
    )


if __name__ == "__main__":
    run_command(main, __doc__)
