"""Character-level Tiny Shakespeare: nanoGPT's benchmarks, and a faster recipe for its CPU loss.

    python experiments/shakespeare_char.py --preset cpu --data.source .../tinyshakespeare/input.txt
    python experiments/shakespeare_char.py --preset fast --data.source .../tinyshakespeare/input.txt
    python experiments/shakespeare_char.py --preset gpu --data.source .../tinyshakespeare/input.txt

The first 90% of the characters train, the last 10% validate, all of them at every evaluation.

`cpu` is nanoGPT's CPU shape, batch and 2,000 steps with AdamW: validation loss 1.750 in 66 s.
`fast` stops near nanoGPT's loss of 1.88: 1.837, 1.860 and 1.869 (seeds 0, 1, 2) in 8 s each.
`gpu` is nanoGPT's small GPT for a GPU, with dropout 0.2; nanoGPT reports a validation loss of
1.4697. It has not run to its end here.
Seconds are the whole run's, 2 to 3 of them compilation, both on the same 2 cores (Intel Xeon,
Python 3.11, jax 0.10.2); experiments/README.md has what was tried on the way.
"""

from pathlib import Path

from gptjax.cli import run_experiment
from gptjax.commands.outcomes import outcome
from gptjax.config import (
    DataConfig,
    ExperimentConfig,
    OptimizerConfig,
    TrainConfig,
    TransformerConfig,
)
from gptjax.runs.run import run

PRESETS = {
    "cpu": ExperimentConfig(
        model=TransformerConfig(context_length=64, depth=4, width=128, heads=4, bias=False),
        data=DataConfig(tokenizer="characters"),
        # nanoGPT's rate of 1e-3 ends at 1.90 here.
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        train=TrainConfig(steps=2000, batch_size=12, eval_every=500, checkpoint_every=500),
    ),
    "fast": ExperimentConfig(
        model=TransformerConfig(
            context_length=64,
            depth=2,
            width=64,
            heads=4,
            position_embedding="rotary",
            norm="rmsnorm",
            bias=False,
        ),
        data=DataConfig(tokenizer="characters"),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=1e-2,
            muon_learning_rate=0.03,
            schedule="wsd",
            warmup_steps=10,
            decay_fraction=1.0,
            min_lr_ratio=0.0,
        ),
        train=TrainConfig(steps=450, batch_size=16, eval_every=450, checkpoint_every=450),
    ),
    "gpu": ExperimentConfig(
        model=TransformerConfig(
            context_length=256,
            depth=6,
            width=384,
            heads=6,
            bias=False,
            dropout=0.2,
            dtype="bfloat16",
        ),
        data=DataConfig(tokenizer="characters"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100),
        train=TrainConfig(steps=5000, batch_size=64, eval_every=250, checkpoint_every=1000),
    ),
}


def shakespeare_char(config: ExperimentConfig, out: Path, overwrite: bool) -> None:
    """Train a model that predicts the next character."""
    run(config, out, overwrite, show=outcome)


if __name__ == "__main__":
    run_experiment(
        shakespeare_char, PRESETS, "runs/shakespeare_char", __doc__, objectives=("causal",)
    )
