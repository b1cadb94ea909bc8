"""Compare variants under one budget, with several seeds, intervals and costs, in a report.

    python experiments/compare.py --variants quickstart llama-style lstm --budget tokens=1M

The first variant is the baseline. Add --dry-run to see the plan and its estimated time; the same
command resumes, and trains only the missing runs. The report is report.html in --out, with
report.md, results.csv and results.jsonl beside it.
"""

from gptjax.cli import run_command
from gptjax.commands.training import compare

if __name__ == "__main__":
    run_command(compare, __doc__)
