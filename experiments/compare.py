"""Is B better than A? Variants under one budget, several seeds, intervals, costs, and a report.

    python experiments/compare.py --variants quickstart llama-style lstm --budget tokens=1M

The first variant is the baseline. Add --dry-run to see the plan and how long it would take; the
same command goes on where it was stopped, and trains only what is missing. The report is
report.html in --out, with report.md, results.csv and results.jsonl beside it.
"""

from gptjax.cli import run_command
from gptjax.commands.training import compare

if __name__ == "__main__":
    run_command(compare, __doc__)
