"""Train a small GPT on the text that every Python installation includes, and sample from it.

    python experiments/quickstart.py

needs no network and writes everything into runs/quickstart. Any UTF-8 text will do instead:

    python experiments/quickstart.py --data.source FILE --out runs/mine

This is a whole run on one page: data, model, optimizer, training, result. `gptjax train` does the
same (gptjax/runs/run.py) for every preset and objective.
"""

import dataclasses
from pathlib import Path

from gptjax import distributed, preset
from gptjax.cli import run_experiment
from gptjax.commands.outcomes import outcome
from gptjax.config import DataConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from gptjax.costs.model import model_cost
from gptjax.runs.assembly import assemble
from gptjax.runs.bucket import address
from gptjax.runs.data import open_data
from gptjax.runs.directory import CHECKPOINTS, hold, open_run
from gptjax.runs.result import finish
from gptjax.runs.run import devices, rate_and_mfu
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.loop import fit
from gptjax.training.optimizers import build_optimizer
from gptjax.training.profile.steps import StepProfile
from gptjax.training.step import state_shapes
from gptjax.training.trackers import open_trackers

DEFAULTS = ExperimentConfig(
    model=dataclasses.replace(preset("quickstart"), vocab_size=0),
    data=DataConfig(),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    train=TrainConfig(steps=1000, batch_size=16),
)


def quickstart(config: ExperimentConfig, out: Path, overwrite: bool) -> None:
    """Train a model that predicts the next token, and sample from it."""
    # The data: rows of tokens, which Grain shuffles by the seed and batches.
    data = open_data(config, out, overwrite=overwrite)
    config = data.config  # With the size of the vocabulary.
    mesh, about_mesh = devices(config)
    batches, validation = data.batches(mesh)

    # The model: a Flax module, used as a function of its parameters (`init` makes them, `loss` is
    # the cross-entropy on a batch), and Optax's update: clipping, AdamW, warm-up, decay.
    model = assemble(config, mesh)
    optimizer = build_optimizer(config.optimizer, config.train.steps, dtype=config.model.dtype)
    state_shapes(model.init, optimizer, mesh, model.axes)  # Raises before a file is written.

    # Training: one compiled step in a loop; Orbax saves its state, the same command resumes it.
    with hold(out, finished=overwrite) as run_dir:
        if open_run(run_dir, config, data.tokenizer, data.sources.fingerprint, overwrite=overwrite):
            return
        print(f"{model_cost(config.model).parameters:,} parameters; training on {data.size}.")
        print(*about_mesh, *model.lines, sep="\n")
        with (
            Checkpoints(run_dir / CHECKPOINTS, keep_every=config.train.keep_every) as checkpoints,
            open_trackers(run_dir, config.train, checkpoints.last_step or 0) as trackers,
        ):
            fitted = fit(
                config.train,
                model.init,
                loss=model.loss,
                optimizer=optimizer,
                batches=batches,
                validation=validation,
                mesh=mesh,
                axes=model.axes,
                pmap=config.mesh.pmap,
                checkpoints=checkpoints,
                trackers=trackers,
                describe=rate_and_mfu(config),
                activations=model.activations,
                profile=StepProfile(config, run_dir) if distributed.is_first() else None,
            )

        # The result: the loss reached, its curve, what every head attends to, samples.
        finish(run_dir, data, fitted, show=outcome)
    if distributed.is_first():
        print(f'Next: python -m gptjax sample {address(out)} --prompt "The "')


if __name__ == "__main__":
    run_experiment(
        quickstart, {"quickstart": DEFAULTS}, "runs/quickstart", __doc__, objectives=("causal",)
    )
