"""Character-level Tiny Shakespeare: nanoGPT's small benchmark, and the fastest way we know to it.

    python experiments/shakespeare_char.py --preset cpu --data.path .../tinyshakespeare/input.txt
    python experiments/shakespeare_char.py --preset fast --data.path .../tinyshakespeare/input.txt

`cpu` is nanoGPT's CPU configuration with AdamW. `fast` reaches the same loss in the fewest seconds.
"""

from quickstart import train

from gptjax.cli import run_experiment
from gptjax.config import (
    DataConfig,
    ExperimentConfig,
    OptimizerConfig,
    TrainConfig,
    TransformerConfig,
)

PRESETS = {
    "cpu": ExperimentConfig(
        model=TransformerConfig(context=64, depth=4, width=128, heads=4, bias=False),
        data=DataConfig(tokenizer="characters"),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, beta2=0.99),
        train=TrainConfig(steps=2000, batch_size=12),
    ),
}

if __name__ == "__main__":
    run_experiment(train, PRESETS, "runs/shakespeare_char", __doc__)
