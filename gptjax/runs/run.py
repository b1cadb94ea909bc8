"""A training run: from a config to a directory with a trained model (`gptjax train`).

Three steps: the data; the model, its optimizer and the devices; `fit`. experiments/quickstart.py
spells out the same for one kind of text; for runs in notebooks see `trial`.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax import distributed
from gptjax.config import ExperimentConfig
from gptjax.costs.model import model_cost
from gptjax.parallel.pipeline import bubble, microbatches
from gptjax.parallel.sharding import build_mesh, configure_cpu, mesh_name
from gptjax.runs.assembly import assemble
from gptjax.runs.data import open_data
from gptjax.runs.directory import hold, open_run
from gptjax.runs.result import Show, finish
from gptjax.system.memory import check_training_fits
from gptjax.system.programs import keep_programs
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.checkpoint_files import CHECKPOINTS
from gptjax.training.loop import fit
from gptjax.training.mfu import MFU_FORMULA, peak_flops
from gptjax.training.optimizers import learning_rate_schedule
from gptjax.training.profile.steps import StepProfile
from gptjax.training.step import state_shapes
from gptjax.training.trackers import open_trackers

RATES = 1024
"""Steps whose learning rates are computed at once."""


def run(
    config: ExperimentConfig,
    out: Path,
    overwrite: bool = False,
    *,
    show: Show | None,
) -> bool:
    """Train a model, and write it with its figures and samples into a directory.

    Args:
      config: of the run.
      out: the directory; the same one resumes the run.
      overwrite: whether to delete an existing run and start over.
      show: writes figures and samples of the best checkpoint, after result.json; its failure is a
        warning. None writes none.

    Returns:
      Whether the run was trained to its end now: False if it was finished already, and in all
      processes but process 0.

    Raises:
      InputError: a config that any of the steps refuses, before anything is written.
    """
    data = open_data(config, out, overwrite=overwrite)
    config = data.config

    mesh, mesh_lines = devices(config)
    assembly = assemble(config, mesh)
    optimizer = assembly.optimizer()
    state_shapes(assembly.init, optimizer, mesh, assembly.axes)  # Raises before a file is written.

    with hold(out, finished=overwrite) as run_dir:
        if open_run(run_dir, config, data.tokenizer, data.sources.fingerprint, overwrite=overwrite):
            return False
        print(f"{model_cost(config.model).parameters:,} parameters; training on {data.size}.")
        print(*mesh_lines, *assembly.lines, sep="\n")
        batches, validation = data.batches(mesh)
        with (
            Checkpoints(run_dir / CHECKPOINTS, keep_every=config.train.keep_every) as checkpoints,
            open_trackers(run_dir, config.train, checkpoints.last_step or 0) as trackers,
        ):
            fitted = fit(
                config.train,
                assembly.init,
                mesh=mesh,
                axes=assembly.axes,
                pmap=config.mesh.pmap,
                loss=assembly.loss,
                optimizer=optimizer,
                batches=batches,
                validation=validation,
                checkpoints=checkpoints,
                trackers=trackers,
                describe=rate_and_mfu(config),
                activations=assembly.activations,
                profile=StepProfile(config, run_dir) if distributed.is_first() else None,
            )
        finish(run_dir, data, fitted, show=show)
    return distributed.is_first()


def devices(config: ExperimentConfig) -> tuple[Mesh, list[str]]:
    """The mesh of a run, and lines for the log where there is more than one device.

    Raises:
      InputError: devices that do not match the mesh, or a run that does not fit into memory.
    """
    cost = model_cost(config.model)
    configure_cpu(cost.parameters)
    rows = config.train.batch_size // config.train.grad_accumulation
    mesh = build_mesh(config.mesh, rows)
    keep_programs()
    check_training_fits(config, sum(cost.state_bytes.values()), mesh.devices.flatten().tolist())
    platform, stages = mesh.devices.flat[0].platform, mesh.shape["pipeline"]
    lines = [f"Mesh: {mesh_name(mesh.shape)}, {mesh.size} x {platform}."] if mesh.size > 1 else []
    if stages > 1:
        parts = microbatches(rows, config.model.microbatches, mesh.shape)
        idle = bubble(stages, parts)
        lines.append(f"Pipeline: {stages} stages, {parts} microbatches, a bubble of {idle:.0%}.")
    return mesh, lines


def rate_and_mfu(config: ExperimentConfig) -> Callable[[int, float], dict[str, float]]:
    """(step, tokens per second) → learning rate and MFU; prints the formula and the peak."""
    peak, flops = peak_flops(), model_cost(config.model).training_flops
    print(f"{MFU_FORMULA}; {flops:,} FLOPs, peak {peak.flops:.3g} ({peak.source}).")
    schedule = learning_rate_schedule(
        config.optimizer, config.optimizer.learning_rate, config.train.steps
    )
    rates = jax.jit(jax.vmap(lambda step: jnp.asarray(schedule(step))))

    @functools.lru_cache(maxsize=1)
    def block(number: int) -> np.ndarray:
        # Of many steps at once: a program for one would wait until the steps under way are made.
        return np.asarray(rates(number * RATES + np.arange(RATES, dtype=np.int32)))

    return lambda step, tokens_per_second: {
        "learning_rate": float(block(step // RATES)[step % RATES]),
        "mfu": tokens_per_second * flops / peak.flops,
    }
