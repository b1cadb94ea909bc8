"""fit(): the training loop, with evaluation, logging, checkpoints and preemption."""

import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gptjax.config import TrainConfig
from gptjax.data.batch import Batch
from gptjax.distributed import agreed_stop
from gptjax.system.exits import Diverged, Interrupted, Interrupts
from gptjax.system.programs import with_own_names
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.checkpoint_clock import CheckpointClock
from gptjax.training.dispatch import Pace, logged_steps, stack_size
from gptjax.training.leaves import leaf_names
from gptjax.training.losses import LossFunction, Params
from gptjax.training.prefetch import DevicePrefetch
from gptjax.training.profile.steps import StepProfile
from gptjax.training.profile.timeline import STEPS, WAIT
from gptjax.training.step import (
    CompiledByShape,
    EvalStep,
    Metrics,
    State,
    init_state,
    lower_eval_step,
    lower_train_step,
    state_shapes,
)
from gptjax.training.trackers.protocol import DurableTracker, TimeTracker, Tracker
from gptjax.training.trackers.sessions import SPENT
from gptjax.training.watch import Activations, Measured, lower_watch_step, scalars_of

SCALARS = "loss", "cross_entropy", "grad_norm"
"""The metrics of a step that its line has."""


class Batches(Protocol):
    """A sequence of batches, each made when it is indexed."""

    def __len__(self) -> int:
        """The number of batches."""
        ...

    def __getitem__(self, index: int, /) -> Batch:
        """The batch at `index`."""
        ...


@dataclass
class Progress:
    """The loop's own state, saved with every checkpoint and restored on resumption."""

    step: int = 0
    tokens: int = 0
    """Token positions of all batches so far; of an encoder-decoder those of the targets."""
    data: dict[str, Any] = field(default_factory=dict)
    """The data iterator's state."""
    best_loss: float = math.inf
    best_step: int = 0
    last_loss: float = math.inf
    seconds: float = 0.0
    """Wall time of all sessions so far, compilation included."""


@dataclass(frozen=True)
class Fit:
    """The result of training."""

    params: Params
    """After the last step."""
    progress: Progress
    """Validation losses, nats per token, and the time taken, seconds."""
    compile_seconds: float
    """Compilation of the training step, in this session."""


def fit(
    config: TrainConfig,
    init: Callable[[], Params],
    *,
    mesh: Mesh,
    axes: Params | None = None,
    pmap: bool = False,
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    batches: grain.DatasetIterator,
    validation: Batches,
    checkpoints: Checkpoints,
    trackers: Sequence[Tracker],
    describe: Callable[[int, float], dict[str, float]] = lambda step, tokens_per_second: {},
    activations: Activations | None = None,
    profile: StepProfile | None = None,
) -> Fit:
    """Train to `config.steps`, from the last checkpoint or from initial parameters.

    One program makes several steps where they are short (`gptjax.training.dispatch`). The metrics
    of a group of steps are fetched while the next one runs, so the device never waits for the host.

    Args:
      config: the number of steps, and the intervals of logging, evaluation and checkpoints.
      init: makes the initial parameters.
      mesh: the devices.
      axes: the letters of each parameter's axes, by which `mesh` shards them; None replicates all.
      pmap: compile the step by `jax.pmap`.
      loss: the training objective.
      optimizer: gradients to updates.
      batches: the training data, this process's rows of it, with `get_state` and `set_state`.
      validation: held-out batches, this process's rows; each evaluation uses all.
      checkpoints: where the state is saved and restored.
      trackers: where scalars are written.
      describe: (step, tokens per second) → further scalars for a logged step.
      activations: what `config.watch` measures inside the model; None measures nothing there.
      profile: of the steps of `config.profile`.

    Raises:
      Diverged: a loss or gradient that is not finite.
      Interrupted: SIGINT or SIGTERM to any process, after the state is saved.
      DiskError: a checkpoint that cannot be written.
      InputError: a checkpoint that does not fit.
    """
    start = time.perf_counter()
    feed = DevicePrefetch(batches, mesh)
    shapes = state_shapes(init, optimizer, mesh, axes)
    state, progress = None, Progress()
    if checkpoints.last_step is not None:
        state, saved = checkpoints.restore(shapes)
        progress = Progress(**saved)
        feed.set_state(progress.data)
    seconds_before = progress.seconds
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
    tokens, platform = feed.tokens() // mesh.size, mesh.devices.flat[0].platform
    stack = 1 if pmap else stack_size(config, parameters, tokens, platform)
    feed.stack(stack, progress.step)

    lower_step = functools.partial(
        lower_train_step,
        loss,
        optimizer,
        mesh=mesh,
        seed=config.seed,
        grad_accumulation=config.grad_accumulation,
        pmap=pmap,
        stacked=stack > 1,
    )
    train_step = CompiledByShape(lower_step)
    eval_step = CompiledByShape(functools.partial(lower_eval_step, loss, mesh=mesh))
    with with_own_names(bool(config.profile)):
        # All compile while the state is initialised.
        compiled = train_step.prepare(shapes, feed.shapes())
        eval_step.prepare(shapes.params, feed.on_devices(validation[0]))
        watch = None
        if config.watch:
            how = {"loss": loss, "optimizer": optimizer, "activations": activations, "mesh": mesh}
            how |= {"seed": config.seed, "grad_accumulation": config.grad_accumulation}
            watch = CompiledByShape(functools.partial(lower_watch_step, stacked=stack > 1, **how))
            watch.prepare(shapes, feed.shapes())
        if state is None:
            state = init_state(init, optimizer, mesh, axes)
        compiled.result()
    compile_seconds = time.perf_counter() - start
    for tracker in trackers:
        if isinstance(tracker, TimeTracker):
            tracker.ready(compile_seconds)
    evaluate = _evaluator(eval_step, validation, feed)
    logger = _Logger(config, trackers, describe, checkpoints, feed, state.params)

    with _caught_signals() as caught, profile or contextlib.nullcontext():
        pace, clock = Pace(config, stack), CheckpointClock(config.checkpoint_minutes, progress.step)
        pending = None  # The last step of a group whose metrics are not fetched yet.
        while progress.step < config.steps:
            if profile is not None and profile.starts(progress.step):
                with logger.paused("profile"):
                    jax.block_until_ready(state)
                    profile.start(progress.step)
            with jax.profiler.StepTraceAnnotation(STEPS, step_num=progress.step + 1):
                group = feed.take(pace.steps(progress.step))
                if watch is not None and (progress.step + 1) % config.watch_every == 0:
                    inside = watch(state, group.batches, *group.part)
                    logger.watched[progress.step + 1] = inside
                state, metrics = train_step(state, group.batches, *group.part)
            for scalars in _scalars(metrics):
                scalars.copy_to_host_async()
            progress.step += group.steps
            if pending is not None:
                logger.log(*pending, state)
            pending = (progress.step, group.steps, metrics)
            progress.tokens += group.tokens
            logger.tokens += group.tokens
            if profile is not None and profile.ends(progress.step):
                logger.check(*pending, state)
                with logger.paused("profile"):
                    profile.stop(train_step.prepare(state, group.batches).result(), tokens)

            ends = progress.step == config.steps
            evaluates = ends or progress.step % config.eval_every == 0
            stop = agreed_stop(progress.step, caught[0] if caught else None)
            saves = ends or bool(stop) or progress.step % config.checkpoint_every == 0
            saves = clock.over(progress.step) or saves
            if not (evaluates or saves):
                continue
            validation_loss = None
            logger.check(*pending, state)  # Waits for the steps, whose time counts.
            with logger.paused("evaluation"):
                if evaluates:
                    validation_loss = progress.last_loss = evaluate(state.params)
                    if validation_loss < progress.best_loss:
                        progress.best_loss, progress.best_step = validation_loss, progress.step
                        saves = True
            # Before the checkpoint: a resumed run does not write the lines of earlier steps again.
            logger.log(*pending, state, validation_loss, through=saves)
            pending = None
            if saves:
                with logger.paused("checkpoint"):
                    progress.data = feed.get_state()
                    progress.seconds = seconds_before + time.perf_counter() - start
                    checkpoints.save(state, asdict(progress), validation_loss)
                    clock.saved(progress.step)
            if stop and not ends:
                checkpoints.wait()
                raise Interrupted(progress.step, stop)
    with logger.paused("checkpoint"):
        checkpoints.wait()
    logger.spend(progress.step)
    return Fit(state.params, progress, compile_seconds)


def _evaluator(step: EvalStep, batches: Batches, feed: DevicePrefetch) -> Callable[[Params], float]:
    def evaluate(params: Params) -> float:
        """Mean cross-entropy over all of `batches`, nats per token.

        As in training, results are fetched while the next batch runs; at most two are in flight.
        """
        total, weight, pending = 0.0, 0.0, None
        for number in range(len(batches) + 1):
            running = None
            if number < len(batches):
                running = step(params, feed.on_devices(batches[number]))
            if pending is not None:
                total += float(pending.cross_entropy)
                weight += float(pending.weight)
            pending = running
        return total / weight

    return evaluate


class _Logger:
    """Checks the metrics of every step and writes those of logged steps."""

    def __init__(
        self,
        config: TrainConfig,
        trackers: Sequence[Tracker],
        describe: Callable[[int, float], dict[str, float]],
        checkpoints: Checkpoints,
        feed: DevicePrefetch,
        params: Params,
    ):
        self._config = config
        self._trackers = trackers
        self._describe = describe
        self._checkpoints = checkpoints
        self._feed = feed
        self._leaf_names = leaf_names(params)
        self._since, self._waited = time.perf_counter(), feed.waited
        self.tokens = 0
        """Tokens of the steps since the last logged one."""
        self._spent: dict[str, float] = dict.fromkeys(SPENT, 0.0)
        """Seconds in `paused`, by kind; those of data are the feed's."""
        self.watched: dict[int, dict[str, Measured]] = {}
        """What was measured inside, by steps that are not logged yet."""
        self._waited_before = feed.waited

    def log(
        self,
        step: int,
        count: int,
        metrics: Metrics,
        state: State,
        validation_loss: float | None = None,
        *,
        through: bool = False,
    ) -> None:
        """Check the metrics of the `count` steps up to `step`, and write those of logged steps.

        With a validation loss, `step` is one of them. With `through`, all lines so far are on disk
        on return.
        """
        self.check(step, count, metrics, state)
        evaluated = validation_loss is not None
        logged = logged_steps(self._config, step, count, evaluated=evaluated)
        rates = self._rates() if logged else {}
        lines = []
        for number in logged:
            own = _of_step(_scalars(metrics), number - step + count - 1)
            described = self._describe(number, rates["tokens_per_second"])
            lines.append({**dict(zip(SCALARS, own, strict=True)), **rates, **described})
            lines[-1] |= scalars_of(self.watched.pop(number, {}))
        if evaluated:
            lines[-1]["validation_loss"] = validation_loss
        for tracker in self._trackers:
            for number, scalars in zip(logged, lines, strict=True):
                tracker.write(number, scalars)
            if through and isinstance(tracker, DurableTracker):
                tracker.write_through()
        self.spend(step)

    def spend(self, step: int) -> None:
        """Tell where the time went, up to `step`."""
        seconds = {**self._spent, "data": self._feed.waited - self._waited_before}
        for tracker in self._trackers:
            if isinstance(tracker, TimeTracker):
                tracker.spent(step, seconds)

    def _rates(self) -> dict[str, float]:
        """Rates over the steps since the last logged ones."""
        now = time.perf_counter()
        seconds, waited = now - self._since, self._feed.waited - self._waited
        tokens_per_second = self.tokens / seconds
        self._since, self._waited, self.tokens = now, self._feed.waited, 0
        return {"tokens_per_second": tokens_per_second, "data_wait": waited / seconds}

    def check(self, step: int, count: int, metrics: Metrics, state: State) -> None:
        """Raise `Diverged` if a loss or gradient of the steps up to `step` is not finite."""
        with jax.profiler.TraceAnnotation(WAIT):
            finite = np.isfinite(metrics.loss) & np.isfinite(metrics.grad_norm)
        bad = np.flatnonzero(~np.atleast_1d(finite)[:count])
        if not bad.size:
            return
        index = int(bad[0])
        step, metrics = step - count + 1 + index, _of_step(metrics, index)
        last = self._checkpoints.last_step
        known = (
            "there is no checkpoint yet"
            if last is None
            else f"the last good checkpoint is step {last}"
        )
        raise Diverged(
            f"Step {step}: the loss is {metrics.loss} and the gradient norm {metrics.grad_norm}; "
            f"{self._suspect(metrics, state)}; {known}."
        )

    def _suspect(self, metrics: Metrics, state: State) -> str:
        """The leaf that probably diverged first; a step that is not finite updates no parameter."""
        finite = jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), state.params)
        for kind, leaves in (
            ("parameter", jax.tree.leaves(finite)),
            ("gradient", [math.isfinite(norm) for norm in jax.tree.leaves(metrics.leaf_norms)]),
        ):
            bad = [name for name, ok in zip(self._leaf_names, leaves, strict=True) if not ok]
            if 0 < len(bad) < len(leaves):
                return f"the suspect is the {kind} {', '.join(bad)}"
        peaks = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(state.params)]
        largest = self._leaf_names[peaks.index(max(peaks))]
        return f"every gradient is affected; the suspect is {largest}, up to {max(peaks):.3g}"

    @contextlib.contextmanager
    def paused(self, kind: str) -> Iterator[None]:
        """Exclude the time spent inside from tokens per second, and add it to that of its kind."""
        start = time.perf_counter()
        yield
        taken = time.perf_counter() - start
        self._since += taken
        self._spent[kind] += taken


def _scalars(metrics: Metrics) -> list[jax.Array]:
    """Those that are fetched of every step; the norms of leaves are of one that diverged."""
    return [getattr(metrics, name) for name in SCALARS]


def _of_step(metrics: Any, index: int) -> Any:
    """The metrics of one step of a group."""
    return jax.tree.map(lambda values: float(np.atleast_1d(values)[index]), metrics)


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """The signals (SIGINT, SIGTERM) that arrived inside; a second one has its usual effect."""
    caught: list[int] = []
    before = {}

    def note(number: int, _: Any) -> None:
        caught.append(number)
        if isinstance(before[number], Interrupts):
            before[number].noted = True
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
