"""The looks at each difference: which seeds earlier reports of the same runs showed, and when.

Whoever adds seeds because of what the first ones showed looks again, and each look may spend less
of the error that all may have together (analysis/statistics.py). So the looks are kept in
looks.json, each before its report is written; a report of what an earlier one showed is no new
look.
"""

import dataclasses
import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path

from gptjax.compare.analysis.verdicts import finished_runs
from gptjax.compare.report.files import LINES, read_results
from gptjax.compare.results import Entry, Look, Outcome, read_record
from gptjax.compare.versioned_files import read_saved, write_saved
from gptjax.config import InputError, to_dict

LOOKS = "looks.json"


def with_looks(entries: Sequence[Entry], out: Path) -> tuple[Entry, ...]:
    """The entries with all looks at their differences, those of this report kept in `out` too.

    Args:
      entries: by size, of each size the baseline first.
      out: the directory of the comparison.

    Raises:
      InputError: looks that cannot be read, or that another version of gptjax wrote.
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
        write_saved(out / LOOKS, {"looks": [to_dict(look) for look in kept]})
    return tuple(found)


def _look(finals: Iterable[Outcome], baseline: Iterable[Outcome], day: str) -> Look | None:
    """At the seeds that finished of both; None of fewer than two, which have no interval."""
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
    """The looks at the same difference before this one, and this one as it was first taken."""
    same = [number for number, each in enumerate(kept) if _shown(each) == _shown(look)]
    before = kept[: same[0]] if same else kept
    return (
        *(each for each in before if _saw(each, look)),
        kept[same[0]] if same else look,
    )


def _shown(look: Look) -> set[str]:
    return {*look.runs, *look.baseline_runs}


def _saw(earlier: Look, look: Look) -> bool:
    """Whether a run of either side was shown; the sides may have been the other way round."""
    shown = _shown(earlier)
    return not shown.isdisjoint(look.runs) and not shown.isdisjoint(look.baseline_runs)


def _read(out: Path) -> list[Look]:
    """The looks that are kept; without any, that of a report from before they were."""
    path = out / LOOKS
    if not path.exists():
        return _reported(out)
    saved = read_saved(path).get("looks")
    if not isinstance(saved, list):
        raise InputError(f"{path} is damaged: it has no list of looks.")
    return [read_record(Look, each, f"look {n + 1} of {path}") for n, each in enumerate(saved)]


def _reported(out: Path) -> list[Look]:
    """The looks of the report in `out`, if there is one."""
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
