"""Asynchronous checkpoints of a run: the last, the best, and every `keep_every` steps.

With orbax_checkpointer.py the only module that imports Orbax. A checkpoint `DIR/STEP/` holds four
items: `params` (the nested dict of arrays), `optimizer` (the same, by leaf name), `progress` (JSON:
the data iterator's state and the loop's own) and, after an evaluation, `metrics` (JSON: the
validation loss); and the checksums of their files. Writing and deleting are atomic, by renaming the
folder, so no partial checkpoint is ever visible. What is restored equals bit for bit what was
saved, or is refused. Of a run in a bucket, the directory is one of this process's own
(checkpoint_bucket.py).
"""

import contextlib
import functools
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

from gptjax import distributed
from gptjax.config import InputError, read_json_object
from gptjax.system.disk import CheckpointFailed, DiskError
from gptjax.system.mirrors import mirror_of
from gptjax.training import checkpoint_files as files
from gptjax.training.checkpoint_bucket import BucketCheckpoints
from gptjax.training.checkpoint_files import ARRAYS, HAS_LIST, METRICS, PROGRESS, Manifest
from gptjax.training.leaves import by_name, check_leaves, described, leaf_names, shapes_of
from gptjax.training.orbax_checkpointer import checkpointer, once
from gptjax.training.step import Params, State

VALIDATION_LOSS = "validation_loss"
UNFINISHED, DELETED = ocp.path.atomicity.TMP_DIR_SUFFIX, ".deleted"
"""Suffixes of folders that are not yet, or no longer, checkpoints."""
OS_ERROR = re.compile(r"os_error_code='(\d+)'")
"""How TensorStore's errors quote the errno of the operating system."""


class Restored(NamedTuple):
    """The content of a checkpoint."""

    state: State
    """Equal bit for bit to what was saved."""
    progress: dict[str, Any]
    """What the loop saved with it."""


class Checkpoints:
    """The checkpoints in a directory; a context manager that waits for the last write.

    Keeps the last, the best, and those at multiples of `keep_every` steps; 0 keeps no others. With
    `read_only` nothing is changed, not even a checkpoint that a live run is still writing. A
    checkpoint that lacks files, as after an interrupted deletion, is skipped with a line on
    standard error; no run deletes the newest, so that one is listed, and refused when it is read.

    Raises:
      InputError: a directory to write into whose best checkpoint cannot be determined.
    """

    def __init__(self, directory: Path, *, keep_every: int = 0, read_only: bool = False):
        # Orbax raises what fails in the background, and would log a traceback per thread besides.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.directory = directory.resolve()
        self._keep_every, self._read_only = keep_every, read_only
        found = mirror_of(self.directory)
        self._bucket = BucketCheckpoints(*found, writes=not read_only) if found else None
        if self._bucket:
            self._steps, self._incomplete = self._bucket.steps, {}
        else:
            self._steps, self._incomplete = files.survey(self.directory)
        if distributed.is_first():
            for step, what in self._incomplete.items():
                print(f"{self.directory / str(step)} is skipped: {what}.", file=sys.stderr)
        self._losses: dict[int, float | None] = {}
        if not read_only:
            _ = self.best_step  # Damage must be reported now, not in the middle of a run.
        self._saving: int | None = None
        self._failed = False
        self._arrays: dict[str, dict[str, str]] = {}
        self._checkpointer = checkpointer(
            self._list_files, read_only=read_only, one_directory=self._bucket is None
        )
        self._deleting = ThreadPoolExecutor(1)

    def __enter__(self) -> "Checkpoints":
        self._hook, sys.unraisablehook = sys.unraisablehook, self._show
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A failed write replaces only an error of the same disk; it must not hide any other.
        same = kind is None or issubclass(kind, (OSError, DiskError))
        hidden = [] if same else [CheckpointFailed]
        try:
            if self._bucket and kind:
                self._bucket.close()  # Other processes may have ended with this one.
            with contextlib.suppress(*hidden):
                self.wait()
        finally:
            self._checkpointer.close()
            self._deleting.shutdown()
            if not self._failed:  # Else its threads may still raise.
                sys.unraisablehook = self._hook

    def _show(self, unraisable: Any) -> None:
        """The hook for unraisable exceptions, silent about the consequences of a failed write.

        TensorStore's threads report their results to an event loop that Orbax has closed.
        """
        closed = str(unraisable.exc_value) == "Event loop is closed"
        if not (unraisable.exc_type is RuntimeError and closed):
            self._hook(unraisable)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn errors of the disk, in any thread, into a `CheckpointFailed`."""
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, InputError) and not isinstance(error, DiskError):
                raise
            number = OS_ERROR.search(str(error))
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
            elif isinstance(error, DiskError):
                reason = str(error).rstrip(".")
            elif number:
                reason = os.strerror(int(number[1]))
            elif "NOT_FOUND" in str(error):
                reason = "it was deleted in the meantime"
            else:
                raise
            self._failed = True
            # The directory itself may have been deleted.
            present = [step for step in self._steps if (self.directory / str(step)).is_dir()]
            self._steps = [step for step in present if step != self._saving]
            last = self.last_step
            kept = "there is none yet" if last is None else f"the last complete one is step {last}"
            raise CheckpointFailed(
                f"cannot write a checkpoint into {self.directory}: {reason}; {kept}, and the same "
                "command resumes from it."
            ) from error

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints, in order."""
        return list(self._steps)

    @property
    def last_step(self) -> int | None:
        """The step of the newest checkpoint; None where there is none."""
        return self._steps[-1] if self._steps else None

    @property
    def best_step(self) -> int | None:
        """The step of the checkpoint with the lowest validation loss; None before an evaluation.

        Raises:
          InputError: a damaged checkpoint that may be the best.
        """
        if self._steps and self._incomplete:  # The loop saved which it was.
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
        """Write `state` in the background, and delete the checkpoints that it supersedes.

        Raises:
          CheckpointFailed: this one, or the one before, could not be written.
        """
        self.wait()
        self._delete_superseded()
        optimizer = by_name(state.optimizer)
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(once(state.params)),
            "optimizer": ocp.args.StandardSave(once(optimizer)),
            "progress": ocp.args.JsonSave(progress),
        }
        if validation_loss is not None:
            items["metrics"] = ocp.args.JsonSave({VALIDATION_LOSS: validation_loss})
        self._saving = step = int(state.step)
        self._arrays = {"params": described(state.params), "optimizer": described(optimizer)}
        path, args = self.directory / str(step), ocp.args.Composite(**items)
        with self._writing():
            self._checkpointer.save(path, args=args, custom_metadata=HAS_LIST)
        self._steps.append(step)
        self._losses[step] = validation_loss

    def wait(self) -> None:
        """Wait until the last save is on disk, then delete the checkpoints that it supersedes.

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
        step, optimizer = self._step(step), by_name(like.optimizer)
        restored = self._read(step, params=like.params, optimizer=optimizer)
        structure, names = jax.tree.structure(like.optimizer), leaf_names(like.optimizer)
        optimizer = jax.tree.unflatten(structure, [restored["optimizer"][name] for name in names])
        done = jax.device_put(np.int32(step), like.step.sharding)
        return Restored(State(done, restored["params"], optimizer), restored["progress"])

    def restore_params(self, like: Params, step: int | None = None) -> Params:
        """The parameters alone, in the structure of `like` (arrays or their shapes).

        Raises:
          InputError: no checkpoint, a damaged one, or leaves that differ from those of `like`.
        """
        return self._read(self._step(step), params=like)["params"]

    def _read(self, step: int, **wanted: Any) -> Any:
        """The items `wanted`, each in the structure of its tree, and the loop's progress."""
        path, manifest = self.directory / str(step), self._checked(step, *wanted)
        items = {name: ocp.args.StandardRestore(shapes_of(tree)) for name, tree in wanted.items()}
        args = ocp.args.Composite(progress=ocp.args.JsonRestore(), **items)
        # Orbax and TensorStore have no common exception for unreadable files.
        try:
            arrays = manifest.arrays if manifest else files.arrays_of_older(path, wanted)
        except Exception as error:
            raise self._damaged(step, "it cannot be read") from error
        check_leaves(path, arrays, wanted)
        try:
            return self._checkpointer.restore(path, args=args)
        except Exception as error:
            raise self._damaged(step, "it cannot be read") from error

    def _step(self, step: int | None) -> int:
        if step in self._incomplete:
            raise self._damaged(step, self._incomplete[step])
        if not self._steps:
            raise InputError(f"{self.directory} holds no checkpoint.")
        if step is not None and step not in self._steps:
            known = ", ".join(map(str, self._steps))
            raise InputError(f"{self.directory} has no checkpoint of step {step}: it has {known}.")
        return self._steps[-1] if step is None else step

    def _checked(self, step: int, *wanted: str) -> Manifest | None:
        """The manifest of a checkpoint, once its files' checksums are verified.

        Of the arrays only those of `wanted` are read. Of the processes that resume a run each
        verifies a part of the files, and all raise what any of them finds.
        """
        path, manifest = self.directory / str(step), self._manifest(step)
        if manifest is None:
            if distributed.is_first():
                line = "was saved without checksums: damage to its arrays would not be noticed."
                print(f"The checkpoint {path} {line}", file=sys.stderr)
            return None
        unread = {*ARRAYS} - {*wanted}
        names = [name for name in manifest.files if name.split("/")[0] not in unread]
        if self._bucket:
            self._bucket.fetch(step, manifest, names)
        if self._read_only:
            found = [files.changed(path, manifest, names)]
        else:
            alone = self._bucket or jax.process_count() == 1
            own = names if alone else names[jax.process_index() :: jax.process_count()]
            problem = files.changed(path, manifest, own)
            found = distributed.meet(f"the checkpoint of step {step}", problem)
        for what in filter(None, found):
            raise self._damaged(step, what)
        return manifest

    def _manifest(self, step: int) -> Manifest | None:
        """The manifest of a checkpoint that lacks no file; None of an older one, which has none."""
        path = self.directory / str(step)
        try:
            manifest = files.read_list(path)
        except InputError as error:
            raise self._damaged(step, f"{files.LIST} is not what was written") from error
        lacks = functools.partial(self._bucket.lacks, step) if self._bucket else None
        if missing := files.missing_file(path, lacks):
            raise self._damaged(step, missing)
        return manifest

    def _json(self, step: int, name: str) -> dict[str, Any] | None:
        """The JSON object in a file of a checkpoint; None where it was saved without that file."""
        path, manifest = self.directory / str(step), self._manifest(step)
        if name not in manifest.files if manifest else not (path / name).exists():
            return None
        if manifest and (what := files.changed(path, manifest, [name])):
            raise self._damaged(step, what)
        try:
            return read_json_object(path / name)
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
        choice = f": delete that directory to use the checkpoints of step {others}"
        if not others:
            remedy = "--overwrite restarts the run" if step else "convert the model again"
            choice = f", and there is no other: {remedy}"
        path = self.directory / str(step)
        return InputError(f"The checkpoint {path} is damaged ({what}){choice}.")

    def _list_files(self) -> None:
        """Called when all items of a checkpoint are written, before it is renamed.

        On process 0, or of a run in a bucket on each.
        """
        assert self._saving is not None
        folder = self.directory / f"{self._saving}{UNFINISHED}"
        if self._bucket:
            self._bucket.upload(self._saving, folder, self._arrays)
        else:
            files.list_files(folder, self._arrays)

    def _delete_superseded(self) -> None:
        """Delete superseded and partial checkpoints, in the background of process 0."""
        every = self._keep_every
        kept = {self.last_step, self.best_step}
        kept |= {step for step in (*self._steps, *self._incomplete) if every and step % every == 0}
        superseded = {step for step in (*self._steps, *self._incomplete) if step not in kept}
        self._steps = [step for step in self._steps if step in kept]
        self._incomplete = {}
        if self._bucket and distributed.is_first():
            for step in sorted(superseded):
                self._deleting.submit(self._bucket.delete, step)
        if not self.directory.exists() or (jax.process_index() and not self._bucket):
            return
        for path in self.directory.iterdir():
            if path.name.endswith(UNFINISHED) or path.name in map(str, superseded):
                with self._writing():
                    path = path.rename(path.with_name(f"{path.name}.{time.time_ns()}{DELETED}"))
            if path.name.endswith(DELETED):
                self._deleting.submit(shutil.rmtree, path, ignore_errors=True)
