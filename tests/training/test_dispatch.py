import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import distributed
from gptjax.config import TrainConfig
from gptjax.data.batch import Batch
from gptjax.training import dispatch
from gptjax.training.dispatch import MOST, Pace, logged_steps, several, stack_size

TRAIN = TrainConfig(steps=100, log_every=10, eval_every=20, checkpoint_every=33)
SMALL, LARGE = 10**6, 10**9
"""Parameters of models whose steps of 2,048 tokens are short, and long."""


def grouped(config: TrainConfig, most: int, done: int = 0) -> list[int]:
    """The steps after which each dispatch ends."""
    pace, ends = Pace(config, most), [done]
    while ends[-1] < config.steps:
        ends.append(ends[-1] + pace.steps(ends[-1]))
    return ends[1:]


@pytest.mark.parametrize(
    ("given", "platform", "parameters", "most"),
    [
        (0, "cpu", SMALL, 1),
        (0, "gpu", SMALL, 20),
        (0, "tpu", LARGE, 1),
        (4, "cpu", LARGE, 4),
        (64, "gpu", SMALL, 20),
        (1, "gpu", SMALL, 1),
    ],
)
def test_steps_are_grouped_where_they_are_short(given, platform, parameters, most):
    config = dataclasses.replace(TRAIN, steps_per_dispatch=given)
    assert stack_size(config, parameters, 2048, platform) == most
    rarely = dataclasses.replace(TRAIN, checkpoint_every=100, steps=1000, eval_every=500)
    assert stack_size(rarely, SMALL, 2048, "gpu") == MOST
    assert stack_size(dataclasses.replace(rarely, steps=3), SMALL, 2048, "gpu") == 3


@pytest.mark.parametrize("done", [0, 17])
@pytest.mark.parametrize("most", [1, 3, 10])
def test_a_group_ends_where_a_step_is_evaluated_or_saved(most, done):
    """Whether or not the number divides an interval; a logged step may be in its middle."""
    config = dataclasses.replace(TRAIN, steps_per_dispatch=most)
    ends = grouped(config, most, done)
    assert {*range(20, 101, 20), 33, 66, 99} - set(range(done + 1)) <= set(ends)
    sizes = np.diff([done, *ends])
    assert sizes.min() >= 1
    assert sizes.max() == most
    logged = []
    for end, size in zip(ends, sizes, strict=True):
        logged += logged_steps(config, end, int(size), evaluated=end == 33)
    assert logged == sorted({*range(10, 101, 10), 33} - set(range(done + 1)))


@pytest.mark.parametrize(
    ("overhead", "step", "others", "sizes"),
    [
        (0.0, 0.005, 0.004, [1, 10]),  # As many as take 50 ms.
        (0.0, 0.005, 0.012, [1, 4]),  # The slowest process decides.
        (0.0, 0.2, 0.0, [1]),
        (0.010, 0.001, 0.0, [1, 5, 20]),  # The host takes 10 ms for a dispatch.
    ],
)
def test_groups_grow_to_what_takes_the_time(monkeypatch, overhead, step, others, sizes):
    """What comes first takes 1 s besides."""
    now, asked = 0.0, []
    monkeypatch.setattr(dispatch.time, "perf_counter", lambda: now)
    monkeypatch.setattr(
        distributed, "meet", lambda name, mean: asked.append(mean) or [mean, others]
    )
    config = dataclasses.replace(TRAIN, steps=1000, eval_every=1000, checkpoint_every=1000)
    pace, taken, done = Pace(config, 20), [], 0
    for number in range(40):
        taken.append(pace.steps(done))
        done += taken[-1]
        now += (number < 2) + max(overhead, taken[-1] * step)
    assert list(dict.fromkeys(taken)) == sizes
    assert [taken.count(size) for size in sizes[:-1]] == [5] * (len(sizes) - 1)
    assert asked[0] == pytest.approx(max(overhead, step))


def test_a_part_of_a_stack_is_made_step_by_step():
    def step(state, batch):
        state = 2 * state + batch.tokens.sum()
        return state, {"state": state, "twice": [2 * state]}

    tokens = np.arange(8, dtype=np.float32).reshape(4, 1, 2)
    state, metrics = jax.jit(several(step))(
        jnp.float32(1), Batch(tokens, tokens, tokens), np.array([1, 2])
    )
    assert state == 2 * (2 * 1 + 5) + 9
    np.testing.assert_array_equal(metrics["state"], [7, 23, 0, 0])
    np.testing.assert_array_equal(metrics["twice"][0], [14, 46, 0, 0])
