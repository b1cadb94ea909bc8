"""An experiment whose processes come to harm: TROUBLE=`SIGKILL 1 6` is process 1 at step 6.

Started by test_processes.py, in tests' manner of importing experiments. Leaves the
parameters of each checkpoint in OUT/STEP.npz, as process 0 saved them.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from gptjax.cli import run_experiment
from gptjax.config import InputError
from gptjax.runs.run import run
from gptjax.training import loop
from gptjax.training.checkpoint import Checkpoints

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
quickstart = importlib.import_module("quickstart")
trouble, process, at = os.environ.get("TROUBLE", "none 0 0").split()
agreed_stop, save = loop.agreed_stop, Checkpoints.save


def troubled(step: int, number: int | None) -> int | None:
    """Comes at every step of every process."""
    if (step, os.environ["JAX_PROCESS_ID"]) == (int(at), process):
        if trouble == "mistake":
            raise InputError("a mistake of its own.")
        os.kill(os.getpid(), signal.Signals[trouble])
    return agreed_stop(step, number)


def save_twice(self, state, progress, validation_loss=None) -> None:
    """As arrays, too; and on disk before the next step, whatever happens to that."""
    arrays = process_allgather(jax.tree.leaves(state.params), tiled=True)
    if jax.process_index() == 0:
        np.savez(self.directory.parent / f"{int(state.step)}.npz", *arrays)
    save(self, state, progress, validation_loss)
    self.wait()


def run_alone(config, out: Path, overwrite: bool) -> None:
    """Train, and show nothing."""
    run(config, out, overwrite, show=lambda *_: "no samples")


loop.agreed_stop, Checkpoints.save = troubled, save_twice
run_experiment(run_alone, {"quickstart": quickstart.DEFAULTS}, "runs/troubled", __doc__)
