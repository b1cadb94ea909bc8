"""Checkpoints of a run: the last, the best and those asked for, written in the background.

The only module that imports Orbax. A checkpoint `DIR/STEP/` holds three items: `params` (the
nested dict of arrays), `optimizer` (the same, by leaf name), and `progress` (JSON: the data's
position and what the loop has to remember). Orbax writes into a temporary folder and renames it,
so a checkpoint is there whole or not at all, and restored it is bit for bit what was saved.
"""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy
from orbax.checkpoint.options import MultiprocessingOptions

from gptjax.config import InputError
from gptjax.disk import DiskError
from gptjax.training.step import State

VALIDATION_LOSS = "validation_loss"
OS_ERROR = re.compile(r"os_error_code='(\d+)'")
"""What TensorStore's errors have of the system's."""


class CheckpointFailed(DiskError):
    """A checkpoint could not be written; threads of Orbax may still be at it."""


class Restored(NamedTuple):
    """A checkpoint's content."""

    state: State
    """Bit for bit what was saved."""
    progress: dict[str, Any]
    """What the loop saved beside it."""


class Checkpoints:
    """The checkpoints in a directory; a context manager that waits for the last write.

    Beside the last and the best, those of the steps that `keep_every` divides stay; 0 keeps none.
    With `read_only` nothing there is touched, not even what a live run has half written.
    """

    def __init__(self, directory: Path, *, keep_every: int = 0, read_only: bool = False):
        # Of what fails in the background Orbax logs a traceback a thread, and raises it too.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.directory = directory.resolve()

        def validation_loss(metrics: dict[str, float]) -> float:
            return metrics[VALIDATION_LOSS]

        keep = [
            preservation_policy.LatestN(1),
            preservation_policy.BestN(
                n=1,
                get_metric_fn=validation_loss,
                reverse=True,
                keep_checkpoints_without_metrics=False,
            ),
        ]
        if keep_every:
            keep.append(preservation_policy.EveryNSteps(keep_every))
        alone = MultiprocessingOptions(jax.process_index(), {jax.process_index()})
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(keep),
                best_fn=validation_loss,  # Without it Orbax keeps no metrics on disk.
                best_mode="min",
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                # One process may read a run while the others wait, as for its samples.
                multiprocessing_options=alone if read_only else MultiprocessingOptions(),
            ),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "optimizer": ocp.StandardCheckpointHandler(),
                "progress": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> "Checkpoints":
        self._hook, sys.excepthook = sys.excepthook, self._show
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        hidden = [] if kind is None else [CheckpointFailed]  # It hides no other error.
        with contextlib.suppress(*hidden), self._writing():
            self._manager.close()
        sys.excepthook = self._hook

    def _show(self, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """The hook for what nobody catches, without what follows from a failed write.

        TensorStore's threads tell an event loop of their results that Orbax has closed.
        """
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):
            self._hook(kind, error, trace)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what a disk causes, in whichever thread, into a sentence."""
        try:
            yield
        except (OSError, ValueError) as error:
            number = OS_ERROR.search(str(error))
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
            elif number:
                reason = os.strerror(int(number[1]))
            else:
                raise
            last = max((int(name) for name in self._names() if name.isdecimal()), default=None)
            kept = "there is none yet" if last is None else f"the last whole one is of step {last}"
            raise CheckpointFailed(
                f"cannot write a checkpoint into {self.directory}: {reason}; {kept}, and the same "
                "command goes on from it."
            ) from error

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.directory)
        except OSError:
            return []

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, in order."""
        return sorted(self._manager.all_steps())

    @property
    def last_step(self) -> int | None:
        """Step of the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss; None before an evaluation."""
        return self._manager.best_step()

    def save(
        self, state: State, progress: dict[str, Any], validation_loss: float | None = None
    ) -> None:
        """Write `state` in the background; those that need not stay are then deleted.

        Raises:
          CheckpointFailed: it, or the one before, could not be written.
        """
        with self._writing():
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    optimizer=ocp.args.StandardSave(_by_name(state.optimizer)),
                    progress=ocp.args.JsonSave(progress),
                ),
                metrics=None if validation_loss is None else {VALIDATION_LOSS: validation_loss},
            )

    def wait(self) -> None:
        """Return when all that was saved is on disk.

        Raises:
          CheckpointFailed: it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def restore(self, like: State, step: int | None = None) -> Restored:
        """The checkpoint of `step` (the last by default), in the structure of `like`.

        Raises:
          InputError: no checkpoint, or leaves that differ from those of `like`.
        """
        step, optimizer = self._step(step), _by_name(like.optimizer)
        restored = self._read(step, params=like.params, optimizer=optimizer)
        structure, names = jax.tree.structure(like.optimizer), leaf_names(like.optimizer)
        optimizer = jax.tree.unflatten(structure, [restored["optimizer"][name] for name in names])
        done = jax.device_put(np.int32(step), like.step.sharding)
        return Restored(State(done, restored["params"], optimizer), restored["progress"])

    def restore_params(self, like: Any, step: int | None = None) -> Any:
        """The parameters alone, in the structure of `like` (arrays or their shapes).

        Raises:
          InputError: no checkpoint, or leaves that differ from those of `like`.
        """
        return self._read(self._step(step), params=like)["params"]

    def _read(self, step: int, **wanted: Any) -> Any:
        """The items `wanted`, each like the tree given, and the loop's progress."""
        items = {name: ocp.args.StandardRestore(_shapes(tree)) for name, tree in wanted.items()}
        args = ocp.args.Composite(progress=ocp.args.JsonRestore(), **items)
        try:
            self._check_leaves(step, wanted)
            return self._manager.restore(step, args=args)
        except (KeyError, ValueError, OSError) as error:
            if isinstance(error, InputError):
                raise
            where = self.directory / str(step)
            raise InputError(f"The checkpoint {where} is damaged and cannot be read.") from error

    def _step(self, step: int | None) -> int:
        steps = self.steps
        if not steps:
            raise InputError(f"{self.directory} holds no checkpoint.")
        if step is not None and step not in steps:
            there = ", ".join(map(str, steps))
            raise InputError(f"{self.directory} has no checkpoint of step {step}: it has {there}.")
        return steps[-1] if step is None else step

    def _check_leaves(self, step: int, wanted: dict[str, Any]) -> None:
        """Every leaf that is missing, unexpected, or of another shape or dtype, at once."""
        saved = self._manager.item_metadata(step)
        problems = []
        for item, tree in wanted.items():
            found, asked = _by_name(saved[item].tree), _by_name(tree)
            problems += [f"{item}.{name} is missing" for name in asked if name not in found]
            problems += [f"{item}.{name} is unexpected" for name in found if name not in asked]
            for name in asked.keys() & found.keys():
                there, here = found[name], asked[name]
                if (tuple(there.shape), there.dtype) != (here.shape, here.dtype):
                    problems.append(
                        f"{item}.{name} is {there.dtype}{list(there.shape)}, "
                        f"not {here.dtype}{list(here.shape)}"
                    )
        if problems:
            where = self.directory / str(step)
            raise InputError(
                f"The checkpoint {where} does not fit the model: {'; '.join(sorted(problems))}."
            )


def leaf_names(tree: Any) -> list[str]:
    """The path of every leaf, as `blocks.attention.query.kernel`, in the order of the leaves."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def _by_name(tree: Any) -> dict[str, jax.Array]:
    """A tree of any node types as a flat dict: optax's tuples need not be rebuilt by Orbax."""
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def _shapes(tree: Any) -> Any:
    """Shapes, dtypes and shardings of the leaves: where and as what Orbax puts what it reads."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
