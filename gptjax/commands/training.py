"""Commands that train: one run, or a comparison of many."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from gptjax.compare.question import Comparison
from gptjax.config import ExperimentConfig
from gptjax.models.presets import PRESETS
from gptjax.runs.defaults import defaults
from gptjax.system.buckets import url_of
from gptjax.system.outputs import check_output


def trainable() -> dict[str, ExperimentConfig]:
    """Returns a run config per preset, with the tokenizer's vocabulary; the first is default."""
    names = ["quickstart", *(name for name in PRESETS if name != "quickstart")]
    return {name: defaults(name) for name in names}


def train(config: ExperimentConfig, out: Path, overwrite: bool) -> None:
    """Train a model on any text: `--preset NAME` sets the defaults, every field is a flag.

    All outputs are in the directory `--out`; the same command resumes the run.
    """
    from gptjax.commands.outcomes import outcome
    from gptjax.runs.bucket import address
    from gptjax.runs.run import run

    if not run(config, out, overwrite, show=outcome):
        return
    sample = f"python -m gptjax sample {address(out)}"
    if config.data.objective == "causal":
        print(f'Next: {sample} --prompt "The "')
    elif config.data.objective == "sequence_to_sequence":
        print(f'Next: {sample} --beams 4 --prompt "A text to translate."')


def compare(
    comparison: Annotated[Comparison, tyro.conf.arg(name="")],
    out: Path = Path("runs/compare"),
    dry_run: bool = False,
) -> None:
    """Is B better than A? Compare variants under one budget, with several seeds and a report.

    `--variants quickstart llama-style lstm --budget tokens=1M`: the first is the baseline. The same
    command resumes where it was stopped, and trains only what is missing.

    Args:
      comparison: The comparison.
      out: Directory of all runs and the report; finished runs are not repeated.
      dry_run: Print the plan and how long it would take, and train nothing.
    """
    from gptjax.compare.study import compare, describe, summary
    from gptjax.runs.bucket import address

    named = address(out)
    if dry_run:
        print(describe(comparison, out))
        return
    try:
        answer = compare(comparison, out, _command())
    except KeyboardInterrupt:
        print(
            f"\nFinished runs are kept in {named}: the same command resumes.",
            file=sys.stderr,
        )
        raise
    print(
        f"{summary(answer)}\nIn {named}: report.html, report.md, results.csv, results.jsonl, runs/."
    )


def goodput(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    /,
    png: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    overwrite: bool = False,
) -> None:
    """Show where a run's wall time went, over all its restarts: steps, lost steps, waiting …

    Goodput is the share of steps that are kept. Of a run in a bucket it is as of the last upload.

    Args:
      run: Directory of the run.
      png: Draw it, too.
      overwrite: Replace the picture that is there.
    """
    from gptjax.runs.bucket import address
    from gptjax.runs.goodput import goodput, table
    from gptjax.system.mirrors import copied
    from gptjax.training.trackers.sessions import SESSIONS

    if png is not None:
        check_output(png, overwrite=overwrite)
    with copied(run, {SESSIONS}.__contains__) as directory:
        found = goodput(directory)
    print(table(found))
    if png is not None:
        from gptjax.plots.curves import stacked_bar
        from gptjax.plots.legible import save

        parts = {kind: value for kind, value in found.seconds.items() if value}
        title = f"{address(run)}: goodput {found.share:.1%}"
        save(stacked_bar([*parts], [*parts.values()], label="wall time, s", title=title), png)
        print(f"{url_of(png) or png} shows it.")


def _command() -> str:
    """Returns the command line for the report."""
    name, *words = sys.argv
    own = Path(name).name in ("gptjax", "__main__.py")
    return f"python {'-m gptjax' if own else name} {shlex.join(words)}"
