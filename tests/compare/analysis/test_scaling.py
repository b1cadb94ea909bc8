import functools
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import optimize

from gptjax.compare.analysis.scaling import Law, crossings, fit_law, laws, unfitted
from gptjax.compare.question import Comparison
from gptjax.compare.results import Answer, Entry, Outcome
from gptjax.config import InputError, OptimizerConfig, TransformerConfig

SIZES = (3e5, 1e6, 3e6, 1e7)
TRUTH = (1.5, 30.0, 0.25)


def curve(counts: np.ndarray | float, truth: tuple[float, float, float] = TRUTH) -> np.ndarray:
    floor, scale, exponent = truth
    return floor + scale * np.asarray(counts) ** -exponent


def points(
    seeds: int,
    noise: float,
    *,
    sizes: Sequence[float] = SIZES,
    truth: tuple[float, float, float] = TRUTH,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N, L and D of runs that scatter about a known law."""
    counts = np.repeat(sizes, seeds)
    scatter = np.random.default_rng(seed).normal(0, noise, len(counts))
    return counts, curve(counts, truth) * np.exp(scatter), np.full(len(counts), 1e7)


@functools.cache
def noisy() -> Law:
    return fit_law(*points(5, 0.004))


def test_a_law_without_noise_is_found():
    law = fit_law(*points(1, 0))
    np.testing.assert_allclose(list(law.coefficients.values()), TRUTH, rtol=1e-2)
    np.testing.assert_allclose(law.predict(1e8), curve(1e8), rtol=1e-4)
    assert law.largest_residual < 1e-4
    assert law.notes == ("No size has two seeds: the uncertainty of the curve is unknown.",)
    assert np.all(np.isnan(law.predict_interval(np.array(SIZES))))


def test_a_law_is_found_in_noise_and_its_intervals_hold_it():
    law = noisy()
    assert list(law.coefficients) == ["E", "A", "alpha"]
    assert law.resamples.shape == (200, 3)
    for truth, (low, high) in zip(TRUTH, law.intervals.values(), strict=True):
        assert low < truth < high
    inside = np.geomspace(SIZES[0], SIZES[-1], 9)
    np.testing.assert_allclose(law.predict(inside), curve(inside), rtol=0.005)
    low, high = law.predict_interval(inside)
    assert np.all(high - low < 0.05)
    low, high = law.predict_interval(np.array([1e7, 1e9]))
    assert high[1] - low[1] > 2 * (high[0] - low[0])  # What is far is known less.


def test_the_same_question_has_the_same_answer():
    again = fit_law(*points(5, 0.004))
    assert again.intervals == noisy().intervals
    other = fit_law(*points(5, 0.004), seed=1, resamples=20)
    assert other.coefficients == noisy().coefficients
    assert other.intervals != noisy().intervals


def test_the_fit_is_the_least_of_its_loss():
    counts, losses, tokens = points(3, 0.01, seed=3)
    law = fit_law(counts, losses, tokens, resamples=1)

    def cost(logs: np.ndarray) -> float:
        residuals = np.abs(np.log(curve(counts, tuple(np.exp(logs)))) - np.log(losses))
        huber = np.where(residuals < 0.01, residuals**2 / 2, 0.01 * (residuals - 0.005))
        return float(1e4 * np.sum(huber))

    fitted = np.log(list(law.coefficients.values()))
    searched = optimize.minimize(
        cost, np.log(TRUTH), method="Nelder-Mead", options={"maxfev": 4000}
    )
    assert cost(fitted) < searched.fun * (1 + 1e-3)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    inside = np.array([5e5, 5e6])
    held = []
    for seed in range(25):
        law = fit_law(*points(5, 0.004, seed=seed), resamples=40, level=0.8)
        low, high = law.predict_interval(inside)
        held.append((low < curve(inside)) & (curve(inside) < high))
    assert 0.6 < np.mean(held) < 0.95  # Three standard errors, of 50 points that go in pairs.


def test_three_sizes_say_that_nothing_tests_their_law():
    law = fit_law(*points(5, 0.004, sizes=SIZES[:3]), resamples=50)
    assert law.notes[0].startswith("3 sizes for 3 coefficients: the curve can pass through all")
    assert law.largest_residual < 0.01
    assert np.ptp(law.intervals["E"]) > 1.5 * np.ptp(noisy().intervals["E"])


@pytest.mark.parametrize(
    ("sizes", "losses", "sentence"),
    [
        ([1e6, 1e7], [3.0, 2.0], "2 sizes finished: a law of E, A and alpha needs at least 3"),
        ([], [], "0 sizes finished"),
        ([1e5, 1e6, 1e7], [3.0, 2.0, 0.0], "The lowest loss is 0: log L needs losses above"),
    ],
)
def test_what_cannot_be_fitted_is_told(sizes, losses, sentence):
    with pytest.raises(InputError, match=sentence):
        fit_law(np.array(sizes), np.array(losses), np.full(len(sizes), 1e6))


def test_a_loss_that_rises_with_size_has_no_law():
    counts = np.array(SIZES)
    law = fit_law(counts, 2 + 0.1 * np.log10(counts), np.full(4, 1e6))
    assert "The loss does not fall with size: the exponent means nothing." in law.notes


def both(counts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return 1.5 + 30 * counts**-0.25 + 60 * tokens**-0.3


def test_parameters_and_tokens_are_told_apart_where_both_vary():
    counts, tokens = (
        axis.ravel() for axis in np.meshgrid(np.repeat(SIZES, 2), np.geomspace(1e6, 1e8, 4))
    )
    noise = np.random.default_rng(0).normal(0, 1e-4, len(counts))
    law = fit_law(counts, both(counts, tokens) * np.exp(noise), tokens, resamples=10)
    assert list(law.coefficients) == ["E", "A", "alpha", "B", "beta"]
    assert law.coefficients["alpha"] == pytest.approx(0.25, rel=0.1)
    assert law.coefficients["beta"] == pytest.approx(0.3, rel=0.1)
    assert law.predict(1e8, 1e9) == pytest.approx(both(np.array(1e8), np.array(1e9)), rel=0.02)
    assert law.notes == ()
    with pytest.raises(InputError, match="tokens is None"):
        law.predict(1e7)


def test_tokens_that_hardly_vary_at_a_size_leave_its_seeds_together():
    counts, losses, tokens = points(3, 0.004)
    law = fit_law(counts, losses, tokens * np.tile([1, 1.1, 1.2], 4), resamples=20)
    assert list(law.coefficients) == ["E", "A", "alpha"]
    assert law.resamples.shape == (20, 3)


def test_tokens_that_are_tied_to_size_are_not_told_apart():
    counts = np.array(SIZES)
    tokens = 20 * counts
    law = fit_law(counts, both(counts, tokens), tokens)
    assert list(law.coefficients) == ["E", "A", "alpha"]
    assert any(note.startswith("Its runs were trained on 6,000,000 to") for note in law.notes)


STEEP = (1.5, 30.0 * 2e6**0.05, 0.30)
"""Crosses TRUTH at N = 2e6, and is lower above."""


def test_two_curves_cross_where_they_do():
    steep = fit_law(*points(5, 0.002, truth=STEEP, seed=1))
    flat = fit_law(*points(5, 0.002, seed=2))
    (crossing,) = crossings(steep, flat, (SIZES[0], SIZES[-1]))
    assert crossing.parameters == pytest.approx(2e6, rel=0.3)
    assert crossing.better_above
    assert not crossing.extrapolated
    assert crossing.share > 0.9
    assert crossing.interval[0] < 2e6 < crossing.interval[1]
    (mirrored,) = crossings(flat, steep, (SIZES[0], SIZES[-1]))
    assert not mirrored.better_above
    assert mirrored.parameters == pytest.approx(crossing.parameters)


def test_a_crossing_beyond_what_was_measured_is_an_extrapolation():
    small = (3e4, 1e5, 3e5, 1e6)
    steep = fit_law(*points(1, 0, sizes=small, truth=STEEP))
    flat = fit_law(*points(1, 0, sizes=small))
    (crossing,) = crossings(steep, flat, (3e4, 1e7))
    assert crossing.extrapolated
    assert crossing.parameters == pytest.approx(2e6, rel=0.1)
    assert np.isnan([crossing.share, *crossing.interval]).all()
    assert crossings(steep, flat, (3e4, 1e6)) == []


def test_what_a_seed_does_to_both_drops_out_of_their_crossing():
    counts, losses, tokens = points(4, 0.01, seed=5)
    worse = fit_law(counts, 1.02 * losses, tokens, resamples=20)
    better = fit_law(counts, losses, tokens, resamples=20)
    np.testing.assert_allclose(
        worse.predict_interval(1e6), 1.02 * np.array(better.predict_interval(1e6)), rtol=1e-4
    )


def entry(variant: str, count: int, losses: Sequence[float | None]) -> Entry:
    finals = tuple(
        Outcome(
            variant=variant,
            size=f"params={count}",
            purpose="final",
            seed=seed,
            learning_rate=1e-3,
            steps=10,
            tokens=10_000,
            validation_loss=loss,
            curve_steps=(),
            curve_losses=(),
            seconds=1.0,
            error="" if loss else "Loss is nan.",
            directory="",
        )
        for seed, loss in enumerate(losses)
    )
    return Entry(
        variant=variant,
        size=f"params={count}",
        model=TransformerConfig(),
        optimizer=OptimizerConfig(),
        parameters=count,
        training_flops=6 * count,
        target=None,
        reached=None,
        steps=10,
        searched={},
        finals=finals,
        costs=None,
    )


def test_a_comparison_has_a_law_for_each_variant_that_finished():
    counts = [int(size) for size in SIZES]
    entries = []
    for count in counts:
        loss = float(curve(count))
        entries.append(entry("good", count, [loss, None, loss * 1.001]))
        entries.append(entry("weak", count, [loss, loss] if count > 1e6 else [None, None]))
    answer = Answer(
        comparison=Comparison(variants=("good", "weak"), confidence=0.9),
        command="",
        commit="",
        environment={},
        data="",
        sizes=tuple(f"params={count}" for count in counts),
        entries=tuple(entries),
        outcomes=(),
        notes=(),
        seconds=1.0,
    )
    found = laws(answer)
    assert list(found) == ["good"]
    assert found["good"].level == 0.9
    np.testing.assert_array_equal(found["good"].parameters, np.repeat(counts, 2))
    assert unfitted(answer) == (
        "weak has no law: 2 sizes finished: a law of E, A and alpha needs at least 3.",
    )
