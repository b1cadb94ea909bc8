"""Looks (interim analyses) at each difference: which seeds earlier reports showed, and when.

Adding seeds after seeing the first results is a group-sequential test: each further look may spend
less of the total error (analysis/statistics.py). So looks are kept in looks.json, each written
before its report; a report of runs that an earlier one showed is no new look.
"""

import dataclasses
import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

from gptjax.compare.analysis.verdicts import finished_runs
from gptjax.compare.report.files import LINES, read_results
from gptjax.compare.results import Entry, Look, Outcome, read_record
from gptjax.compare.versioned_files import read_versioned, write_versioned
from gptjax.config import InputError, to_dict

LOOKS = "looks.json"


def with_looks(entries: Sequence[Entry], out: Path) -> tuple[Entry, ...]:
    """Returns the entries with all looks at their differences; new looks are written to `out`.

    Args:
      entries: by size, the baseline of each size first.
      out: the comparison's directory.

    Raises:
      InputError: a looks.json that cannot be read, or that another version of gptjax wrote.
    """
    kept = _read(out)
    known = len(kept)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    found = []
    for size in dict.fromkeys(entry.size for entry in entries):
        baseline, *others = [entry for entry in entries if entry.size == size]
        found.append(baseline)
        for entry in others:
            look = _look(entry.finals, baseline.finals, today)
            looks = () if look is None else _up_to(look, kept)
            kept += [each for each in looks[-1:] if each not in kept]
            found.append(dataclasses.replace(entry, looks=looks))
    if len(kept) > known:
        write_versioned(out / LOOKS, {"looks": [to_dict(look) for look in kept]})
    return tuple(found)


def _look(finals: Iterable[Outcome], baseline: Iterable[Outcome], day: str) -> Look | None:
    """Returns the look at the seeds that finished in both; None for fewer than two: no interval."""
    ours, theirs = finished_runs(finals), finished_runs(baseline)
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return None
    return Look(
        variant=ours[seeds[0]].variant,
        size=ours[seeds[0]].size,
        day=day,
        seeds=tuple(seeds),
        runs=tuple(ours[seed].directory for seed in seeds),
        baseline_runs=tuple(theirs[seed].directory for seed in seeds),
    )


def _up_to(look: Look, kept: Sequence[Look]) -> tuple[Look, ...]:
    """Returns the earlier looks at the same difference, then this one as first recorded."""
    same = [number for number, each in enumerate(kept) if _shown(each) == _shown(look)]
    before = kept[: same[0]] if same else kept
    return (
        *(each for each in before if _overlaps(each, look)),
        kept[same[0]] if same else look,
    )


def _shown(look: Look) -> set[str]:
    return {*look.runs, *look.baseline_runs}


def _overlaps(earlier: Look, look: Look) -> bool:
    """Whether `earlier` showed runs of both sides, in either role."""
    shown = _shown(earlier)
    return not shown.isdisjoint(look.runs) and not shown.isdisjoint(look.baseline_runs)


def _read(out: Path) -> list[Look]:
    """Returns the looks in looks.json; without it, those of a report older than that file."""
    path = out / LOOKS
    if not path.exists():
        return _reported(out)
    saved = read_versioned(path).get("looks")
    if not isinstance(saved, list):
        raise InputError(f"{path} is damaged: it has no list of looks.")
    return [read_record(Look, each, f"look {n + 1} of {path}") for n, each in enumerate(saved)]


def _reported(out: Path) -> list[Look]:
    """Returns the looks of the report in `out`, if there is one."""
    path = out / LINES
    if not path.exists():
        return []
    day = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).date().isoformat()
    finals = [run for run in read_results(out) if run.purpose == "final"]
    looks = []
    for size in dict.fromkeys(run.size for run in finals):
        of_size = [run for run in finals if run.size == size]
        baseline, *others = [
            [run for run in of_size if run.variant == name]
            for name in dict.fromkeys(run.variant for run in of_size)
        ]
        looks += [_look(runs, baseline, day) for runs in others]
    return [look for look in looks if look is not None]
