"""The certificate: every variant, in tiny shapes, against every property of properties.py.

The variants are the presets (`gpt2`) and every value of every axis of `gptjax.config.axes`
(`position_embedding=alibi`), so that new values are included automatically.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from gptjax.certify.cases import ROWS, Case
from gptjax.certify.properties import PROPERTIES, NotApplicable
from gptjax.config import InputError, TransformerConfig, near_names
from gptjax.config.axes import AXES, OUTSIDE, companions
from gptjax.models.presets import PRESETS
from gptjax.runs.result import environment

BASE = TransformerConfig(vocab_size=11, context_length=12, depth=2, width=16, heads=4)
"""The config that axis values modify: the defaults, in tiny shapes."""

TINY: dict[str, tuple[Any, ...]] = {
    "head_dim": (8,),
    "mlp_dim": (20,),
    "attention_softcap": (1.0,),
    "logit_softcap": (1.0,),
    "logit_scale": (0.25,),
    "encoder_depth": (1,),
}
"""Values of axes without a list in `AXES`, for tiny shapes."""

NAME_WIDTH, CELL_WIDTH = 30, 5
"""Characters per column of the printed table: the longest name and 14 properties fill 100."""

HEAD_WIDTH = 4
"""Head dim of a shrunk preset."""

OF_REAL_SIZE = ("parameters",)
"""Properties checked at a variant's own size."""


def axis_values() -> dict[str, TransformerConfig]:
    """Returns `axis=value` → the base config with that value, for every value of every axis."""
    known = {**AXES, **TINY}
    return {
        f"{axis}={value}": _with_value(axis, value)
        for axis in typing.get_type_hints(TransformerConfig)
        if axis in known
        for value in known[axis]
    }


def variants(names: Iterable[str] = ()) -> dict[str, TransformerConfig]:
    """Returns the config of each of `names`, presets in their own size; of all if none is named.

    Raises:
      InputError: an unknown name; the near ones are listed.
    """
    known = {**axis_values(), **PRESETS}
    for name in names:
        if name not in known:
            raise InputError(f"Unknown variant {name!r}: {near_names(name, known)}")
    return {name: known[name] for name in names} or known


def shrunk(config: TransformerConfig) -> TransformerConfig:
    """Returns the same architecture in tiny shapes, float32, neither scanned nor with remat.

    Kept: grouped-query attention's group size, whether heads are a power of two and fill the width,
    the rotary fraction, the attention pattern, the window relative to the context length, unequal
    depths of encoder and decoder. Soft caps are lowered until they matter.
    """
    if config == BASE or config in axis_values().values():
        return config
    context_length = (
        4 * config.compression if "compressed" in config.attention_pattern else BASE.context_length
    )
    turn = len(config.attention_pattern)
    heads, kv_heads = _shrunk_heads(config)
    actual_head_dim = HEAD_WIDTH
    while (
        config.position_embedding == "rotary" and int(config.rotary_fraction * actual_head_dim) < 2
    ):
        actual_head_dim *= 2
    fills = config.heads * config.actual_head_dim == config.width
    width = heads * actual_head_dim + (0 if fills else 4)
    window = round(config.window / config.context_length * context_length)
    return dataclasses.replace(
        config,
        vocab_size=BASE.vocab_size,
        context_length=context_length,
        depth=2 * turn,
        encoder_depth=3 * turn if config.encoder_depth not in (0, config.depth) else 0,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=0 if fills else actual_head_dim,
        mlp_dim=config.mlp_dim and round(config.mlp_dim / config.width * width),
        window=config.window and min(max(window, 2), context_length - 1),
        attention_softcap=min(config.attention_softcap, 1.0),
        logit_softcap=min(config.logit_softcap, 1.0),
        num_experts=min(config.num_experts, 4),
        experts_per_token=min(config.experts_per_token, 2),
        dropout=0.0,
        capacity_factor=0.0,
        dtype="float32",
        scan_layers=False,
        remat="none",
    )


def _shrunk_heads(config: TransformerConfig) -> tuple[int, int]:
    """Returns heads and `kv_heads` in the same relation as the config's."""
    sharing = config.heads // config.actual_kv_heads
    if sharing == 1:
        power_of_two = config.heads & (config.heads - 1) == 0
        return (min(config.heads, 4) if power_of_two else 3), 0
    kv_heads = min(config.actual_kv_heads, 2)
    return (4 if sharing % 2 == 0 else 3 * kv_heads), kv_heads


def _with_value(axis: str, value: Any) -> TransformerConfig:
    changes = {**companions(axis, value, BASE), axis: value}
    turn = len(str(changes.get("attention", BASE.attention)).split(","))
    return dataclasses.replace(BASE, **changes, depth=turn * BASE.depth)


class Cell(NamedTuple):
    """The result of one property for one variant."""

    error: float
    """The largest error; NaN if the property does not apply, infinite if the check raised."""
    tolerance: float
    """The largest error that passes."""
    reason: str = ""
    """Why the property does not apply, or what the check raised."""

    @property
    def applies(self) -> bool:
        """Whether the property applies to the variant."""
        return not math.isnan(self.error)

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance, or the property does not apply."""
        return not self.applies or self.error <= self.tolerance

    def __str__(self) -> str:
        if not self.applies:
            return "–"
        return f"{self.error:.0e}" if self.error else "0"


Row = dict[str, Cell]
"""A variant's cells by property."""


def certify(config: TransformerConfig) -> Row:
    """Returns the results of all properties for one variant."""
    tiny = shrunk(config)
    row = _tiny_row(tiny) | checked(Case(tiny, config), OF_REAL_SIZE)
    return {name: row[name] for name in PROPERTIES}


@functools.cache
def _tiny_row(config: TransformerConfig) -> Row:
    """Returns the results shared by all variants that shrink to `config`."""
    return checked(Case(config, config), [name for name in PROPERTIES if name not in OF_REAL_SIZE])


def checked(case: Case, names: Iterable[str]) -> Row:
    """Returns the results of some properties; a check that raises is a failure."""
    cells = {}
    for name in names:
        _, tolerance, check = PROPERTIES[name]
        try:
            with jax.default_matmul_precision("highest"):
                cells[name] = Cell(float(check(case)), tolerance)
        except NotApplicable as reason:
            cells[name] = Cell(math.nan, tolerance, str(reason))
        except Exception as error:
            cells[name] = Cell(math.inf, tolerance, f"{type(error).__name__}: {error}")
    return cells


def failures(rows: Mapping[str, Row]) -> list[str]:
    """Returns a sentence for each failure."""
    return [
        f"{variant}: {PROPERTIES[name].claim}: {cell.reason or f'error {cell.error:.1e}'}, "
        f"above the tolerance {cell.tolerance:g}."
        for variant, row in rows.items()
        for name, cell in row.items()
        if not cell.passed
    ]


def heading() -> str:
    """Returns the table's header: the numbered properties with their tolerances.

    Columns are numbered, as the names would not fit into a terminal.
    """
    properties = [
        f"{number:>3} {name:<13}{each.claim:<60}≤ {each.tolerance:g}"
        for number, (name, each) in enumerate(PROPERTIES.items(), 1)
    ]
    numbers = [str(number) for number in range(1, len(PROPERTIES) + 1)]
    return "\n".join([*properties, "", _line("error of property", numbers)])


def line(variant: str, row: Row) -> str:
    """Returns the table's line of one variant; failures are marked with !."""
    cells = (f"{'' if cell.passed else '!'}{cell}".replace("e-0", "e-") for cell in row.values())
    return _line(variant, cells)


def _line(first: str, cells: Iterable[str]) -> str:
    return f"{first:<{NAME_WIDTH}}" + "".join(f"{cell:>{CELL_WIDTH}}" for cell in cells)


def verdict(rows: Mapping[str, Row]) -> str:
    """Returns the last line: how many variants and properties pass, and which fail."""
    checks = sum(cell.applies for row in rows.values() for cell in row.values())
    failing = {
        name: [variant for variant, row in rows.items() if not row[name].passed]
        for name in PROPERTIES
    }
    failed = sum(map(len, failing.values()))
    held = sum(not variants for variants in failing.values())
    failed_of = [
        f"{name} of {', '.join(variants)}" for name, variants in failing.items() if variants
    ]
    return (
        f"{len(rows)} variant{'s' if len(rows) > 1 else ''}: {held} of {len(PROPERTIES)} "
        f"properties hold, {checks - failed:,} of {checks:,} checks"
        f"{'; failed: ' if failed else ''}{'; '.join(failed_of)}."
    )


def page(rows: Mapping[str, Row], command: str) -> str:
    """Returns the certificate in Markdown: the claims, the machine, and all results."""
    made = environment()
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    failed = failures(rows)
    checks = sum(cell.applies for row in rows.values() for cell in row.values())
    verdict = "all pass" if not failed else f"**{len(failed)} fail**"
    dashes = {cell.reason for row in rows.values() for cell in row.values() if not cell.applies}
    largest = {
        name: max((row[name].error for row in rows.values() if row[name].applies), default=0.0)
        for name in PROPERTIES
    }
    properties = [
        f"| {name} | {each.claim} | {Cell(largest[name], 0)} | {each.tolerance:g} |"
        for name, each in PROPERTIES.items()
    ]
    table = [
        f"| `{variant}` | " + " | ".join(map(_markdown, row.values())) + " |"
        for variant, row in rows.items()
    ]
    return "\n".join(
        [
            "# Certificate",
            "",
            f"`{command}`: {len(rows)} variants, {checks} checks, {verdict}.",
            "",
            f"{versions}; {made['device']}; {made['machine']}.",
            "",
            f"Each variant is run in tiny shapes (context {BASE.context_length}, width "
            f"{BASE.width} and more, {ROWS} rows) with random parameters. An error is the largest "
            "difference over the largest value, of logits or of the loss and its gradient; for "
            "`rounded`, of the gradient and the logits as vectors, and for a mixture of experts of "
            "the loss. `scanned`, `remat`, `chunked`, `accumulated` and `sharded` are one compiled "
            "step that is all five, and each alone if that fails. `parameters` are of the variant "
            "in its own size.",
            "",
            "| property | what equals what | largest error | tolerance |",
            "|---|---|---|---|",
            *properties,
            "",
            f"A dash: {'; '.join(sorted(dashes))}." if dashes else "Every check applies.",
            "",
            f"| variant | {' | '.join(PROPERTIES)} |",
            "|---|" + "---|" * len(PROPERTIES),
            *table,
            *(["", *(f"- {sentence}" for sentence in failed)] if failed else []),
            "",
            "Not in the grid:",
            "",
            *(f"- `{name}`: {reason}." for name, reason in OUTSIDE.items()),
        ]
    )


def _markdown(cell: Cell) -> str:
    return str(cell) if cell.passed else f"**{cell}**"
