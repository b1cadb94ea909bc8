"""Answers that no run gave, for the report to be tried on."""

import dataclasses
from typing import Any

import numpy as np

from gptjax.compare.question import Comparison
from gptjax.compare.results import Answer, Costs, Entry, Outcome
from gptjax.config import OptimizerConfig, TransformerConfig

BASELINE = "gpt2"
EFFECTS = {
    BASELINE: 0.0,
    "llama-style": -0.05,
    "gpt2:position_embedding=alibi": 0.0005,
    "post-norm": 0.06,
}
CHANGES: dict[str, dict[str, Any]] = {
    "llama-style": {"norm": "rmsnorm", "activation": "swiglu", "position_embedding": "rotary"},
    "gpt2:position_embedding=alibi": {"position_embedding": "alibi"},
    "post-norm": {"norm_placement": "post"},
}
RATES = (1e-3, 3e-3, 1e-2)
STEPS, TOKENS = 100, 204_800
CURVE = tuple(range(10, STEPS + 1, 10))


def outcome(
    variant: str,
    seed: int,
    loss: float | None,
    *,
    size: str = "",
    rate: float = 3e-3,
    **fields: Any,
) -> Outcome:
    """A run that ended with a loss, or failed."""
    rng = np.random.default_rng(seed)
    last = 2.0 if loss is None else loss
    falling = last + 3 * np.exp(-np.array(CURVE) / 15) + 0.01 * rng.normal(size=len(CURVE))
    falling[-1] = last
    known: dict[str, Any] = {
        "purpose": "final",
        "steps": STEPS,
        "tokens": TOKENS,
        "curve_steps": CURVE if loss is not None else (),
        "curve_losses": tuple(map(float, falling)) if loss is not None else (),
        "seconds": 12.5,
        "error": "" if loss is not None else "the loss was not finite at step 31.",
        "directory": f"runs/{variant}-{size}-{rate:g}-{seed}",
    }
    return Outcome(
        variant, size, seed=seed, learning_rate=rate, validation_loss=loss, **{**known, **fields}
    )


def entry(
    variant: str,
    effect: float,
    seeds: int,
    *,
    size: str = "",
    scale: float = 1.0,
    rate: float = 3e-3,
) -> Entry:
    """A variant, that far from the baseline, each seed with its own luck."""
    rng = np.random.default_rng(sum(map(ord, variant)))
    loss = 2.0 * scale**-0.1 + effect
    shared = 0.02 * np.random.default_rng(7).normal(size=seeds)
    finals = tuple(
        outcome(
            variant, seed, float(loss + shared[seed] + 0.004 * rng.normal()), size=size, rate=rate
        )
        for seed in range(seeds)
    )
    search = {each: (loss + abs(np.log10(each / rate)), loss + 0.01) for each in RATES}
    return Entry(
        variant=variant,
        size=size,
        model=TransformerConfig(vocab_size=256, width=64, **CHANGES.get(variant, {})),
        optimizer=OptimizerConfig(learning_rate=rate),
        parameters=int(300_000 * scale) + len(variant),
        training_flops=int(1_900_000 * scale * (1.1 if "llama" in variant else 1)),
        target=None if variant == BASELINE else 300_000 * scale,
        reached=None if variant == BASELINE else 300_000 * scale + len(variant),
        steps=STEPS,
        searched=search,
        finals=finals,
        costs=Costs(40_000 / scale * (1 + effect), 12 << 20, 3.25, 900.0, 11 << 20),
    )


def answer(
    entries: list[Entry], *, seeds: int, sizes: tuple[str, ...] = ("",), **asked: Any
) -> Answer:
    """All that the entries ran, as the answer of a comparison."""
    searches = [
        outcome(each.variant, 100 + seed, loss, size=each.size, rate=rate, purpose="search")
        for each in entries
        for rate, losses in each.searched.items()
        for seed, loss in enumerate(losses)
    ]
    finals = [run for each in entries for run in each.finals]
    return Answer(
        comparison=Comparison(
            variants=tuple(dict.fromkeys(each.variant for each in entries)),
            budget="tokens=0.2M",
            rates=RATES,
            seeds=seeds,
            **asked,
        ),
        command="python experiments/compare.py --variants gpt2 llama-style --seeds 5",
        commit="0123456789abcdef0123456789abcdef01234567",
        environment={
            "versions": {"jax": "0.10.2", "flax": "0.12.8"},
            "device": "1 × cpu",
            "machine": "Linux-6-x86_64",
        },
        data="embedded, 1,000,000 bytes trained on, 100,000 held out",
        sizes=sizes,
        entries=tuple(entries),
        outcomes=(*searches, *finals),
        notes=("The memory of a TPU was not asked for: there is no libtpu.",),
        seconds=4321.5,
    )


def usual() -> Answer:
    """Five seeds; one better, one worse, one open, one at the edge of its grid, one that failed."""
    entries = [entry(variant, effect, 5) for variant, effect in EFFECTS.items()]
    entries[3] = dataclasses.replace(entry("post-norm", 0.06, 5, rate=RATES[0]), costs=None)
    failed = entry("lstm", 0.3, 5)
    runs = tuple(outcome("lstm", run.seed, None) for run in failed.finals)
    search = {rate: (None, 3.5) if rate > 1e-3 else (None, None) for rate in RATES}
    failed = dataclasses.replace(failed, finals=runs, searched=search)
    return answer([*entries, failed], seeds=5)


def one_seed() -> Answer:
    """Of which nothing can be said."""
    return answer([entry(variant, effect, 1) for variant, effect in EFFECTS.items()], seeds=1)


def alone() -> Answer:
    """Of the baseline and nothing else."""
    return answer([entry(BASELINE, 0.0, 5)], seeds=5)


def two_sizes() -> Answer:
    """Of --scale, where llama-style is ahead at one size, and behind at the other."""
    sizes = {"params=0.3M": 1.0, "params=1M": 10 / 3}
    entries = [
        entry(variant, effect * (1 if scale == 1 else -1), 3, size=size, scale=scale)
        for size, scale in sizes.items()
        for variant, effect in EFFECTS.items()
    ]
    return answer(entries, seeds=3, sizes=tuple(sizes), scale="params=0.3M,1M")


def four_sizes() -> Answer:
    """Of --scale, where the law of llama-style crosses the baseline's among what was measured."""
    sizes = {"params=0.3M": 1.0, "params=1M": 10 / 3, "params=3M": 10.0, "params=10M": 100 / 3}
    entries = [
        entry(variant, EFFECTS[variant] * (1 - np.log10(scale)), 3, size=size, scale=scale)
        for size, scale in sizes.items()
        for variant in (BASELINE, "llama-style")
    ]
    return answer(entries, seeds=3, sizes=tuple(sizes), scale="params=0.3M,1M,3M,10M")


def withheld() -> Answer:
    """A variant that is ahead on the seeds that it survived."""
    survivor = entry("llama-style", -0.05, 5)
    runs = (outcome("llama-style", 0, None), *survivor.finals[1:])
    survivor = dataclasses.replace(survivor, finals=runs)
    return answer([entry(BASELINE, 0.0, 5), survivor], seeds=5)


def no_baseline() -> Answer:
    """Of which no run of the baseline finished, and no cost is known."""
    failed = tuple(outcome(BASELINE, seed, None) for seed in range(5))
    first = dataclasses.replace(entry(BASELINE, 0.0, 5), finals=failed, costs=None)
    return answer([first, dataclasses.replace(entry("llama-style", 0, 5), costs=None)], seeds=5)


def named(name: str) -> Answer:
    """A variant of that name, in all that a user gives."""
    whole = answer([entry(BASELINE, 0.0, 2), entry(name, 0.1, 2)], seeds=2)
    failed = outcome(name, 2, None, error=f"{name} failed.", directory=f"runs/{name}")
    return dataclasses.replace(
        whole,
        command=name,
        data=name,
        notes=(f"{name} was not matched.",),
        environment={"device": name, "versions": {name: name}},
        outcomes=(*whole.outcomes, failed),
    )


def many() -> Answer:
    """Twelve variants with long names."""
    names = [f"gpt2:activation=swiglu,norm=rmsnorm,heads={n}" for n in range(11)]
    entries = [entry(BASELINE, 0.0, 5)]
    entries += [entry(name, 0.006 * (n - 5), 5) for n, name in enumerate(names)]
    return answer(entries, seeds=5)
