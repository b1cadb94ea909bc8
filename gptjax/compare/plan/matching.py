"""Solve for the width at which a variant matches others in parameters, FLOPs or step time.

The depth and all choices stay; width, heads, head_dim and mlp_dim are solved for:

- width and mlp_dim are multiples of a step, 128 if possible, else 64, 32 … 1: the coarsest step
  within the tolerance wins, since hardware multiplies whole tiles.
- width is a multiple of the step that splits into heads; mlp_dim, in which every count is linear,
  makes up the rest. The width that changes mlp_dim / width least wins; the ratio changes by a
  quarter at most.
- Heads divide the width; head_dim is even, the nearest to the preset's; there are at least 4 heads,
  or as many as the preset has. Grouped-query attention keeps its group size, and multi-query
  attention its single key/value head.
- An LSTM has only its width.
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
"""Largest factor by which mlp_dim / width may change."""
LEAST_HEADS = 4
NEIGHBOURS = 2
"""Widths tried on both sides of the one at which mlp_dim / width need not change."""
ROUNDS = 6
"""Rounds of timing, after each of which widths are corrected."""


class Matched(NamedTuple):
    """A model whose width is matched, within the tolerance or nearly."""

    model: TransformerConfig
    reached: float
    """Its value of the measure: parameters, FLOPs, or step time over the first model's."""


def match_width(
    model: TransformerConfig, measure: Measure, target: float, tolerance: float
) -> Matched:
    """Returns the model resized so that `measure` is the target; unchanged if near enough.

    Args:
      model: with its vocabulary size, which counts.
      measure: grows with width and mlp_dim; one of `MEASURE`.
      target: value of `measure`.
      tolerance: relative.

    Raises:
      InputError: no width is within the tolerance; the message has the nearest.
    """
    nearest = _nearest(model, measure, target, tolerance)
    off = _off(nearest, target)
    if off > tolerance:
        width, mlp_dim = nearest.model.width, nearest.model.actual_mlp_dim
        size = f"width {width}" + f" and mlp_dim {mlp_dim}" * (model.family != "recurrent")
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
    """Returns every model resized so that its step takes as long as that of the first.

    They begin with equal FLOPs; slower ones then get fewer, in proportion to the measured ratio.

    Args:
      models: by variant; the first keeps its size.
      ratios: times models in turn and returns the step time of each over that of the first.
      tolerance: deviation of a ratio from 1.

    Raises:
      InputError: a model off the tolerance after `ROUNDS` rounds; the message has the nearest.
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
    """Returns the model with another width, with heads and mlp_dim in proportion.

    Raises:
      InputError: a width that cannot be split into enough heads, or that the config refuses.
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
    """Returns the size within the tolerance by the rules above; if there is none, the nearest."""
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
    """Returns the absolute log ratio of mlp_dim / width to the original's; 0 is unchanged."""
    ratio = model.actual_mlp_dim * original.width / (original.actual_mlp_dim * model.width)
    return abs(math.log(ratio))


def _candidates(
    model: TransformerConfig, measure: Measure, target: float, step: int
) -> Iterator[TransformerConfig]:
    """Yields models in multiples of the step near the target, one or two per width."""
    unit = _unit(model, step)
    middle = _first_reaching(model, measure, target, unit)
    for count in range(max(1, middle - NEIGHBOURS), middle + NEIGHBOURS + 1):
        width = count * unit
        for mlp_dim in _mlp_dims(model, measure, target, step, width):
            candidate = _valid(model, width, mlp_dim)
            if candidate:
                yield candidate


def _unit(model: TransformerConfig, step: int) -> int:
    """Returns the unit of all widths: the least multiple of the step that splits into heads."""
    if model.family == "recurrent":
        return step
    return math.lcm(step, 2 * _least_heads(model))


def _least_heads(model: TransformerConfig) -> int:
    sharing = _sharing(model)
    return math.ceil(min(model.heads, LEAST_HEADS) / sharing) * sharing


def _sharing(model: TransformerConfig) -> int:
    """Returns what heads are a multiple of: the query heads per key head; 1 for multi-query."""
    return 1 if model.actual_kv_heads == 1 else model.heads // model.actual_kv_heads


def _first_reaching(model: TransformerConfig, measure: Measure, target: float, unit: int) -> int:
    """Returns how many units of width reach the target, with mlp_dim in proportion."""

    def reaches(count: int) -> bool:
        width = count * unit
        candidate = _valid(model, width, round(model.actual_mlp_dim * width / model.width))
        return candidate is not None and measure(candidate) >= target

    high = 1
    while not reaches(high):
        high *= 2
    return bisect.bisect_left(range(high), True, lo=1, key=reaches)


def _mlp_dims(
    model: TransformerConfig, measure: Measure, target: float, step: int, width: int
) -> set[int]:
    """Returns the multiples of the step nearest to the model's ratio, and to the target."""
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


def _valid(model: TransformerConfig, width: int, mlp_dim: int) -> TransformerConfig | None:
    """Returns the resized model; None if the config refuses it."""
    try:
        return _with(model, width, mlp_dim)
    except InputError:
        return None


def _with(model: TransformerConfig, width: int, mlp_dim: int) -> TransformerConfig:
    """Returns the resized model, heads by the module's rules; width is a multiple of `_unit`."""
    if model.family == "recurrent":
        heads = math.gcd(
            width, model.heads
        )  # It has no heads, but the config's must divide the width.
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
        mlp_dim=0 if model.mlp_dim == 0 and mlp_dim == 4 * width else mlp_dim,
    )
