"""A training run: from a config to a directory with a trained model (`gptjax train`).

Three steps: the data; the model, its optimizer and the devices; `fit`. experiments/ has runs that
choose their own defaults and say what they found; runs in notebooks are `trial`'s.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from gptjax import distributed
from gptjax.config import ExperimentConfig, InputError, with_vocabulary
from gptjax.costs.model import Ledger, ledger
from gptjax.data.corpus import Corpus, Sources, learn_tokenizer, open_corpus, open_sources
from gptjax.data.pipeline import (
    EvaluationBatches,
    bits_per_byte,
    streamed_batches,
    training_batches,
)
from gptjax.data.tokenizers import Tokenizer
from gptjax.layers.attention.flash import resolve_kernel
from gptjax.models.build import Params, build, parameter_axes, split
from gptjax.parallel.keys import random_key
from gptjax.parallel.pipeline import bubble, microbatches
from gptjax.parallel.sharding import build_mesh, configure_cpu, mesh_name
from gptjax.runs.directory import (
    RESULT,
    SHOWING,
    Run,
    environment,
    hold,
    load_run,
    open_run,
    saved_tokenizer,
)
from gptjax.system.disk import is_failure, write_json
from gptjax.system.memory import check_training_fits
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.checkpoint_files import CHECKPOINTS
from gptjax.training.loop import Fit, fit
from gptjax.training.losses import training_loss
from gptjax.training.metrics import MFU_FORMULA, open_writers, peak_flops
from gptjax.training.optimizers import build_optimizer, learning_rate_schedule
from gptjax.training.prefetch import own_rows
from gptjax.training.step import state_shapes

Show = Callable[[Run, Sources, Corpus, Path], str]
"""(the trained run, its text, its rows, its directory) → the names of the files that it wrote."""


class Data(NamedTuple):
    """What a run reads: step 1."""

    config: ExperimentConfig
    """With the size of the vocabulary."""
    sources: Sources
    tokenizer: Tokenizer
    corpus: Corpus

    @property
    def size(self) -> str:
        """How much there is to train on."""
        rows = sum(map(len, self.corpus.train))
        if not rows:
            return "text as it is read"
        return f"{self.corpus.train_tokens:,} tokens in {rows:,} rows"

    def batches(self, hosts: dict[str, int]) -> tuple[Any, EvaluationBatches]:
        """Of this host: batches that train, without end, and those that validate."""
        config, corpus = self.config, self.corpus
        order = {"batch_size": config.train.batch_size, "seed": config.train.seed, **hosts}
        validation = EvaluationBatches(corpus.validation, config.train.batch_size, **hosts)
        if not config.data.streaming:
            return training_batches(corpus.train, config.data.weights, **order), validation
        length = config.model.context_length
        streamed = streamed_batches(
            self.sources, self.tokenizer, corpus.vocabulary, config.data, length, **order
        )
        return streamed, validation


class Program(NamedTuple):
    """The model, its optimizer and the devices: step 2."""

    graphdef: nnx.GraphDef
    init: Callable[[], Params]
    axes: Params
    """The letters of the parameters' axes, by which they are sharded."""
    optimizer: optax.GradientTransformation
    mesh: Mesh
    cost: Ledger
    lines: list[str]
    """What the log says of devices and attention."""


def run(
    config: ExperimentConfig,
    out: Path,
    overwrite: bool = False,
    *,
    show: Show,
    objectives: tuple[str, ...] = (),
) -> bool:
    """From a config to a directory with a trained model, and what `show` makes of that.

    Args:
      config: every choice of the run.
      out: the directory; the same one resumes the run.
      overwrite: whether to delete the run that is there and start anew.
      show: writes figures and samples by the best checkpoint, once result.json is there; what
        fails in it is a warning.
      objectives: those that the caller is for; () is all.

    Returns:
      Whether a run was trained to its end here: False if a finished one was there, and in all
      processes of a run but the first.

    Raises:
      InputError: an objective that the caller is not for, or what any of the steps refuses.
    """
    if objectives and config.data.objective not in objectives:
        raise InputError(
            f"data.objective is {config.data.objective!r}: this experiment is for "
            f"{' or '.join(objectives)}."
        )
    data = open_data(config, out, overwrite=overwrite)
    config, program = data.config, assemble(data.config)
    with hold(out, finished=overwrite):
        fingerprint = data.sources.fingerprint
        if open_run(out, config, data.tokenizer, fingerprint, overwrite=overwrite):
            print(f"{out} holds a finished run of this config; --overwrite starts it anew.")
            return False
        fitted = fit_run(data, program, out)
        if not distributed.is_first():
            return False
        reached = result(data, fitted)
        (out / SHOWING).touch()
        write_json(out / RESULT, reached)
        try:
            shown = f"{show(load_run(out), data.sources, data.corpus, out)}, "
        except Exception as error:  # The run is finished, whatever a figure comes to.
            if is_failure(error):
                raise
            shown = ""
            print(f"Warning: no figures or samples were made: {error}", file=sys.stderr)
        (out / SHOWING).unlink()
        print(
            f"{summary(reached)}\nIn {out}: {shown}result.json, metrics.jsonl, checkpoints/, "
            "train/ and validation/ for TensorBoard."
        )
        return True


def open_data(config: ExperimentConfig, out: Path, *, overwrite: bool) -> Data:
    """Step 1: text, tokenizer and rows; a run that is resumed has its tokenizer already."""
    sources = open_sources(config.data)
    saved = None if overwrite else saved_tokenizer(out, config.data, sources.fingerprint)
    tokenizer = saved or learn_tokenizer(config.data, sources)
    corpus = open_corpus(sources, tokenizer, config.data, config.model)
    return Data(with_vocabulary(config, corpus.vocabulary.size), sources, tokenizer, corpus)


def assemble(config: ExperimentConfig) -> Program:
    """Step 2: nothing is made yet, and what does not fit or cannot be sharded is refused."""
    cost = ledger(config.model)
    configure_cpu(cost.parameters)
    mesh, lines = devices(config)
    check_training_fits(config, sum(cost.state_bytes.values()), mesh.devices.flatten().tolist())
    platform, sequence = mesh.devices.flat[0].platform, mesh.shape["sequence"]
    model, attention = resolve_kernel(config.model, platform, sequence=sequence)
    graphdef, _ = split(nnx.eval_shape(lambda: build(model, rngs=nnx.Rngs(0))))
    axes = parameter_axes(config.model)
    optimizer = build_optimizer(config.optimizer, config.train.steps)

    def init() -> Params:
        return split(build(config.model, rngs=nnx.Rngs(random_key(config.train.seed))))[1]

    state_shapes(init, optimizer, mesh, axes)  # What the mesh cannot shard leaves no file.
    return Program(graphdef, init, axes, optimizer, mesh, cost, [*lines, *attention])


def fit_run(data: Data, program: Program, out: Path) -> Fit:
    """Step 3: train, with checkpoints and metrics in `out`."""
    config, cost = data.config, program.cost
    print(f"{cost.parameters:,} parameters; training on {data.size}.")
    print(*program.lines, sep="\n")
    peak = peak_flops()
    flops = f"{cost.training_flops:,} FLOPs, peak {peak.flops:.3g} ({peak.source})"
    print(f"{MFU_FORMULA}; {flops}.")
    learning_rate = learning_rate_schedule(
        config.optimizer, config.optimizer.learning_rate, config.train.steps
    )
    batches, validation = data.batches(own_rows(program.mesh))
    with (
        Checkpoints(out / CHECKPOINTS, keep_every=config.train.keep_every) as checkpoints,
        open_writers(out, config.train, checkpoints.last_step or 0) as writers,
    ):
        return fit(
            config.train,
            program.init,
            mesh=program.mesh,
            axes=program.axes,
            pmap=config.mesh.pmap,
            loss=training_loss(program.graphdef, config.train),
            optimizer=program.optimizer,
            batches=batches,
            validation=validation,
            checkpoints=checkpoints,
            writers=writers,
            describe=lambda step, tokens_per_second: {
                "learning_rate": float(jnp.asarray(learning_rate(step))),
                "mfu": tokens_per_second * cost.training_flops / peak.flops,
            },
        )


def devices(config: ExperimentConfig) -> tuple[Mesh, list[str]]:
    """The mesh of a run, and lines about it where there is more than one device."""
    rows = config.train.batch_size // config.train.grad_accumulation
    mesh = build_mesh(config.mesh, rows)
    platform, stages = mesh.devices.flat[0].platform, mesh.shape["pipeline"]
    lines = [f"Mesh: {mesh_name(mesh.shape)}, {mesh.size} x {platform}."] if mesh.size > 1 else []
    if stages > 1:
        parts = microbatches(rows, config.model.microbatches, mesh.shape)
        idle = bubble(stages, parts)
        lines.append(f"Pipeline: {stages} stages, {parts} microbatches, a bubble of {idle:.0%}.")
    return mesh, lines


def result(data: Data, fitted: Fit) -> dict[str, Any]:
    """What result.json says: losses, sizes, times, and the software and machine."""
    progress = fitted.progress
    reached = {
        "final_validation_loss": progress.last_loss,
        "best_validation_loss": progress.best_loss,
        "best_step": progress.best_step,
        "parameters": ledger(data.config.model).parameters,
        "tokens_seen": progress.tokens,
        "wall_seconds": progress.seconds,
        "compile_seconds": fitted.compile_seconds,
        **environment(),
    }
    if data.corpus.predicted:
        for name in ("final", "best"):
            loss = reached[f"{name}_validation_loss"]
            reached[f"{name}_bits_per_byte"] = bits_per_byte(data.corpus.predicted, loss)
    return reached


def summary(reached: dict[str, Any]) -> str:
    """How far a run came, in a line."""
    bits = reached.get("best_bits_per_byte")
    return (
        f"Best validation loss {reached['best_validation_loss']:.4f} nats per token"
        f"{f', {bits:.3f} bits per byte' if bits else ''}, at step {reached['best_step']}; "
        f"{reached['wall_seconds']:.0f} s."
    )
