"""The width at which a variant has what the others have: parameters, FLOPs or measured seconds.

The depth and all choices stay; width, heads, their width and the feed-forward width are solved for:

- Width and hidden are multiples of a step, 128 where that will do, else 64, 32 … 1: the coarsest
  step that comes within the tolerance wins, since hardware multiplies whole tiles.
- Width is a multiple of the step that can be parted into heads; what is then missing, hidden makes
  up for, in which every count is linear. Of all widths the one that changes hidden / width least
  wins; it changes by no more than a quarter.
- Heads divide the width and have an even width, the nearest to the preset's; there are at least 4,
  or as many as the preset has. As many query heads as before share a key head, and one that is
  shared by all stays one.
- An LSTM has its width alone.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from gptjax.config import InputError, TransformerConfig
from gptjax.costs.model import model_cost

Measure = Callable[[TransformerConfig], float]

MEASURE: dict[str, Measure] = {
    "params": lambda model: model_cost(model).parameters,
    "flops": lambda model: model_cost(model).training_flops,
}
"""What can be matched by counting: parameters, and training FLOPs per token."""

STEPS = (128, 64, 32, 16, 8, 4, 2, 1)
DISTORTION = 5 / 4
"""How many times larger or smaller hidden / width may become."""
LEAST_HEADS = 4
NEIGHBOURS = 2
"""Widths that are tried on both sides of the one whose hidden need not change."""
ROUNDS = 6
"""Of measuring seconds, after each of which widths are corrected."""


class Matched(NamedTuple):
    """A variant at the width where it has what was asked for, or nearly."""

    model: TransformerConfig
    reached: float
    """What it has of what is matched: parameters, FLOPs; seconds over the first model's."""


def match_width(
    model: TransformerConfig, measure: Measure, target: float, tolerance: float
) -> Matched:
    """The model in the size where `measure` is the target; itself, if it is near enough.

    Args:
      model: with its vocabulary, which counts.
      measure: grows with width and hidden; one of `MEASURE`.
      target: what `measure` is to return.
      tolerance: the share of the target by which it may be missed.

    Raises:
      InputError: no width comes near enough; how near the nearest comes is said.
    """
    nearest = _nearest(model, measure, target, tolerance)
    off = _off(nearest, target)
    if off > tolerance:
        width, hidden = nearest.model.width, nearest.model.actual_mlp_dim
        size = f"width {width}" + f" and hidden {hidden}" * (model.family != "recurrent")
        raise InputError(
            f"no width comes within {100 * tolerance:g}% of {target:,.0f}: the nearest, {size}, "
            f"has {nearest.reached:,.0f} and is {off:.1%} off{_enough(off)}."
        )
    return nearest


def match_seconds(
    models: Mapping[str, TransformerConfig],
    ratios: Callable[[Sequence[TransformerConfig]], list[float]],
    tolerance: float,
) -> list[Matched]:
    """Every model in the size where a step of it takes as long as one of the first.

    They begin with equal FLOPs; what is too slow then gets fewer, by as much as it was measured.

    Args:
      models: of each variant; the first keeps its size.
      ratios: measures models in turn and returns the seconds of each over those of the first.
      tolerance: how far from 1 a ratio may be.

    Raises:
      InputError: a model that comes no nearer in `ROUNDS` rounds; how near it came is said.
    """
    flops = MEASURE["flops"]
    first, *others = models.values()
    goals = [flops(first)] * len(models)
    current = [first, *others]
    best = [Matched(first, 1.0), *(Matched(model, math.inf) for model in others)]
    for _ in range(ROUNDS):
        for index, (model, goal) in enumerate(zip(models.values(), goals, strict=True)):
            if _off(best[index], 1.0) > tolerance:
                current[index] = _nearest(model, flops, goal, tolerance).model
        measured = ratios(current)
        for index, ratio in enumerate(measured):
            best[index] = min(
                best[index], Matched(current[index], ratio), key=lambda each: _off(each, 1.0)
            )
            goals[index] = flops(current[index]) / ratio
        if all(_off(each, 1.0) <= tolerance for each in best):
            return best
    name, worst = max(zip(models, best, strict=True), key=lambda each: _off(each[1], 1.0))
    off = _off(worst, 1.0)
    raise InputError(
        f"{name} cannot be matched: measured {ROUNDS} times, it comes no nearer than {off:.1%} to "
        f"the seconds of {next(iter(models))}, with width {worst.model.width}{_enough(off)}."
    )


def resized(model: TransformerConfig, width: int) -> TransformerConfig:
    """The model with another width, and with heads and hidden in proportion.

    Raises:
      InputError: a width that cannot be parted into heads as many as needed, or that the config
        refuses.
    """
    unit = _unit(model, 1)
    if width % unit:
        raise InputError(
            f"A width of {width} leaves no heads for this model: it must be a multiple of {unit}."
        )
    return _with(model, width, round(model.actual_mlp_dim * width / model.width))


def _enough(off: float) -> str:
    return f"; --tolerance {math.ceil(1e3 * off) / 1e3:g} would take it" * (off < 0.999)


def _off(matched: Matched, target: float) -> float:
    return abs(matched.reached / target - 1)


def _nearest(
    model: TransformerConfig, measure: Measure, target: float, tolerance: float
) -> Matched:
    """The size that comes within the tolerance by the rules above; if none does, the nearest."""
    nearest = Matched(model, measure(model))
    if _off(nearest, target) <= tolerance:
        return nearest
    for step in STEPS:
        found = [Matched(each, measure(each)) for each in _candidates(model, measure, target, step)]
        near = [each for each in found if _off(each, target) <= tolerance]
        if near:
            return min(near, key=lambda each: (_distortion(each.model, model), _off(each, target)))
        nearest = min([nearest, *found], key=lambda each: _off(each, target))
    return nearest


def _distortion(model: TransformerConfig, original: TransformerConfig) -> float:
    """How far hidden / width is from the original's, in logarithms; 0 is not at all."""
    ratio = model.actual_mlp_dim * original.width / (original.actual_mlp_dim * model.width)
    return abs(math.log(ratio))


def _candidates(
    model: TransformerConfig, measure: Measure, target: float, step: int
) -> Iterator[TransformerConfig]:
    """Models in multiples of the step near the target, one or two a width."""
    unit = _unit(model, step)
    middle = _first_reaching(model, measure, target, unit)
    for count in range(max(1, middle - NEIGHBOURS), middle + NEIGHBOURS + 1):
        width = count * unit
        for hidden in _hidden(model, measure, target, step, width):
            candidate = _valid(model, width, hidden)
            if candidate:
                yield candidate


def _unit(model: TransformerConfig, step: int) -> int:
    """The least multiple of the step that has heads, of which all widths are multiples."""
    if model.family == "recurrent":
        return step
    return math.lcm(step, 2 * _least_heads(model))


def _least_heads(model: TransformerConfig) -> int:
    sharing = _sharing(model)
    return math.ceil(min(model.heads, LEAST_HEADS) / sharing) * sharing


def _sharing(model: TransformerConfig) -> int:
    """What heads are a multiple of: the query heads of a key head, unless that is one for all."""
    return 1 if model.actual_kv_heads == 1 else model.heads // model.actual_kv_heads


def _first_reaching(model: TransformerConfig, measure: Measure, target: float, unit: int) -> int:
    """How many units of width reach the target, hidden in proportion."""

    def reaches(count: int) -> bool:
        width = count * unit
        candidate = _valid(model, width, round(model.actual_mlp_dim * width / model.width))
        return candidate is not None and measure(candidate) >= target

    high = 1
    while not reaches(high):
        high *= 2
    return bisect.bisect_left(range(high), True, lo=1, key=reaches)


def _hidden(
    model: TransformerConfig, measure: Measure, target: float, step: int, width: int
) -> set[int]:
    """The multiples of the step nearest to the model's proportion, and to the target."""
    if model.family == "recurrent":
        return {model.mlp_dim}
    exact = model.actual_mlp_dim * width / model.width / step
    least, most = math.ceil(exact / DISTORTION), math.floor(exact * DISTORTION)
    ends = [_valid(model, width, count * step) for count in (least, most + 1)]
    if least > most or not all(ends):
        return set()
    low, high = (measure(end) for end in ends if end)
    solved = least + (target - low) / (high - low) * (most + 1 - least)
    return {step * min(max(round(count), least), most) for count in (exact, solved)}


def _valid(model: TransformerConfig, width: int, hidden: int) -> TransformerConfig | None:
    """The model in another size; None where the config refuses that."""
    try:
        return _with(model, width, hidden)
    except InputError:
        return None


def _with(model: TransformerConfig, width: int, hidden: int) -> TransformerConfig:
    """The model in another size: its heads as the module says, for a multiple of `_unit`."""
    if model.family == "recurrent":
        heads = math.gcd(width, model.heads)  # It has none, but they must divide the width.
        return dataclasses.replace(model, width=width, heads=heads)
    least, sharing, inner = (
        _least_heads(model),
        _sharing(model),
        model.heads * model.actual_head_dim,
    )
    if inner == model.width:
        fitting = (n for n in range(least, width // 2 + 1, sharing) if width % (2 * n) == 0)
        heads = min(fitting, key=lambda n: abs(math.log(width / n / model.actual_head_dim)))
        head_dim = 0
    else:
        inner = inner * width / model.width
        heads = max(least, sharing * round(inner / model.actual_head_dim / sharing))
        head_dim = 2 * max(1, round(inner / heads / 2))
    return dataclasses.replace(
        model,
        width=width,
        heads=heads,
        kv_heads=model.kv_heads and (1 if model.kv_heads == 1 else heads // sharing),
        head_dim=head_dim,
        mlp_dim=0 if model.mlp_dim == 0 and hidden == 4 * width else hidden,
    )
