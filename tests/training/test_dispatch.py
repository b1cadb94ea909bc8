import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import distributed
from gptjax.config import TrainConfig
from gptjax.data.batch import Batch
from gptjax.training import dispatch
from gptjax.training.dispatch import MOST, Pace, several, stack_size

TRAIN = TrainConfig(steps=100, log_every=10, eval_every=25, checkpoint_every=33)
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
        (0, "gpu", SMALL, 10),
        (0, "tpu", LARGE, 1),
        (4, "cpu", LARGE, 4),
        (64, "gpu", SMALL, 10),
        (1, "gpu", SMALL, 1),
    ],
)
def test_steps_are_grouped_where_they_are_short(given, platform, parameters, most):
    config = dataclasses.replace(TRAIN, steps_per_dispatch=given)
    assert stack_size(config, parameters, 2048, platform) == most
    rarely = dataclasses.replace(TRAIN, log_every=25, checkpoint_every=100, steps=1000)
    assert stack_size(dataclasses.replace(rarely, eval_every=500), SMALL, 2048, "gpu") == 25
    assert stack_size(dataclasses.replace(rarely, steps=3), SMALL, 2048, "gpu") == 3
    assert MOST > 25


@pytest.mark.parametrize("done", [0, 17])
@pytest.mark.parametrize("most", [1, 3, 10])
def test_a_group_ends_where_a_step_is_logged_evaluated_or_saved(most, done):
    """Whether or not the number divides an interval."""
    ends = grouped(dataclasses.replace(TRAIN, steps_per_dispatch=most), most, done)
    assert {*range(10, 101, 10), 25, 75, 33, 66, 99} - set(range(done + 1)) <= set(ends)
    sizes = np.diff([done, *ends])
    assert sizes.min() >= 1
    assert sizes.max() == most


@pytest.mark.parametrize(("others", "steps"), [(0.004, 10), (0.012, 4), (0.2, 1)])
def test_as_many_steps_as_take_the_time_that_the_slowest_process_measures(
    monkeypatch, others, steps
):
    """Here a step takes 5 ms, but 1 s with what comes first, and another process `others`."""
    clock = iter([0.0, 1.0, 2.0, 2.005, 2.010, 2.015])
    monkeypatch.setattr(dispatch.time, "perf_counter", lambda: next(clock))
    asked = []
    monkeypatch.setattr(
        distributed, "meet", lambda name, mean: asked.append(mean) or [mean, others]
    )
    config = dataclasses.replace(TRAIN, log_every=50, eval_every=50, checkpoint_every=50)
    ends = grouped(config, most=20)
    assert ends[:5] == [1, 2, 3, 4, 5]
    assert ends[5] == 5 + steps
    assert asked == [pytest.approx(0.005)]


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
