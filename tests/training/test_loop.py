import contextlib
import dataclasses
import functools
import math
import os
import signal
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import Decoder, OptimizerConfig, TrainConfig, TransformerConfig, split
from gptjax.config import MeshConfig
from gptjax.data.objectives.packing import Windows
from gptjax.data.objectives.rows import Bucket, causal_row
from gptjax.data.pipeline import EvaluationBatches, training_batches
from gptjax.parallel.keys import random_key
from gptjax.parallel.sharding import build_mesh
from gptjax.system.exits import Diverged, Interrupted
from gptjax.training import loop
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.loop import Fit, fit
from gptjax.training.losses import token_loss
from gptjax.training.optimizers import build_optimizer
from gptjax.training.step import CompiledByShape, State

MODEL = TransformerConfig(vocab_size=7, context_length=8, depth=1, width=16, heads=2, dropout=0.1)
TRAIN = TrainConfig(steps=12, batch_size=4, log_every=2, eval_every=4, checkpoint_every=5, seed=3)
TOKENS = (np.arange(400) ** 2 % 7).astype(np.int32)


def rows(tokens: np.ndarray, *, rest: bool = False) -> list[Bucket]:
    windows = Windows(tokens, MODEL.context_length + 1, MODEL.context_length, rest=rest)
    return [
        Bucket(
            [windows],
            functools.partial(causal_row, context_length=MODEL.context_length),
            random=False,
        )
    ]


TRAINING, VALIDATION = rows(TOKENS[:300]), rows(TOKENS[300:], rest=True)


class Recorder:
    """A tracker that keeps what it is given, and can act at a step."""

    def __init__(self, at: int = 0, act=None):
        self.lines: list[tuple[int, dict[str, float]]] = []
        self._at, self._act = at, act

    def write(self, step, scalars):
        self.lines.append((step, scalars))
        if self._act and step == self._at:
            self._act()

    def close(self):
        pass


def run(directory: Path, tracker=None, train=TRAIN, change=lambda params: params) -> Fit:
    graphdef, params = split(Decoder(MODEL, rngs=nnx.Rngs(train.seed)))
    with Checkpoints(directory) as checkpoints:
        return fit(
            train,
            lambda: change(jax.tree.map(jnp.asarray, params)),
            mesh=build_mesh(MeshConfig(), train.batch_size // train.grad_accumulation),
            loss=token_loss(graphdef),
            optimizer=build_optimizer(OptimizerConfig(warmup_steps=2), steps=12),
            batches=training_batches(TRAINING, batch_size=train.batch_size, seed=train.seed),
            validation=EvaluationBatches(VALIDATION, train.batch_size),
            checkpoints=checkpoints,
            trackers=[tracker or Recorder()],
            describe=lambda step, tokens_per_second: {},
        )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    tracker = Recorder()
    return run(tmp_path_factory.mktemp("whole"), tracker), tracker.lines


def losses(lines) -> dict[int, tuple]:
    names = ("loss", "grad_norm", "validation_loss")
    return {step: tuple(scalars.get(name) for name in names) for step, scalars in lines}


def test_logged_and_evaluated_steps_are_written(uninterrupted):
    fitted, lines = uninterrupted
    assert [step for step, _ in lines] == [2, 4, 6, 8, 10, 12]
    evaluated = {step: scalars["validation_loss"] for step, scalars in lines if step % 4 == 0}
    assert list(evaluated) == [4, 8, 12]
    assert fitted.progress.last_loss == evaluated[12]
    assert fitted.progress.best_loss == min(evaluated.values())


@pytest.mark.slow
def test_time_that_steps_take_before_an_evaluation_counts(tmp_path, monkeypatch):
    """Their metrics are waited for while the clock of tokens per second runs."""
    paused, waited = [False], []
    pause, check = loop._Logger.paused, loop._Logger.check

    @contextlib.contextmanager
    def noted(self, kind):
        with pause(self, kind):
            paused[0] = True
            yield
            paused[0] = False

    def noting(self, *pending):
        waited.append(paused[0])
        check(self, *pending)

    monkeypatch.setattr(loop._Logger, "paused", noted)
    monkeypatch.setattr(loop._Logger, "check", noting)
    run(tmp_path, train=dataclasses.replace(TRAIN, steps_per_dispatch=2, eval_every=6))
    assert waited
    assert not any(waited)


def test_norms_of_leaves_stay_on_the_device(tmp_path, monkeypatch):
    """Three scalars of a step are fetched, whatever the number of its leaves."""

    class OnDevice:
        def fetched(self, *_):
            raise AssertionError("norms of leaves were fetched")

        __array__ = __getitem__ = __float__ = copy_to_host_async = fetched

    call = CompiledByShape.__call__

    def step(self, *arguments):
        returned = call(self, *arguments)
        if not isinstance(returned[0], State):
            return returned
        state, metrics = returned
        return state, metrics._replace(leaf_norms=OnDevice())

    monkeypatch.setattr(CompiledByShape, "__call__", step)
    tracker = Recorder()
    run(tmp_path, tracker, dataclasses.replace(TRAIN, steps_per_dispatch=2))
    assert [number for number, _ in tracker.lines] == [2, 4, 6, 8, 10, 12]


def test_step_and_evaluation_compile_while_the_state_is_initialised(tmp_path, monkeypatch):
    begun = threading.Barrier(3, timeout=60)  # Broken if one waits for another to end.
    compile_one, init = jax.stages.Lowered.compile, loop.init_state

    def compiled(self, *arguments, **options):
        if threading.current_thread() is not threading.main_thread():
            begun.wait()
        return compile_one(self, *arguments, **options)

    def initialised(*arguments):
        begun.wait()
        return init(*arguments)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    monkeypatch.setattr(loop, "init_state", initialised)
    assert run(tmp_path).progress.step == 12


@pytest.mark.slow
def test_the_last_and_the_best_checkpoint_are_kept(tmp_path, monkeypatch):
    # Evaluated at 4, 8 and 12; stopped and resumed in between, the best must still be known.
    train = dataclasses.replace(TRAIN, eval_every=4, checkpoint_every=3)
    losses = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr(loop, "_evaluator", lambda *_: lambda params: next(losses))
    with pytest.raises(Interrupted):
        run(tmp_path, Recorder(8, lambda: os.kill(os.getpid(), signal.SIGTERM)), train)
    fitted = run(tmp_path, train=train)
    assert (fitted.progress.best_step, fitted.progress.best_loss) == (8, 1.0)
    assert fitted.progress.last_loss == 3.0
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert (checkpoints.best_step, checkpoints.last_step) == (8, 12)
    assert {int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()} == {8, 12}


def test_a_line_is_written_through_before_the_checkpoint_that_it_leads_to(tmp_path, monkeypatch):
    events: list[tuple] = []
    save = Checkpoints.save

    class Durable(Recorder):
        def write_through(self):
            events.append(("through", self.lines[-1][0]))

    def saved(self, state, progress, validation_loss=None):
        events.append(("saved", int(state.step)))
        save(self, state, progress, validation_loss)

    monkeypatch.setattr(Checkpoints, "save", saved)
    tracker = Durable()
    run(tmp_path, tracker)
    assert events == [
        event
        for logged, step in [(4, 4), (4, 5), (8, 8), (10, 10), (12, 12)]
        for event in (("through", logged), ("saved", step))
    ]
    assert [step for step, _ in tracker.lines] == [*range(2, 13, 2)]


def test_checkpoints_are_saved_by_the_clock_too(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, state, *_: saved.append(int(state.step)))
    run(tmp_path, train=dataclasses.replace(TRAIN, steps=4, checkpoint_minutes=1e-9))
    assert saved == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "step", "stops", "grouped"),
    [
        (signal.SIGTERM, 2, 3, (1, 1)),
        (signal.SIGINT, 8, 9, (1, 2)),
        (signal.SIGTERM, 4, 5, (2, 2)),
        (signal.SIGINT, 6, 8, (2, 1)),
    ],
)
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    tmp_path, uninterrupted, number, step, stops, grouped
):
    """With one or two steps per dispatch before and after it, of which 4 to 6 is cut at 5."""
    trains = [dataclasses.replace(TRAIN, steps_per_dispatch=steps) for steps in grouped]
    before = Recorder(step, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match=f"Stopped by {number.name}; step {stops} ") as stopped:
        run(tmp_path, before, trains[0])
    assert stopped.value.exit_code == 128 + number
    after = Recorder()
    fitted = run(tmp_path, after, trains[1])
    expected, lines = uninterrupted
    jax.tree.map(np.testing.assert_array_equal, fitted.params, expected.params)
    assert {**losses(before.lines), **losses(after.lines)} == losses(lines)
    assert fitted.progress.best_loss == expected.progress.best_loss
    assert fitted.progress.data == expected.progress.data
    assert fitted.progress.tokens == expected.progress.tokens


@pytest.mark.slow
def test_a_finished_run_trains_no_more(tmp_path, uninterrupted):
    run(tmp_path)
    again = Recorder()
    fitted = run(tmp_path, again)
    assert again.lines == []
    jax.tree.map(np.testing.assert_array_equal, fitted.params, uninterrupted[0].params)


def poisoned(params):
    params["decoder"]["blocks"]["mlp"]["up"]["bias"] *= math.nan
    return params


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_suspect(tmp_path):
    with pytest.raises(Diverged) as stopped:
        run(tmp_path, change=poisoned)
    message = str(stopped.value)
    assert message.startswith("Step 1: the loss is nan")
    assert "the suspect is the parameter decoder.blocks.mlp.up.bias" in message
    assert "there is no checkpoint yet" in message
    assert not any(path.name.isdigit() for path in tmp_path.iterdir())


def test_the_last_good_checkpoint_is_named_when_a_later_loss_is_not_finite(tmp_path):
    graphdef, params = split(Decoder(MODEL, rngs=nnx.Rngs(0)))
    sums = token_loss(graphdef)
    ninth = jax.random.fold_in(jax.random.fold_in(random_key(TRAIN.seed), 8), 0)

    def broken(params, batch, key):
        """Breaks at step 9, on the first device."""
        value = sums(params, batch, key)
        if key is None:
            return value  # Of an evaluation.
        breaks = jnp.all(jax.random.key_data(key) == jax.random.key_data(ninth))
        return value._replace(loss=value.loss * jnp.where(breaks, math.nan, 1))

    with Checkpoints(tmp_path) as checkpoints, pytest.raises(Diverged) as stopped:
        fit(
            # Steps 9 and 10 are one dispatch.
            dataclasses.replace(TRAIN, steps_per_dispatch=2, checkpoint_every=4),
            lambda: params,
            mesh=build_mesh(MeshConfig(), TRAIN.batch_size),
            loss=broken,
            optimizer=build_optimizer(OptimizerConfig(warmup_steps=2), steps=12),
            batches=training_batches(TRAINING, batch_size=4, seed=3),
            validation=EvaluationBatches(VALIDATION, 4),
            checkpoints=checkpoints,
            trackers=[],
            describe=lambda step, tokens_per_second: {},
        )
    assert str(stopped.value).startswith("Step 9: the loss is nan")
    assert "the last good checkpoint is step 8" in str(stopped.value)
