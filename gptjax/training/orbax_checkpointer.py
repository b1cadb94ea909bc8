"""Orbax's checkpointer, set up for one directory of all processes, or for one of each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.future import ChainedFuture
from orbax.checkpoint.handlers import DefaultCheckpointHandlerRegistry
from orbax.checkpoint.metadata import metadata_store
from orbax.checkpoint.options import AsyncOptions, MultiprocessingOptions

from gptjax.training import checkpoint_files as files
from gptjax.training.checkpoint_files import ARRAYS, METRICS, PROGRESS


def checkpointer(
    written: Callable[[], None], *, read_only: bool, one_directory: bool
) -> ocp.AsyncCheckpointer:
    """A checkpointer of the items of a run's checkpoints.

    Args:
      written: is called when all items of a checkpoint are written, before its folder is renamed;
        by process 0, or by each if each has a directory.
      read_only: whether this process reads alone, as process 0 while it draws samples.
      one_directory: whether all processes write into one directory. If not, several processes
        write each chunk of an array as a file: OCDBT's databases would have to be merged.
    """
    alone = MultiprocessingOptions(jax.process_index(), {jax.process_index()})
    writing = MultiprocessingOptions(primary_host=0 if one_directory else None)
    processes = alone if read_only else writing
    asynchronous = AsyncOptions(
        post_finalization_callback=written,
        # Orbax would tell all processes when the first of them has made its own.
        create_directories_asynchronously=one_directory,
    )
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(
                multiprocessing_options=processes, async_options=asynchronous
            ),
            handler_registry=_handlers(writing, one_directory or jax.process_count() == 1),
        ),
        multiprocessing_options=processes,
        async_options=asynchronous,
        checkpoint_metadata_store=metadata_store(enable_write=True, blocking_write=True),
    )


def once(arrays: Any) -> Any:
    """Arrays that every device has, as they are on one; of one process.

    Of replicas Orbax saves a slice each, for which it compiles a program per shape.
    """
    if jax.process_count() > 1:
        return arrays

    def of_one(array: Any) -> Any:
        replicated = isinstance(array, jax.Array) and array.is_fully_replicated
        return array.addressable_data(0) if replicated else array

    return jax.tree.map(of_one, arrays)


class _ArraysHandler(ocp.StandardCheckpointHandler):
    """Has each process checksum its own files as soon as they are written, in the background."""

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[Any]:
        written = await super().async_save(directory, *args, **kwargs)
        own = Path(directory) / f"ocdbt.process_{jax.process_index()}"
        return [ChainedFuture(written or [], lambda: files.list_own_files(own))]

    @classmethod
    def typestr(cls) -> str:
        """The handler's name in `_CHECKPOINT_METADATA`, by which other programs read the arrays."""
        return ocp.StandardCheckpointHandler.typestr()


def _handlers(options: MultiprocessingOptions, ocdbt: bool) -> DefaultCheckpointHandlerRegistry:
    registry = DefaultCheckpointHandlerRegistry()
    for item in ARRAYS:
        handler = _ArraysHandler(use_ocdbt=ocdbt, multiprocessing_options=options)
        registry.add(item, ocp.args.StandardSave, handler)
        registry.add(item, ocp.args.StandardRestore, handler)
    for item, path in {"metrics": METRICS, "progress": PROGRESS}.items():
        handler = ocp.JsonCheckpointHandler(path.split("/")[1], multiprocessing_options=options)
        registry.add(item, ocp.args.JsonSave, handler)
        registry.add(item, ocp.args.JsonRestore, handler)
    return registry
