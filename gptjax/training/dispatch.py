"""Several steps in one program, where a step is too short for the host to keep up with.

Starting a program costs the host milliseconds: batches to send, metrics to fetch, every leaf of the
state to pass. A step of a small model takes an accelerator less. So batches go to the devices in
stacks, and a program makes as many steps of a stack as an argument says: one program whatever their
number, so that the grouping of steps changes no bit of the result.

| steps per dispatch | where |
|---|---|
| 1, the step alone, without a loop around it | on a CPU, and where a step is above `SHORT_FLOPS` |
| as many as take `SECONDS`, by the time that steps are measured to take | else |

A group ends at each step that is evaluated or saved, before one that is watched, where a profile
starts and ends, and at the end of a stack.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gptjax import distributed
from gptjax.config import TrainConfig
from gptjax.data.batch import Batch

SECONDS = 0.05
"""Time that a dispatch aims at: much more than the host takes for one, and little to wait for when
a signal arrives."""
SHORT_FLOPS = 5e12
"""FLOPs above which a step is not grouped: `SECONDS` of a fast chip's bfloat16."""
MOST = 50
"""The most steps per dispatch that are chosen by time."""
WARM_UP, MEASURED = 2, 3
"""Dispatches of one size: those that are not timed, and those that are."""


class Group(NamedTuple):
    """Batches for one dispatch: a part of a stack."""

    batches: Batch
    """[k, B, T], on the devices; [B, T] of stacks of one."""
    part: tuple[Int[np.ndarray, "2"]] | tuple[()]
    """The further argument of a program of `several`; none of stacks of one."""
    steps: int
    """How many there are, each for a step."""

    @property
    def tokens(self) -> int:
        """Token positions of its batches."""
        return self.steps * self.batches.tokens[0].size if self.part else self.batches.tokens.size


def stack_size(config: TrainConfig, parameters: int, tokens: int, platform: str) -> int:
    """How many batches are stacked: the most steps per dispatch.

    Args:
      config: `steps_per_dispatch`, if it is not 0, and the intervals that end a group.
      parameters: of the model, or of all models that a device trains.
      tokens: per step and device.
      platform: of the devices.
    """
    wanted = config.steps_per_dispatch
    if not wanted:
        short = platform != "cpu" and 6 * parameters * tokens <= SHORT_FLOPS
        wanted = MOST if short else 1
    return min(wanted, *_intervals(config), config.steps)


class Pace:
    """The number of steps per dispatch, from the time that steps are measured to take.

    Where dispatches take the host longer than the device, the time of a step falls as groups grow:
    so it is measured anew until groups no longer double. Every process of a run takes the longest
    time that any of them measures.
    """

    def __init__(self, config: TrainConfig, most: int):
        """Take the config and the size of a stack."""
        self._config = config
        self._most = most
        self._measures = most > 1 and not config.steps_per_dispatch
        self._steps = 1 if self._measures else most
        self._begun: list[tuple[float, int]] = []
        """When each dispatch of the present size began, and the steps that were done by then."""

    def steps(self, done: int) -> int:
        """The steps of the next dispatch, after `done` steps; called once before each."""
        if self._measures:
            self._begun.append((time.perf_counter(), done))
            if len(self._begun) > WARM_UP + MEASURED:
                self._choose()
        left = [every - done % every for every in _intervals(self._config)]
        if self._config.watch:  # Measured before the group that begins with it.
            before = self._config.watch_every - 1
            left.append((before - done) % self._config.watch_every or self._config.watch_every)
        profiled = self._config.profiled
        ends = (profiled.start - 1, profiled.stop - 1, self._config.steps)
        return min(self._steps, *left, *(end - done for end in ends if end > done))

    def _choose(self) -> None:
        (start, first), (end, last) = self._begun[WARM_UP], self._begun[-1]
        mean = (end - start) / (last - first)
        slowest = max(distributed.meet("the time of a step", mean))
        before, fitting = self._steps, round(SECONDS / slowest)
        self._steps, self._begun = max(before, min(self._most, fitting)), self._begun[-1:]
        self._measures = 2 * before <= self._steps < self._most


def _intervals(config: TrainConfig) -> tuple[int, int]:
    return config.eval_every, config.checkpoint_every


def logged_steps(config: TrainConfig, last: int, count: int, *, evaluated: bool) -> list[int]:
    """Of the `count` steps up to `last`, those that are logged: `last` too if it is evaluated."""
    steps = range(last - count + 1, last + 1)
    return [n for n in steps if n % config.log_every == 0 or (evaluated and n == last)]


def several(step: Callable[[Any, Batch], tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """`step` for a part of a stack: (state, batches, part) → (state, metrics).

    `batches` have a leading axis k, and so have the metrics, of which those of steps that are not
    made are 0. `part` is the index of the first batch and the number of steps.
    """

    def steps(state: Any, batches: Batch, part: Int[Array, "2"]) -> tuple[Any, Any]:
        def batch_at(index: Int[Array, ""]) -> Batch:
            return jax.tree.map(lambda array: array[index], batches)

        first, count = part
        # In one row per step: one kernel writes it, whatever the number of leaves.
        shapes = jax.eval_shape(lambda: step(state, batch_at(first))[1])
        blank, unravel = jax.flatten_util.ravel_pytree(
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        )

        def one(index: Int[Array, ""], carried: tuple[Any, Any]) -> tuple[Any, Any]:
            state, rows = carried
            state, metrics = step(state, batch_at(first + index))
            return state, rows.at[index].set(jax.flatten_util.ravel_pytree(metrics)[0])

        rows = jnp.zeros((len(batches.tokens), blank.size), blank.dtype)
        # A loop whose length is an argument: one program for groups of any size.
        state, rows = jax.lax.fori_loop(0, count, one, (state, rows))
        return state, jax.vmap(unravel)(rows)

    return steps
