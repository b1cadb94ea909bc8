"""Checkpoints of a run: the last, the best and those asked for, written in the background.

The only module that imports Orbax. A checkpoint `DIR/STEP/` holds four items: `params` (the nested
dict of arrays), `optimizer` (the same, by leaf name), `progress` (JSON: the data's position and
what the loop has to remember) and, after an evaluation, `metrics` (JSON: the validation loss); and
the checksums of their files. It is written into a temporary folder and renamed, and renamed before
it is deleted, so it is there whole or not at all; restored it is bit for bit what was saved, or
refused.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.future import ChainedFuture
from orbax.checkpoint.handlers import DefaultCheckpointHandlerRegistry
from orbax.checkpoint.metadata import metadata_store
from orbax.checkpoint.options import AsyncOptions, MultiprocessingOptions

from gptjax import distributed
from gptjax.config import InputError, read_json_object
from gptjax.system.disk import CheckpointFailed, DiskError
from gptjax.training import checkpoint_files as files
from gptjax.training.checkpoint_files import ARRAYS, HAS_LIST, METRICS, PROGRESS, Listed
from gptjax.training.step import State

VALIDATION_LOSS = "validation_loss"
UNFINISHED, DELETED = ocp.path.atomicity.TMP_DIR_SUFFIX, ".deleted"
"""Ends of the names of folders that are not yet, or no longer, checkpoints."""
OS_ERROR = re.compile(r"os_error_code='(\d+)'")
"""What TensorStore's errors have of the system's."""


class Restored(NamedTuple):
    """A checkpoint's content."""

    state: State
    """Bit for bit what was saved."""
    progress: dict[str, Any]
    """What the loop saved beside it."""


class Checkpoints:
    """The checkpoints in a directory; a context manager that waits for the last write.

    Beside the last and the best, those of the steps that `keep_every` divides stay; 0 keeps none.
    With `read_only` nothing there is touched, not even what a live run has half written. What lacks
    files, as after a deletion that was cut short, is left out, which a line on standard error says;
    the newest is not deleted by any run, so it is listed and refused when it is read.

    Raises:
      InputError: a directory to write into, of whose checkpoints the best cannot be known.
    """

    def __init__(self, directory: Path, *, keep_every: int = 0, read_only: bool = False):
        # Of what fails in the background Orbax logs a traceback a thread, and raises it too.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.directory = directory.resolve()
        self._keep_every, self._read_only = keep_every, read_only
        self._steps, self._incomplete = files.survey(self.directory)
        if distributed.is_first():
            for step, what in self._incomplete.items():
                print(f"{self.directory / str(step)} is left out: {what}.", file=sys.stderr)
        self._losses: dict[int, float | None] = {}
        if not read_only:
            _ = self.best_step  # What is wrong with it must not come up in the middle of a run.
        self._saving: int | None = None
        self._failed = False
        self._arrays: dict[str, dict[str, str]] = {}
        # One process may read a run while the others wait, as for its samples.
        alone = MultiprocessingOptions(jax.process_index(), {jax.process_index()})
        processes = alone if read_only else MultiprocessingOptions()
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(multiprocessing_options=processes),
                handler_registry=_handlers(),
            ),
            multiprocessing_options=processes,
            async_options=AsyncOptions(post_finalization_callback=self._list_files),
            checkpoint_metadata_store=metadata_store(enable_write=True, blocking_write=True),
        )
        self._deleting = ThreadPoolExecutor(1)

    def __enter__(self) -> "Checkpoints":
        self._hook, sys.unraisablehook = sys.unraisablehook, self._show
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # It hides no other error but of the same disk.
        same = kind is None or issubclass(kind, (OSError, DiskError))
        hidden = [] if same else [CheckpointFailed]
        try:
            with contextlib.suppress(*hidden):
                self.wait()
        finally:
            self._checkpointer.close()
            self._deleting.shutdown()
            if not self._failed:  # Else its threads may still have something to say.
                sys.unraisablehook = self._hook

    def _show(self, unraisable: Any) -> None:
        """The hook for what nobody can catch, without what follows from a failed write.

        TensorStore's threads tell an event loop of their results that Orbax has closed.
        """
        closed = str(unraisable.exc_value) == "Event loop is closed"
        if not (unraisable.exc_type is RuntimeError and closed):
            self._hook(unraisable)

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
            elif "NOT_FOUND" in str(error):
                reason = "it was deleted meanwhile"
            else:
                raise
            self._failed = True
            # Of a directory that was deleted none is left.
            there = [step for step in self._steps if (self.directory / str(step)).is_dir()]
            self._steps = [step for step in there if step != self._saving]
            last = self.last_step
            kept = "there is none yet" if last is None else f"the last whole one is of step {last}"
            raise CheckpointFailed(
                f"cannot write a checkpoint into {self.directory}: {reason}; {kept}, and the same "
                "command goes on from it."
            ) from error

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, in order."""
        return list(self._steps)

    @property
    def last_step(self) -> int | None:
        """Step of the newest checkpoint; None where there is none."""
        return self._steps[-1] if self._steps else None

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss; None before an evaluation.

        Raises:
          InputError: a damaged checkpoint that may be it.
        """
        if self._steps and self._incomplete:  # The loop remembers which it was.
            best = (self._json(self._steps[-1], PROGRESS) or {}).get("best_step")
            if isinstance(best, int) and best in self._incomplete:
                raise self._damaged(best, self._incomplete[best])
        for step in self._steps:
            if step not in self._losses:
                self._losses[step] = self._validation_loss(step)
        known = [(loss, -step) for step in self._steps if (loss := self._losses[step]) is not None]
        return -min(known)[1] if known else None

    def save(
        self, state: State, progress: dict[str, Any], validation_loss: float | None = None
    ) -> None:
        """Write `state` in the background; of those before it, what need not stay is deleted.

        Raises:
          CheckpointFailed: it, or the one before, could not be written.
        """
        self.wait()
        self._delete_superseded()
        optimizer = _by_name(state.optimizer)
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(optimizer),
            "progress": ocp.args.JsonSave(progress),
        }
        if validation_loss is not None:
            items["metrics"] = ocp.args.JsonSave({VALIDATION_LOSS: validation_loss})
        self._saving = step = int(state.step)
        self._arrays = {"params": _described(state.params), "optimizer": _described(optimizer)}
        where, args = self.directory / str(step), ocp.args.Composite(**items)
        with self._writing():
            self._checkpointer.save(where, args=args, custom_metadata=HAS_LIST)
        self._steps.append(step)
        self._losses[step] = validation_loss

    def wait(self) -> None:
        """Return when what was saved is on disk, and what need not stay beside it is deleted.

        Raises:
          CheckpointFailed: it could not be written.
        """
        try:
            with self._writing():
                self._checkpointer.wait_until_finished()
        finally:
            saved, self._saving = self._saving, None
        if saved is not None:
            self._delete_superseded()

    def restore(self, like: State, step: int | None = None) -> Restored:
        """The checkpoint of `step` (the last by default), in the structure of `like`.

        Raises:
          InputError: no checkpoint, a damaged one, or leaves that differ from those of `like`.
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
          InputError: no checkpoint, a damaged one, or leaves that differ from those of `like`.
        """
        return self._read(self._step(step), params=like)["params"]

    def _read(self, step: int, **wanted: Any) -> Any:
        """The items `wanted`, each like the tree given, and the loop's progress."""
        where, listed = self.directory / str(step), self._checked(step, *wanted)
        items = {name: ocp.args.StandardRestore(_shapes(tree)) for name, tree in wanted.items()}
        args = ocp.args.Composite(progress=ocp.args.JsonRestore(), **items)
        # Orbax and TensorStore have no common error for what they cannot read.
        try:
            arrays = listed.arrays if listed else files.arrays_of_older(where, wanted)
        except Exception as error:
            raise self._damaged(step, "it cannot be read") from error
        _check_leaves(where, arrays, wanted)
        try:
            return self._checkpointer.restore(where, args=args)
        except Exception as error:
            raise self._damaged(step, "it cannot be read") from error

    def _step(self, step: int | None) -> int:
        if step in self._incomplete:
            raise self._damaged(step, self._incomplete[step])
        if not self._steps:
            raise InputError(f"{self.directory} holds no checkpoint.")
        if step is not None and step not in self._steps:
            there = ", ".join(map(str, self._steps))
            raise InputError(f"{self.directory} has no checkpoint of step {step}: it has {there}.")
        return self._steps[-1] if step is None else step

    def _checked(self, step: int, *wanted: str) -> Listed | None:
        """The list of a checkpoint's files, all of them what was written.

        But for the arrays, of which only those `wanted` are read.

        Of several processes that go on with a run each reads a part; what one finds all raise.
        """
        where, listed = self.directory / str(step), self._listed(step)
        if listed is None:
            if distributed.is_first():
                line = "was saved without checksums: damage to its arrays would not be noticed."
                print(f"The checkpoint {where} {line}", file=sys.stderr)
            return None
        unread = {*ARRAYS} - {*wanted}
        names = [name for name in listed.files if name.split("/")[0] not in unread]
        if self._read_only:
            found = [files.changed(where, listed, names)]
        else:
            own = names[jax.process_index() :: jax.process_count()]
            problem = files.changed(where, listed, own)
            found = distributed.meet(f"the checkpoint of step {step}", problem)
        for what in filter(None, found):
            raise self._damaged(step, what)
        return listed

    def _listed(self, step: int) -> Listed | None:
        """The list of a checkpoint's files, all of which are there; None of an older one."""
        where = self.directory / str(step)
        try:
            listed = files.read_list(where)
        except InputError as error:
            raise self._damaged(step, f"{files.LIST} is not what was written") from error
        if lacks := files.lacks(where):
            raise self._damaged(step, lacks)
        return listed

    def _json(self, step: int, name: str) -> dict[str, Any] | None:
        """The object in a file of a checkpoint; None where it was saved without that file."""
        where, listed = self.directory / str(step), self._listed(step)
        if name not in listed.files if listed else not (where / name).exists():
            return None
        if listed and (what := files.changed(where, listed, [name])):
            raise self._damaged(step, what)
        try:
            return read_json_object(where / name)
        except InputError as error:
            raise self._damaged(step, f"{name} is not what was written") from error

    def _validation_loss(self, step: int) -> float | None:
        content = self._json(step, METRICS)
        loss = None if content is None else content.get(VALIDATION_LOSS)
        if content is not None and not isinstance(loss, int | float):
            raise self._damaged(step, f"{METRICS} is not what was written")
        return loss

    def _damaged(self, step: int, what: str) -> InputError:
        others = ", ".join(str(other) for other in self._steps if other != step)
        choice = f": delete that directory to go on with what there is of step {others}"
        if not others:
            choice = ", and there is no other: --overwrite begins the run anew"
        where = self.directory / str(step)
        return InputError(f"The checkpoint {where} is damaged ({what}){choice}.")

    def _list_files(self) -> None:
        """Called on process 0 when all items of a checkpoint are there, before it is renamed."""
        files.list_files(self.directory / f"{self._saving}{UNFINISHED}", self._arrays)

    def _delete_superseded(self) -> None:
        """Delete, in the background of process 0, what need not stay and what is no checkpoint."""
        every = self._keep_every
        stay = {self.last_step, self.best_step}
        stay |= {step for step in (*self._steps, *self._incomplete) if every and step % every == 0}
        superseded = {str(step) for step in (*self._steps, *self._incomplete) if step not in stay}
        self._steps = [step for step in self._steps if step in stay]
        self._incomplete = {}
        if jax.process_index() or not self.directory.exists():
            return
        for path in self.directory.iterdir():
            if path.name.endswith(UNFINISHED) or path.name in superseded:
                with self._writing():
                    path = path.rename(path.with_name(f"{path.name}.{time.time_ns()}{DELETED}"))
            if path.name.endswith(DELETED):
                self._deleting.submit(shutil.rmtree, path, ignore_errors=True)


class _ArraysHandler(ocp.StandardCheckpointHandler):
    """Has each process read the files that it has written at once, in the background as well."""

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[Any]:
        written = await super().async_save(directory, *args, **kwargs)
        own = Path(directory) / f"ocdbt.process_{jax.process_index()}"
        return [ChainedFuture(written or [], lambda: files.list_own_files(own))]

    @classmethod
    def typestr(cls) -> str:
        """The name in `_CHECKPOINT_METADATA`, by which others find what reads the arrays."""
        return ocp.StandardCheckpointHandler.typestr()


def _handlers() -> DefaultCheckpointHandlerRegistry:
    registry = DefaultCheckpointHandlerRegistry()
    arrays = {item: _ArraysHandler() for item in ARRAYS}
    metrics, progress = METRICS.split("/")[1], PROGRESS.split("/")[1]
    for item, handler in arrays.items():
        registry.add(item, ocp.args.StandardSave, handler)
        registry.add(item, ocp.args.StandardRestore, handler)
    for item, handler in {
        "metrics": ocp.JsonCheckpointHandler(metrics),
        "progress": ocp.JsonCheckpointHandler(progress),
    }.items():
        registry.add(item, ocp.args.JsonSave, handler)
        registry.add(item, ocp.args.JsonRestore, handler)
    return registry


def _check_leaves(where: Path, saved: dict[str, dict[str, str]], wanted: dict[str, Any]) -> None:
    """Every leaf that is missing, unexpected, or of another shape or dtype, at once."""
    problems = []
    for item, tree in wanted.items():
        found, asked = saved[item], _described(tree)
        problems += [f"{item}.{name} is missing" for name in asked if name not in found]
        problems += [f"{item}.{name} is unexpected" for name in found if name not in asked]
        problems += [
            f"{item}.{name} is {found[name]}, not {asked[name]}"
            for name in asked.keys() & found.keys()
            if found[name] != asked[name]
        ]
    if problems:
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


def _described(tree: Any) -> dict[str, str]:
    """`float32[16, 4]` of every leaf, by name."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _by_name(tree).items()}


def _shapes(tree: Any) -> Any:
    """Shapes, dtypes and shardings of the leaves: where and as what Orbax puts what it reads."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
