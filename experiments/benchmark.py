"""How fast a training step runs here, and how that compares with PyTorch.

    python experiments/benchmark.py
    python experiments/benchmark.py --against torch --json figures.json

For each configuration: milliseconds a step, tokens/s, achieved GFLOP/s (exact model FLOPs of
`gptjax.ledger` over time) and their share of the machine's matrix-product peak, measured in the
same run. `--against torch` (pip install -e '.[torch]') times a Hugging Face GPT-2 of the same shape
with PyTorch's fused AdamW in turn with ours, A B A B, and prints the ratio of the medians; the
machine's speed drifts, so the ratio is the figure to quote. Random tokens, float32, gradients
clipped at norm 1, AdamW, no dropout: what nanoGPT's benchmark does.
"""

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from flax import nnx

from gptjax import Decoder, OptimizerConfig, TransformerConfig, ledger, split
from gptjax.data.pipeline import Batch
from gptjax.runs import environment
from gptjax.sharding import data_mesh, one_device_per_core
from gptjax.training.losses import causal_loss
from gptjax.training.metrics import measured_matmul_flops
from gptjax.training.optimizers import build_optimizer
from gptjax.training.step import compile_train_step, init_state

CONFIGURATIONS = {
    # name: (model, sequences a step, steps a round)
    "nanogpt-cpu": (
        TransformerConfig(vocab_size=65, context=64, depth=4, width=128, heads=4, bias=False),
        12,
        20,
    ),
    "baby": (
        TransformerConfig(vocab_size=65, context=256, depth=6, width=384, heads=6, bias=False),
        8,
        2,
    ),
    "gpt2-depth-4": (
        TransformerConfig(vocab_size=50304, context=512, depth=4, width=768, heads=12, bias=False),
        2,
        1,
    ),
}
LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.99), 0.1

RunSteps = Callable[[int], None]


def jax_steps(config: TransformerConfig, batch: Batch) -> RunSteps:
    """A function that runs a number of gptjax's training steps and waits for them."""
    graphdef, params = split(Decoder(config, rngs=nnx.Rngs(0)))
    beta1, beta2 = BETAS
    optimizer = build_optimizer(
        OptimizerConfig(
            learning_rate=LEARNING_RATE,
            beta1=beta1,
            beta2=beta2,
            weight_decay=WEIGHT_DECAY,
            schedule="constant",
            warmup_steps=0,
        ),
        steps=1,
    )
    mesh = data_mesh(len(batch.tokens))
    state = init_state(params, optimizer, mesh)
    step = compile_train_step(causal_loss(graphdef), optimizer, state, batch, mesh)

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch)
        float(metrics.loss)

    return run


def torch_steps(config: TransformerConfig, batch: Batch) -> RunSteps:
    """The same for a Hugging Face GPT-2 on PyTorch, eager, as its users run it."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.depth,
            n_head=config.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
    )
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
        fused=True,
    )
    tokens = torch.from_numpy(batch.tokens).long()
    targets = torch.from_numpy(batch.targets).long().flatten()

    def run(steps: int) -> None:
        for _ in range(steps):
            logits = model(tokens).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()

    return run


def random_batch(config: TransformerConfig, batch_size: int) -> Batch:
    """Tokens of no meaning, the same at every call."""
    shape = (batch_size, config.context + 1)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=shape, dtype=np.int32)
    ones = np.ones((batch_size, config.context), np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones)


def timed_rounds(runners: dict[str, RunSteps], steps: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a step of each runner in each round, the runners in turn."""
    milliseconds = {name: [] for name in runners}
    for number in range(rounds + 1):
        for name, run in runners.items():
            # PyTorch's idle threads spin for a while; let them go to sleep.
            time.sleep(0.3)
            start = time.perf_counter()
            run(steps)
            if number:
                milliseconds[name].append(1000 * (time.perf_counter() - start) / steps)
    return milliseconds


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection inside."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def measure(name: str, rounds: int, against: str | None) -> dict:
    """The figures of one configuration."""
    config, batch_size, steps = CONFIGURATIONS[name]
    batch = random_batch(config, batch_size)
    runners = {"gptjax": jax_steps(config, batch)}
    if against == "torch":
        runners["torch"] = torch_steps(config, batch)
    with no_collection():
        peak = measured_matmul_flops()
        times = timed_rounds(runners, steps, rounds)
    figures: dict = {"configuration": name}
    for runner, milliseconds in times.items():
        median = statistics.median(milliseconds)
        tokens_per_second = 1000 * batch.tokens.size / median
        flops = tokens_per_second * ledger(config).training_flops
        figures[runner] = {
            "milliseconds": median,
            "fastest": min(milliseconds),
            "slowest": max(milliseconds),
            "tokens_per_second": tokens_per_second,
            "gflops": flops / 1e9,
            "share_of_peak": flops / peak,
        }
    if against:
        figures["ratio"] = figures["gptjax"]["milliseconds"] / figures[against]["milliseconds"]
    figures["peak_gflops"] = peak / 1e9
    return figures


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", choices=["torch"], help="time this in turn with gptjax")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count (default 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    parser.add_argument(
        "--only", choices=CONFIGURATIONS, nargs="+", help="these configurations (default all)"
    )
    arguments = parser.parse_args()
    one_device_per_core()
    print(
        f"{'configuration':<14}{'runner':<8}{'ms/step':>9}{'range':>16}{'tokens/s':>10}"
        f"{'GFLOP/s':>9}{'of peak':>9}{'ratio':>7}"
    )
    results = []
    for name in arguments.only or CONFIGURATIONS:
        figures = measure(name, arguments.rounds, arguments.against)
        results.append(figures)
        for runner in ("gptjax", "torch"):
            if row := figures.get(runner):
                ratio = (
                    f"{figures['ratio']:.2f}" if runner == "gptjax" and arguments.against else ""
                )
                span = f"{row['fastest']:.1f}–{row['slowest']:.1f}"
                print(
                    f"{name:<14}{runner:<8}{row['milliseconds']:>9.1f}{span:>16}"
                    f"{row['tokens_per_second']:>10,.0f}{row['gflops']:>9.1f}"
                    f"{row['share_of_peak']:>9.1%}{ratio:>7}",
                    flush=True,
                )
    if arguments.json:
        content = {"configurations": results, **environment()}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
