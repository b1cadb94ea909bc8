"""`compare`: plan, train, measure and report a comparison."""

import dataclasses
import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from gptjax.compare.analysis.verdicts import standings
from gptjax.compare.grid.grid import run_grid, work
from gptjax.compare.grid.progress import GridProgress, clock
from gptjax.compare.looks import with_looks
from gptjax.compare.plan import costs
from gptjax.compare.plan.plan import ENDLESS, TIMINGS, Plan, Planned, make_plan
from gptjax.compare.plan.runs import RUNS, GridRun, finished
from gptjax.compare.question import Comparison
from gptjax.compare.report.files import write_report
from gptjax.compare.results import Answer, Costs, Entry, Outcome
from gptjax.compare.versioned_files import read_versioned, write_versioned
from gptjax.config import InputError, to_dict
from gptjax.costs.model import model_cost
from gptjax.runs.bucket import address, is_pushed
from gptjax.runs.directory import hold
from gptjax.runs.result import environment
from gptjax.system.buckets import url_of
from gptjax.system.disk import write_error
from gptjax.system.locks import LOCK
from gptjax.system.mirrors import INDEX, copied

QUESTION = "comparison.json"
HALF_MADE = {TIMINGS, "measured.tmp", "comparison.tmp", LOCK, INDEX}
"""Files that may exist before the question is written."""


def compare(comparison: Comparison, out: Path, command: str) -> Answer:
    """Train the missing runs of the grid, and write the report.

    Raises:
      InputError: an invalid flag, variant or match, results of another version, or a directory
      in which another process compares.
      DiskError: a disk that is full or fails; finished runs are kept.
      Interrupted: a signal while a large model trained; its state is saved.
    """
    if url_of(out):
        with hold(out) as directory:
            return _compare(comparison, _planned(comparison, directory), directory, command)
    plan = _planned(comparison, out)  # Before anything is written, so that a mistake leaves none.
    with hold(out):
        return _compare(comparison, plan, out, command)


def _planned(comparison: Comparison, out: Path) -> Plan:
    _open(out)
    return make_plan(comparison, out)


def _compare(comparison: Comparison, plan: Plan, out: Path, command: str) -> Answer:
    _begin(comparison, out)
    with GridProgress(_all_work(plan)) as progress:

        def outcomes(runs: Sequence[GridRun]) -> list[Outcome]:
            return run_grid(runs, out, plan.data, progress)

        tried = [outcomes(plan.search(each)) for each in plan.planned]
        finals = [
            outcomes(plan.finals(each, _best_rate(searched, plan)))
            for each, searched in zip(plan.planned, tried, strict=True)
        ]
        progress.begin("measuring costs")
        taken, notes = _costs(plan)
    if comparison.mup_width:
        notes.append(
            f"Learning rates were chosen at width {comparison.mup_width} and transferred by muP: "
            "this is cheaper than a search at the real width, and may end at a higher loss."
        )
    entries = with_looks(list(map(_entry, plan.planned, tried, finals, taken)), out)
    runs = [outcome for of in (*tried, *finals) for outcome in of]
    answer = Answer(
        comparison=comparison,
        command=command,
        commit=_commit(),
        environment=environment(),
        data=plan.data.description,
        sizes=plan.sizes,
        entries=entries,
        outcomes=tuple(runs),
        notes=tuple(notes),
        seconds=sum(outcome.seconds for outcome in runs),
    )
    write_report(answer, out)
    return answer


def describe(comparison: Comparison, out: Path) -> str:
    """Returns the plan as a table, how much of it is done, and how long the rest would take.

    Raises:
      InputError: as `compare`.
    """
    with copied(out, is_pushed, empty=True) as directory:
        return _describe(_planned(comparison, directory), directory, address(out))


def _describe(plan: Plan, out: Path, name: str) -> str:
    comparison = plan.comparison
    rate = comparison.rates[0]
    lines = [
        f"{plan.data.description}.",
        f"{'variant':<40}{'size':<14}{'width':>6}{'heads':>6}{'mlp_dim':>8}{'depth':>6}"
        f"{'parameters':>12}{'FLOPs/token':>13}{'off':>8}{'steps':>8}{'runs':>6}",
    ]
    configs = [plan.example(each) for each in plan.planned]
    seconds = costs.estimated_seconds(configs, next(plan.data.batches(0)))
    left, done, total = 0.0, 0, 0
    for each, takes in zip(plan.planned, seconds, strict=True):
        model, cost = each.model, model_cost(each.model)
        runs = [*plan.search(each), *plan.finals(each, rate)]
        missing = [run for run in runs if finished(run, out, plan.data) is None]
        total, done = total + len(runs), done + len(runs) - len(missing)
        left += len(missing) * each.steps * takes
        off = each.reached / each.target - 1 if each.reached and each.target else 0.0
        lines.append(
            f"{each.variant.name:<40}{each.size:<14}{model.width:>6}{model.heads:>6}"
            f"{model.actual_mlp_dim:>8}{model.depth:>6}{cost.parameters:>12,}"
            f"{cost.training_flops:>13,}{off:>+8.2%}{each.steps:>8,}{len(runs):>6}"
        )
    lines.append(
        f"{total} runs, of which {name} has {done}; training the rest takes about "
        f"{clock(left)}, by {plan.planned[0].variant.name}'s measured step and the FLOPs of "
        "each, without evaluations and compilation."
    )
    return "\n".join(lines)


def summary(answer: Answer) -> str:
    """Returns the verdict on each variant, one line per variant."""
    lines = []
    for size in answer.sizes:
        for standing in standings(answer, size):
            name = " ".join(filter(None, (standing.entry.variant, size)))
            lines.append(f"{name}: {standing.mean:.4f} nats per token, {standing.verdict}")
    return "\n".join(lines)


def _open(out: Path) -> None:
    """Refuse a directory that is no comparison's, of another version, or not writable.

    Nothing is created yet, so that a mistake in another flag leaves nothing behind.

    Raises:
      InputError: it is.
    """
    try:
        around = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
        if not around.is_dir():
            what = "a file" if around.exists() else "a link that leads nowhere"
            raise InputError(f"--out is {out}, and {around} is {what}: choose another --out.")
        if not os.access(around, os.W_OK | os.X_OK):
            raise InputError(f"--out is {out}, and {around} may not be written: choose another.")
        if (out / QUESTION).exists():
            read_versioned(out / QUESTION)
        elif out.exists() and {path.name for path in out.iterdir()} - HALF_MADE:
            raise InputError(f"{out} holds files but no {QUESTION}: choose another --out.")
    except OSError as error:
        raise InputError(f"--out: cannot use {out}: {error.strerror}.") from error


def _begin(comparison: Comparison, out: Path) -> None:
    """Create the directory, with the question and an empty runs/.

    Raises:
      InputError: it cannot be written.
    """
    write_versioned(out / QUESTION, {"comparison": to_dict(comparison)})
    try:
        (out / RUNS).mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(error, out / RUNS, "--out") from error


def _all_work(plan: Plan) -> float:
    rate = plan.comparison.rates[0]
    return sum(
        work(run.config)
        for each in plan.planned
        for run in (*plan.search(each), *plan.finals(each, rate))
    )


def _by_rate(searched: Sequence[Outcome]) -> dict[float, tuple[float | None, ...]]:
    """Returns the losses of the search seeds by learning rate."""
    rates = dict.fromkeys(outcome.learning_rate for outcome in searched)
    return {
        rate: tuple(each.validation_loss for each in searched if each.learning_rate == rate)
        for rate in rates
    }


def _best_rate(searched: Sequence[Outcome], plan: Plan) -> float:
    """Returns the rate with the least mean loss; rates at which a run failed come last."""
    means = {
        rate: math.inf if None in losses else np.mean(np.array(losses, float))
        for rate, losses in _by_rate(searched).items()
    }
    return min(means, key=lambda rate: means[rate], default=plan.comparison.rates[0])


def _costs(plan: Plan) -> tuple[list[Costs | None], list[str]]:
    """Returns the costs by size and variant, None where unmeasured, and sentences on these."""
    batch, taken, notes = next(plan.data.batches(0)), [], []
    for size in plan.sizes:
        configs = {
            each.variant.name: plan.example(each._replace(steps=ENDLESS))
            for each in plan.planned
            if each.size == size
        }

        def measure(configs: dict = configs) -> dict:
            return {name: of._asdict() for name, of in costs.measure(configs, batch).items()}

        of = {name: to_dict(config) for name, config in configs.items()}
        try:
            known = plan.timings.get_or_measure("costs", of, measure)
        except jax.errors.JaxRuntimeError as error:
            notes.append(f"Costs {size} could not be measured: {' '.join(str(error).split())}")
            taken += [None] * len(configs)
        else:
            taken += [Costs(**known[name]) for name in configs]
    return taken, notes


def _entry(
    planned: Planned,
    searched: Sequence[Outcome],
    finals: Sequence[Outcome],
    taken: Costs | None,
) -> Entry:
    counted = model_cost(planned.model)
    optimizer = dataclasses.replace(
        planned.variant.optimizer, learning_rate=finals[0].learning_rate
    )
    return Entry(
        variant=planned.variant.name,
        size=planned.size,
        model=planned.model,
        optimizer=optimizer,
        parameters=counted.parameters,
        training_flops=counted.training_flops,
        target=planned.target,
        reached=planned.reached,
        steps=planned.steps,
        searched=_by_rate(searched),
        finals=tuple(finals),
        costs=taken,
    )


def _commit() -> str:
    """Returns the Git commit, with a + if files differ from it; empty outside a repository."""
    here = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(
                ["git", *words], cwd=here, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + "+" * bool(changes)
