"""The plan of a comparison: matched models, budgets in steps, and all runs of the grid."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gptjax.compare.plan import costs
from gptjax.compare.plan.data import SharedData, open_shared_data
from gptjax.compare.plan.matching import MEASURE, match_seconds, match_width, resized
from gptjax.compare.plan.runs import GridRun
from gptjax.compare.plan.timings import Timings
from gptjax.compare.plan.variants import Variant, read_variants
from gptjax.compare.question import BUDGETS, MEASURES, Comparison, parse_quantity, quantity
from gptjax.config import (
    ExperimentConfig,
    InputError,
    TrainConfig,
    TransformerConfig,
    from_dict,
    to_dict,
)
from gptjax.costs.model import model_cost
from gptjax.parallel.sharding import configure_cpu
from gptjax.system.memory import check_batch_fits, check_fits
from gptjax.system.programs import keep_programs

SEARCH_SEED = 1 << 16
"""First seed of the learning-rate search; those of the compared runs count from 0."""
TIMINGS = "measured.json"
ENDLESS = 1 << 30
"""Steps of a config whose step is timed before the number of steps is known."""


class Planned(NamedTuple):
    """A matched variant at a size, before its learning rate is chosen."""

    variant: Variant
    size: str
    model: TransformerConfig
    target: float | None
    """Target value of the matched measure; None where nothing is matched."""
    reached: float | None
    steps: int


class Plan(NamedTuple):
    """Everything that is to be trained."""

    comparison: Comparison
    data: SharedData
    sizes: tuple[str, ...]
    planned: list[Planned]
    """By size, then by variant; the first of each size is the baseline."""
    timings: Timings

    def search(self, planned: Planned) -> list[GridRun]:
        """Returns the runs that choose a variant's learning rate; none if there is no choice."""
        comparison = self.comparison
        if planned.variant.fixed_rate or len(comparison.rates) == 1:
            return []
        model = self._search_model(planned)
        return [
            GridRun(
                planned.variant.name,
                planned.size,
                "search",
                self._config(planned, rate, seed, model),
            )
            for rate in comparison.rates
            for seed in range(SEARCH_SEED, SEARCH_SEED + comparison.search_seeds)
        ]

    def finals(self, planned: Planned, rate: float) -> list[GridRun]:
        """Returns the runs that are compared."""
        base = None if planned.variant.fixed_rate else self._search_model(planned)
        if base == planned.model:
            base = None
        return [
            GridRun(
                planned.variant.name,
                planned.size,
                "final",
                self._config(planned, rate, seed, planned.model),
                base,
            )
            for seed in range(self.comparison.seeds)
        ]

    def example(self, planned: Planned) -> ExperimentConfig:
        """Returns the config of a run, at the first learning rate."""
        return self._config(planned, self.comparison.rates[0], 0, planned.model)

    def _search_model(self, planned: Planned) -> TransformerConfig:
        width = self.comparison.mup_width
        return resized(planned.model, width) if width else planned.model

    def _config(
        self, planned: Planned, rate: float, seed: int, model: TransformerConfig
    ) -> ExperimentConfig:
        comparison, optimizer = self.comparison, planned.variant.optimizer
        if not planned.variant.fixed_rate:
            optimizer = dataclasses.replace(optimizer, learning_rate=rate)
        every = max(1, planned.steps // comparison.evaluations)
        return ExperimentConfig(
            model=model,
            data=comparison.data,
            optimizer=optimizer,
            train=TrainConfig(
                steps=planned.steps,
                batch_size=comparison.batch_size,
                seed=seed,
                log_every=every,
                eval_every=every,
                checkpoint_every=every,
            ),
        )


def make_plan(comparison: Comparison, out: Path) -> Plan:
    """Read the variants, open the data, match the models and compute the steps.

    Raises:
      InputError: an invalid flag, a match that cannot be reached, or a budget too small.
    """
    variants = read_variants(comparison.variants, comparison)
    budget, amounts = parse_quantity("budget", comparison.budget, BUDGETS)
    if len(amounts) != 1:
        raise InputError(f"--budget is {comparison.budget!r}: it must be one amount, as tokens=1M.")
    measure, targets = _targets(comparison)
    for variant in variants:
        if comparison.mup_width and variant.optimizer.name == "muon":
            raise InputError(
                f"--mup-width is {comparison.mup_width}: with {variant.name} it must be 0, since "
                "Muon's updates do not grow with the width and its rate is not searched."
            )
    check_batch_fits(
        comparison.batch_size, comparison.context_length or variants[0].model.context_length
    )
    data = open_shared_data(comparison, variants[0].model)
    vocabulary = data.corpus.vocabulary.size
    variants = [
        variant._replace(model=dataclasses.replace(variant.model, vocab_size=vocabulary))
        for variant in variants
    ]
    sizes, planned = [], []
    for target in targets or (None,):
        sizes.append(f"{measure}={quantity(target)}" if comparison.scale and target else "")
        if target and measure in MEASURE:
            for variant in variants:
                _check_reachable(variant.model, measure, target)
        planned += _matched(variants, sizes[-1], measure, target, comparison)
    states = (sum(model_cost(each.model).state_bytes.values()) for each in planned)
    check_fits("The training state of the largest variant", max(states))
    # JAX is initialised from here on, not before.
    configure_cpu(max(model_cost(each.model).parameters for each in planned))
    keep_programs()
    plan = Plan(comparison, data, tuple(sizes), planned, Timings(out / TIMINGS))
    if measure == "seconds":
        plan = plan._replace(planned=_matched_seconds(plan))
    steps = _steps(plan, budget, amounts[0])
    return plan._replace(
        planned=[
            each._replace(steps=count) for each, count in zip(plan.planned, steps, strict=True)
        ]
    )


def _check_reachable(model: TransformerConfig, measure: str, target: float) -> None:
    """Refuse a target beyond the widest model that fits in memory, before searching for it.

    Raises:
      InputError: it is beyond.
    """
    while MEASURE[measure](model) < target:
        state = sum(model_cost(model).state_bytes.values())
        check_fits(f"A model whose {measure} are {target:.3g}", state)
        model = resized(model, 2 * model.width)


def _targets(comparison: Comparison) -> tuple[str, tuple[float, ...]]:
    """Returns the matched measure and its targets; without targets, the baseline's value is taken.

    Raises:
      InputError: flags that cannot be read, or that contradict each other.
    """
    if comparison.scale:
        measure, targets = parse_quantity("scale", comparison.scale, tuple(MEASURE))
        if not targets:
            raise InputError(
                f"--scale is {comparison.scale!r}: it must give sizes, as params=0.3M,1M,3M."
            )
        return measure, targets
    measure, targets = parse_quantity("match", comparison.match, (*MEASURES, "none"))
    if len(targets) > (measure in MEASURE):
        accepted = "one amount; --scale takes several" if measure in MEASURE else "no amount"
        raise InputError(f"--match is {comparison.match!r}: {measure} takes {accepted}.")
    return measure, targets


def _matched(
    variants: Sequence[Variant],
    size: str,
    measure: str,
    target: float | None,
    comparison: Comparison,
) -> list[Planned]:
    """Returns every variant matched by counts; matching by seconds begins at equal FLOPs."""
    if measure == "none":
        return [Planned(variant, size, variant.model, None, None, 0) for variant in variants]
    count = MEASURE["flops" if measure == "seconds" else measure]
    planned = []
    for variant in variants:
        goal = target or count(variants[0].model)
        try:
            model, reached = match_width(variant.model, count, goal, comparison.tolerance)
        except InputError as error:
            raise InputError(f"{variant.name} cannot be matched: {error}") from error
        planned.append(Planned(variant, size, model, goal, reached, 0))
    return planned


def _matched_seconds(plan: Plan) -> list[Planned]:
    """Returns every variant matched to the baseline's measured step time."""
    batch = next(plan.data.batches(0))

    def ratios(models: Sequence[TransformerConfig]) -> list[float]:
        configs = [
            plan.example(each._replace(model=model, steps=ENDLESS))
            for each, model in zip(plan.planned, models, strict=True)
        ]
        seconds = costs.seconds_per_step(configs, batch)
        return [each / seconds[0] for each in seconds]

    def matched() -> list[dict]:
        models = {each.variant.name: each.variant.model for each in plan.planned}
        found = match_seconds(models, ratios, plan.comparison.tolerance)
        return [{"model": to_dict(each.model), "reached": each.reached} for each in found]

    of = [
        to_dict(plan.example(each._replace(model=each.variant.model, steps=ENDLESS)))
        for each in plan.planned
    ]
    known = plan.timings.get_or_measure("match seconds", [of, plan.comparison.tolerance], matched)
    return [
        each._replace(
            model=from_dict(TransformerConfig, found["model"], TIMINGS),
            target=1.0,
            reached=found["reached"],
        )
        for each, found in zip(plan.planned, known, strict=True)
    ]


def _steps(plan: Plan, budget: str, amount: float) -> list[int]:
    """Returns how many steps each variant's budget allows.

    Raises:
      InputError: fewer steps than evaluations.
    """
    tokens, planned = plan.data.tokens_per_step, plan.planned
    if budget == "seconds":
        batch = next(plan.data.batches(0))
        configs = [plan.example(each._replace(steps=ENDLESS)) for each in planned]
        each_takes = plan.timings.get_or_measure(
            "seconds per step",
            [to_dict(config) for config in configs],
            lambda: costs.seconds_per_step(configs, batch),
        )
    elif budget == "flops":
        each_takes = [tokens * model_cost(each.model).training_flops for each in planned]
    else:
        each_takes = [tokens] * len(planned)
    steps = [int(amount / taken) for taken in each_takes]
    for each, count in zip(planned, steps, strict=True):
        if count < plan.comparison.evaluations:
            raise InputError(
                f"--budget is {plan.comparison.budget!r}: for {each.variant.name} that is {count} "
                f"steps of {tokens:,} tokens, too small for {plan.comparison.evaluations} "
                "evaluations (--evaluations)."
            )
    return steps
