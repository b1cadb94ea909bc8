"""Train a small GPT on the text that every Python installation carries, and see what it learned.

    python experiments/quickstart.py

needs no network and leaves all it made in runs/quickstart. Any UTF-8 text will do instead:

    python experiments/quickstart.py --data.source FILE --out runs/mine
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gptjax import Sampling, build, distributed, generate, ledger, plots, preset, probe, split
from gptjax.cli import run_experiment
from gptjax.config import (
    DataConfig,
    ExperimentConfig,
    InputError,
    OptimizerConfig,
    TrainConfig,
    with_vocabulary,
)
from gptjax.data.corpus import Corpus, Sources, learn_tokenizer, open_corpus, open_sources
from gptjax.data.pipeline import (
    EvaluationBatches,
    bits_per_byte,
    streamed_batches,
    training_batches,
)
from gptjax.data.report import labels
from gptjax.data.sources import Documents
from gptjax.data.tokenizers import stream_text
from gptjax.layers.attention.flash import resolve_kernel
from gptjax.models.build import Params, parameter_axes
from gptjax.parallel.keys import random_key
from gptjax.parallel.pipeline import bubble, microbatches
from gptjax.parallel.sharding import build_mesh, configure_cpu, mesh_name
from gptjax.runs.directory import (
    CHECKPOINTS,
    RESULT,
    Run,
    environment,
    hold,
    load_run,
    open_run,
    saved_tokenizer,
    write_json,
)
from gptjax.system.memory import check_training_fits
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.loop import Fit, fit
from gptjax.training.losses import training_loss
from gptjax.training.metrics import METRICS, MFU_FORMULA, open_writers, peak_flops, read_jsonl
from gptjax.training.optimizers import build_optimizer, learning_rate_schedule
from gptjax.training.prefetch import own_rows
from gptjax.training.step import state_shapes

DEFAULTS = ExperimentConfig(
    model=dataclasses.replace(preset("quickstart"), vocab_size=0),
    data=DataConfig(),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    train=TrainConfig(steps=1000, batch_size=16),
)


def quickstart(config: ExperimentConfig, out: Path, overwrite: bool) -> None:
    """Train a model that predicts the next token, and let it write."""
    if train(config, out, overwrite, objectives=("causal",), show=show):
        print(f'Next: python -m gptjax sample {out} --prompt "The "')


def train(
    config: ExperimentConfig,
    out: Path,
    overwrite: bool,
    *,
    objectives: tuple[str, ...],
    show: Callable[[Run, Sources, Corpus, Path], str],
) -> bool:
    """From a config to a directory with a trained model in it, and what `show` makes of that.

    False if such a run was there and finished, and in all processes of a run but the first.
    """
    if config.data.objective not in objectives:
        raise InputError(
            f"data.objective is {config.data.objective!r}: this experiment is for "
            f"{' or '.join(objectives)}."
        )
    sources = open_sources(config.data)
    saved = None if overwrite else saved_tokenizer(out, config.data, sources.fingerprint)
    tokenizer = saved or learn_tokenizer(config.data, sources)
    corpus = open_corpus(sources, tokenizer, config.data, config.model)
    config = with_vocabulary(config, corpus.vocabulary.size)
    cost = ledger(config.model)
    configure_cpu(cost.parameters)
    mesh, lines = devices(config)
    check_training_fits(config, sum(cost.state_bytes.values()), mesh.devices.flatten().tolist())
    hosts = own_rows(mesh)
    platform, sequence = mesh.devices.flat[0].platform, mesh.shape["sequence"]
    model, attention = resolve_kernel(config.model, platform, sequence=sequence)
    graphdef, _ = split(nnx.eval_shape(lambda: build(model, rngs=nnx.Rngs(0))))
    axes = parameter_axes(config.model)
    optimizer = build_optimizer(config.optimizer, config.train.steps)

    def init() -> Params:
        return split(build(config.model, rngs=nnx.Rngs(random_key(config.train.seed))))[1]

    state_shapes(init, optimizer, mesh, axes)  # What the mesh cannot part leaves no file.
    with hold(out, finished=overwrite):
        if open_run(out, config, tokenizer, sources.fingerprint, overwrite=overwrite):
            print(f"{out} holds a finished run of this config; --overwrite starts it anew.")
            return False

        print(f"{cost.parameters:,} parameters; training on {training_size(corpus)}.")
        print(*lines, *attention, sep="\n")
        peak = peak_flops()
        flops = f"{cost.training_flops:,} FLOPs, peak {peak.flops:.3g} ({peak.source})"
        print(f"{MFU_FORMULA}; {flops}.")
        learning_rate = learning_rate_schedule(
            config.optimizer, config.optimizer.learning_rate, config.train.steps
        )
        order = {"batch_size": config.train.batch_size, "seed": config.train.seed}
        if config.data.streaming:
            batches = streamed_batches(
                sources,
                tokenizer,
                corpus.vocabulary,
                config.data,
                config.model.context_length,
                **order,
                **hosts,
            )
        else:
            batches = training_batches(corpus.train, config.data.weights, **order, **hosts)
        with (
            Checkpoints(out / CHECKPOINTS, keep_every=config.train.keep_every) as checkpoints,
            open_writers(out, config.train, checkpoints.last_step or 0) as writers,
        ):
            fitted = fit(
                config.train,
                init,
                mesh=mesh,
                axes=axes,
                pmap=config.mesh.pmap,
                loss=training_loss(graphdef, config.train),
                optimizer=optimizer,
                batches=batches,
                validation=EvaluationBatches(corpus.validation, config.train.batch_size, **hosts),
                checkpoints=checkpoints,
                writers=writers,
                describe=lambda step, tokens_per_second: {
                    "learning_rate": float(jnp.asarray(learning_rate(step))),
                    "mfu": tokens_per_second * cost.training_flops / peak.flops,
                },
            )
        if not distributed.is_first():
            return False
        plots.save(plots.loss_curve(read_jsonl(out / METRICS)), out / "loss.png")
        told = show(load_run(out), sources, corpus, out)
        reached = result(config, corpus, fitted)
        write_json(out / RESULT, reached)
        print(
            f"{summary(reached)}\nIn {out}: loss.png, {told}, result.json, metrics.jsonl, "
            f"tensorboard/, checkpoints/."
        )
        return True


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


def training_size(corpus: Corpus) -> str:
    """How much there is to train on."""
    rows = sum(map(len, corpus.train))
    return f"{corpus.train_tokens:,} tokens in {rows:,} rows" if rows else "text as it is read"


def show(run: Run, sources: Sources, corpus: Corpus, out: Path) -> str:
    """Write the run's attention and samples, by its best checkpoint."""
    line = first_line(sources.validation[0])
    sentence = run.tokenizer.encode_prompt(line)[: min(40, run.config.model.context_length)]
    if run.config.model.family == "decoder":
        weights = np.asarray(probe.attention(run.model, sentence[None])[:, 0])
        said = map(plots.token_label, labels(sentence, run.tokenizer, corpus.vocabulary))
        title = plots.token_label(line).replace("·", " ")
        plots.save(plots.attention_grid(weights, list(said), title), out / "attention.png")

    prompts = np.tile(sentence, (4, 1))
    tokens = generate(
        run.model,
        prompts,
        max_new_tokens=300,
        sampling=Sampling(temperature=0.8, top_k=40),
        end_token=run.tokenizer.end_token,
        sliding_window=True,
    )
    samples = np.concatenate([prompts, np.stack(list(tokens), axis=1)], axis=1)
    texts = ["".join(stream_text(run.tokenizer, sample)) for sample in samples]
    (out / "samples.txt").write_text("\n\n----\n\n".join(texts) + "\n", encoding="utf-8")
    return "attention.png, samples.txt" if run.config.model.family == "decoder" else "samples.txt"


def first_line(documents: Documents, least: int = 24, most: int = 40) -> str:
    """The beginning of the first line of at least `least` characters, or else of the text.

    Of the first document that is not empty; a source has one.
    """
    text = next(filter(None, map(documents.__getitem__, range(len(documents)))))
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if len(line) >= least), text)[:most]


def result(config: ExperimentConfig, corpus: Corpus, fitted: Fit) -> dict:
    """The line that a run comes down to."""
    progress = fitted.progress
    reached = {
        "final_validation_loss": progress.last_loss,
        "best_validation_loss": progress.best_loss,
        "best_step": progress.best_step,
        "parameters": ledger(config.model).parameters,
        "tokens_seen": progress.tokens,
        "wall_seconds": progress.seconds,
        "compile_seconds": fitted.compile_seconds,
        **environment(),
    }
    if corpus.predicted:
        for name in ("final", "best"):
            loss = reached[f"{name}_validation_loss"]
            reached[f"{name}_bits_per_byte"] = bits_per_byte(corpus.predicted, loss)
    return reached


def summary(reached: dict) -> str:
    """How far it came."""
    bits = reached.get("best_bits_per_byte")
    return (
        f"Validation loss {reached['best_validation_loss']:.4f} nats a token"
        f"{f', {bits:.3f} bits a byte' if bits else ''}, at step {reached['best_step']}; "
        f"{reached['wall_seconds']:.0f} s."
    )


if __name__ == "__main__":
    run_experiment(quickstart, {"quickstart": DEFAULTS}, "runs/quickstart", __doc__)
