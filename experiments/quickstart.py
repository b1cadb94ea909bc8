"""Train a small GPT on the text that every Python installation carries, and see what it learned.

    python experiments/quickstart.py

needs no network and leaves all it made in runs/quickstart. Any UTF-8 text will do instead:

    python experiments/quickstart.py --data.path FILE --out runs/mine
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from gptjax import Sampling, build, generate, ledger, plots, preset, split
from gptjax.cli import run_experiment
from gptjax.config import (
    DataConfig,
    ExperimentConfig,
    InputError,
    OptimizerConfig,
    TrainConfig,
    with_vocabulary,
)
from gptjax.data.pipeline import (
    Corpus,
    bits_per_byte,
    evaluation_batches,
    tokenize,
    training_batches,
)
from gptjax.data.sources import read_text
from gptjax.data.tokenizers import stream_text, train_tokenizer
from gptjax.runs import CHECKPOINTS, RESULT, Run, environment, load_run, open_run, write_json
from gptjax.sharding import configure_cpu
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.loop import Fit, fit
from gptjax.training.losses import token_loss
from gptjax.training.metrics import MFU_FORMULA, open_writers, peak_flops, read_jsonl
from gptjax.training.optimizers import build_optimizer, learning_rate_schedule

FAMILIES = ("decoder", "recurrent")
DEFAULTS = ExperimentConfig(
    model=dataclasses.replace(preset("quickstart"), vocab_size=0),
    data=DataConfig(),
    optimizer=OptimizerConfig(learning_rate=3e-3),
    train=TrainConfig(steps=1000, batch_size=16),
)


def train(config: ExperimentConfig, out: Path, overwrite: bool) -> None:
    """From a config to a directory with a trained model in it."""
    if config.model.family not in FAMILIES:
        raise InputError(
            f"TransformerConfig.family is {config.model.family!r}: "
            f"this experiment predicts the next token, with {' or '.join(FAMILIES)}."
        )
    text = read_text(config.data.path)
    tokenizer = train_tokenizer(config.data.tokenizer, text)
    config = with_vocabulary(config, tokenizer.vocab_size)
    corpus = tokenize(text, tokenizer, config.data, config.model.context)
    if open_run(out, config, tokenizer, corpus.fingerprint, overwrite=overwrite):
        print(f"{out} holds a finished run of this config; --overwrite starts it anew.")
        return

    cost = ledger(config.model)
    configure_cpu(cost.parameters)
    peak = peak_flops()
    print(f"{cost.parameters:,} parameters, {len(corpus.train):,} training tokens.")
    print(f"{MFU_FORMULA}; {cost.training_flops:,} FLOPs, peak {peak.flops:.3g} ({peak.source}).")

    graphdef, params = split(build(config.model, rngs=nnx.Rngs(config.train.seed)))
    learning_rate = learning_rate_schedule(
        config.optimizer, config.optimizer.learning_rate, config.train.steps
    )
    sizes = {"context": config.model.context, "batch_size": config.train.batch_size}
    with (
        Checkpoints(out / CHECKPOINTS) as checkpoints,
        open_writers(out, config.train.steps, checkpoints.last_step or 0) as writers,
    ):
        fitted = fit(
            config.train,
            params,
            loss=token_loss(
                graphdef,
                chunk=config.train.loss_chunk,
                label_smoothing=config.train.label_smoothing,
                z_loss=config.train.z_loss,
                balance_loss=config.train.balance_loss,
                router_z_loss=config.train.router_z_loss,
            ),
            optimizer=build_optimizer(config.optimizer, config.train.steps),
            batches=training_batches(corpus.train, seed=config.train.seed, **sizes),
            validation=evaluation_batches(corpus.validation, **sizes),
            checkpoints=checkpoints,
            writers=writers,
            describe=lambda step, tokens_per_second: {
                "learning_rate": float(jnp.asarray(learning_rate(step))),
                "mfu": tokens_per_second * cost.training_flops / peak.flops,
            },
        )
    show(load_run(out), corpus, out)
    write_json(out / RESULT, result(config, corpus, fitted))
    print(summary(config, corpus, fitted, out))


def show(run: Run, corpus: Corpus, out: Path) -> None:
    """Write the run's pictures and samples, by its best checkpoint."""
    line = first_line(run.tokenizer.decode(corpus.validation))
    sentence = run.tokenizer.encode(line)[: min(40, run.config.model.context)]
    labels = [plots.token_label(run.tokenizer.decode([token])) for token in sentence]
    plots.save(plots.loss_curve(read_jsonl(out / "metrics.jsonl")), out / "loss.png")
    if run.config.model.family == "decoder":
        output = run.model.hidden(jnp.asarray(sentence[None]), capture=("attention",))
        weights = np.array(output.captured["attention"][:, 0])
        plots.save(plots.attention_grid(weights, labels), out / "attention.png")

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


def first_line(text: str, least: int = 24, most: int = 40) -> str:
    """The beginning of the first line of at least `least` characters, or else of the text."""
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if len(line) >= least), text)[:most]


def result(config: ExperimentConfig, corpus: Corpus, fitted: Fit) -> dict:
    """The line that a run comes down to."""
    progress = fitted.progress
    return {
        "final_validation_loss": progress.last_loss,
        "final_bits_per_byte": bits_per_byte(corpus, progress.last_loss),
        "best_validation_loss": progress.best_loss,
        "best_bits_per_byte": bits_per_byte(corpus, progress.best_loss),
        "best_step": progress.best_step,
        "parameters": ledger(config.model).parameters,
        "tokens_seen": progress.step * config.train.batch_size * config.model.context,
        "wall_seconds": progress.seconds,
        "compile_seconds": fitted.compile_seconds,
        **environment(),
    }


def summary(config: ExperimentConfig, corpus: Corpus, fitted: Fit, out: Path) -> str:
    """What was reached, where it lies, and what to do next."""
    best = fitted.progress.best_loss
    pictures = "loss.png, attention.png" if config.model.family == "decoder" else "loss.png"
    return (
        f"Validation loss {best:.4f} nats a token, {bits_per_byte(corpus, best):.3f} bits a byte, "
        f"at step {fitted.progress.best_step}; {fitted.progress.seconds:.0f} s.\n"
        f"In {out}: {pictures}, samples.txt, result.json, metrics.jsonl, "
        f"tensorboard/, checkpoints/.\n"
        f'Next: python -m gptjax sample {out} --prompt "The "'
    )


if __name__ == "__main__":
    run_experiment(train, {"quickstart": DEFAULTS}, "runs/quickstart", __doc__)
