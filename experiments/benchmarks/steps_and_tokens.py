"""Speed of training steps and decoding on this machine, against PyTorch.

    python experiments/benchmarks/steps_and_tokens.py
    python experiments/benchmarks/steps_and_tokens.py --against torch --json figures.json
    python experiments/benchmarks/steps_and_tokens.py --decode --against torch
    python experiments/benchmarks/steps_and_tokens.py --decode --prompts 1 8 --dtype bfloat16

For each configuration: milliseconds per step, tokens/s, achieved GFLOP/s (exact model FLOPs of
`gptjax.model_cost` over time) and their share of the machine's matrix-product peak, measured in the
same run. `--against torch` (pip install -e '.[torch]') times a Hugging Face GPT-2 of the same shape
with PyTorch's fused AdamW in turn with ours, A B A B, and prints our median over its median; the
machine's speed drifts, so the ratio is the figure to quote. `--against lean-torch` does the same
with the leanest GPT-2 that eager PyTorch allows, `compiled-torch` with that by `torch.compile`.
Random tokens, float32, gradients clipped at norm 1, AdamW, no dropout, as nanoGPT's benchmark.

`--decode` times greedy decoding with a preset (default gpt2) instead, random weights, a call of
`generate` per round: the milliseconds between two tokens of a sequence, with the reading of the
prompts, and the first call's seconds, with compilation; and the same with int8 weights.
`--prompts 8` decodes 8 prompts of unequal length as one batch. Each token reads all weights except
embedding tables that are only indexed, so memory bandwidth sets a bound: the time of a compiled sum
over an array of as many bytes, on all cores, in turn with the rest. `--against torch` is Hugging
Face's `generate` with its cache, on the GPU if there is one.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import statistics
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from timed_rounds import timed_rounds
from torch_baselines import (
    BETAS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    RunSteps,
    huggingface_decoding,
    huggingface_steps,
    lean_steps,
    prompt_lengths,
)

from gptjax import (
    PRESETS,
    Decoder,
    OptimizerConfig,
    Sampling,
    TransformerConfig,
    build,
    generate,
    model_cost,
    preset,
    split,
)
from gptjax.cli import accept_all_characters
from gptjax.config import InputError, MeshConfig
from gptjax.config.values import DecodingWeights, Dtype
from gptjax.data.batch import Batch
from gptjax.parallel.sharding import build_mesh
from gptjax.runs.result import environment
from gptjax.system.outputs import check_output, write_whole
from gptjax.training.losses import token_loss
from gptjax.training.mfu import measured_matmul_flops
from gptjax.training.optimizers import build_optimizer
from gptjax.training.step import compile_train_step, init_state

CONFIGURATIONS = {
    # name: (model, sequences per step, steps per round)
    "nanogpt-cpu": (
        TransformerConfig(
            vocab_size=65, context_length=64, depth=4, width=128, heads=4, bias=False
        ),
        12,
        20,
    ),
    "baby": (
        TransformerConfig(
            vocab_size=65, context_length=256, depth=6, width=384, heads=6, bias=False
        ),
        8,
        2,
    ),
    "gpt2-depth-4": (
        TransformerConfig(
            vocab_size=50304, context_length=512, depth=4, width=768, heads=12, bias=False
        ),
        2,
        1,
    ),
}
TOKENS_A_ROUND = {"cpu": 64}
"""Of each sequence by platform, 256 on others."""


def jax_steps(config: TransformerConfig, batch: Batch) -> RunSteps:
    """Returns a function that runs training steps of gptjax and waits for them.

    The first call compiles the step.
    """
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
    mesh = build_mesh(MeshConfig(), len(batch.tokens))
    state = init_state(lambda: params, optimizer, mesh)
    compiled = functools.cache(
        lambda: compile_train_step(token_loss(graphdef), optimizer, state, batch, mesh)
    )

    def run(steps: int) -> None:
        nonlocal state
        step, late = compiled(), None
        for _ in range(steps):
            state, metrics = step(state, batch)
            if late is not None:
                float(late.loss)
            late = metrics
        jax.block_until_ready(state)

    return run


def random_batch(config: TransformerConfig, batch_size: int) -> Batch:
    """Returns random tokens, the same at every call."""
    shape = (batch_size, config.context_length + 1)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=shape, dtype=np.int32)
    ones = np.ones((batch_size, config.context_length), np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones)


RUNNERS = {
    "gptjax": jax_steps,
    "torch": huggingface_steps,
    "lean-torch": lean_steps,
    "compiled-torch": functools.partial(lean_steps, compiled=True),
}


def jax_decoding(
    config: TransformerConfig, rows: int, weights: DecodingWeights = "dtype"
) -> RunSteps:
    """Returns a function that decodes tokens with gptjax."""
    model, greedy = build(config, rngs=nnx.Rngs(0)), Sampling(temperature=0)

    def run(steps: int) -> None:
        prompts = [[0] * length for length in prompt_lengths(rows)]
        how = {"max_new_tokens": steps, "sampling": greedy, "weights": weights}
        for _ in generate(model, prompts, **how):
            pass

    return run


def memory_reads(config: TransformerConfig, rows: int) -> RunSteps:
    """The bandwidth bound of reading: as many bytes as the weights that a token reads."""
    return _passes(jnp.sum, decoding_bytes(config))


def memory_copies(config: TransformerConfig, rows: int) -> RunSteps:
    """The bandwidth bound of copying: as many bytes moved, half of them read and half written."""
    return _passes(jnp.copy, decoding_bytes(config) // 2)


def _passes(through: Callable[[jax.Array], jax.Array], size: int) -> RunSteps:
    numbers, compiled = jnp.ones(size // 4), jax.jit(through)

    def run(steps: int) -> None:
        for _ in range(steps):
            compiled(numbers).block_until_ready()

    return run


def decoding_bytes(config: TransformerConfig) -> int:
    """Returns bytes of weights read per decoded token, without indexed tables."""
    looked_up = config.context_length if config.position_embedding == "learned" else 0
    looked_up += 0 if config.tie_embeddings else config.vocab_size
    size = jnp.dtype(config.dtype).itemsize
    return size * (model_cost(config).parameters - looked_up * config.width)


BOUNDS = {"reading": memory_reads, "copying": memory_copies}
INT8 = functools.partial(jax_decoding, weights="int8")
DECODERS = {"gptjax": jax_decoding, "int8": INT8, **BOUNDS, "torch": huggingface_decoding}


def measure_decoding(
    config: TransformerConfig, name: str, rows: int, rounds: int, against: list[str]
) -> dict:
    """Returns the figures of decoding `rows` prompts with `config`, the preset `name`."""
    runners = {
        runner: functools.partial(DECODERS[runner], config, rows)
        for runner in ("gptjax", "int8", *BOUNDS, *against)
    }
    parameters = model_cost(config).parameters
    steps = TOKENS_A_ROUND.get(jax.default_backend(), 256)
    first, times, _ = timed_rounds(runners, parameters, steps, rounds)
    bounds = {name: statistics.median(times[name]) for name in BOUNDS}
    figures: dict = {
        "preset": name,
        "dtype": config.dtype,
        "prompts": rows,
        "new_tokens": steps,
        "weight_bytes": decoding_bytes(config),
    }
    for runner, seconds in times.items():
        median = statistics.median(seconds)
        figures[runner] = {
            "milliseconds": 1000 * median,
            "fastest": 1000 * min(seconds),
            "slowest": 1000 * max(seconds),
            "first_call_seconds": first[runner],
            "tokens_per_second": rows / median,
            "share_of_bounds": {name: bound / median for name, bound in bounds.items()},
            "gptjax_over_this": statistics.median(times["gptjax"]) / median,
        }
    return figures


def print_decoding(figures: dict) -> None:
    """Print the figures of `measure_decoding` as a table."""
    megabytes, dtype = figures["weight_bytes"] / 1e6, figures["dtype"]
    what = f"{figures['prompts']} x {figures['new_tokens']} tokens"
    print(f"{figures['preset']}, {what}: {megabytes:.1f} MB of {dtype} weights read per token")
    shares = "".join(f"{f'of {name}':>12}" for name in BOUNDS)
    print(
        f"{'runner':<10}{'ms/token':>9}{'range':>16}{'tokens/s':>10}{'first s':>9}"
        f"{shares}{'ratio':>7}"
    )
    for runner in DECODERS:
        if row := figures.get(runner):
            span = f"{row['fastest']:.2f}–{row['slowest']:.2f}"
            shares = "".join(f"{share:>12.1%}" for share in row["share_of_bounds"].values())
            print(
                f"{runner:<10}{row['milliseconds']:>9.2f}{span:>16}"
                f"{row['tokens_per_second']:>10,.0f}{row['first_call_seconds']:>9.1f}"
                f"{shares}{row['gptjax_over_this']:>7.2f}",
                flush=True,
            )


def measure(name: str, rounds: int, against: list[str], peak: float) -> dict:
    """Returns the figures of one configuration."""
    config, batch_size, steps = CONFIGURATIONS[name]
    batch = random_batch(config, batch_size)
    runners = {
        runner: functools.partial(RUNNERS[runner], config, batch) for runner in ("gptjax", *against)
    }
    _, times, _ = timed_rounds(runners, model_cost(config).parameters, steps, rounds)
    figures: dict = {"configuration": name}
    for runner, seconds in times.items():
        median = statistics.median(seconds)
        tokens_per_second = batch_size * config.context_length / median
        flops = tokens_per_second * model_cost(config).training_flops
        figures[runner] = {
            "milliseconds": 1000 * median,
            "fastest": 1000 * min(seconds),
            "slowest": 1000 * max(seconds),
            "tokens_per_second": tokens_per_second,
            "gflops": flops / 1e9,
            "share_of_peak": flops / peak,
        }
    for other in against:
        ours, theirs = figures["gptjax"]["milliseconds"], figures[other]["milliseconds"]
        figures[other]["gptjax_over_this"] = ours / theirs
    return figures


def table_rows(figures: dict) -> Iterator[str]:
    """Yields a line of the table per runner."""
    for runner in RUNNERS:
        if row := figures.get(runner):
            span = f"{row['fastest']:.1f}–{row['slowest']:.1f}"
            ratio = f"{row['gptjax_over_this']:.2f}" if "gptjax_over_this" in row else ""
            yield (
                f"{figures['configuration']:<14}{runner:<12}{row['milliseconds']:>9.1f}{span:>16}"
                f"{row['tokens_per_second']:>10,.0f}{row['gflops']:>9.1f}"
                f"{row['share_of_peak']:>9.1%}{ratio:>7}"
            )


def write_figures(path: Path, figures: dict) -> None:
    """Write the figures as JSON, with the versions and the device."""
    content = json.dumps({**figures, **environment()}, indent=2, ensure_ascii=False)
    write_whole(path, f"{content}\n", overwrite=True)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--against",
        choices=[name for name in RUNNERS if name != "gptjax"],
        nargs="+",
        default=[],
        help="time these in turn with gptjax: Hugging Face's GPT-2, or a lean one, in PyTorch",
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each (default 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    parser.add_argument(
        "--only", choices=CONFIGURATIONS, nargs="+", help="these configurations (default all)"
    )
    parser.add_argument(
        "--decode",
        choices=PRESETS,
        nargs="?",
        const="gpt2",
        metavar="PRESET",
        help="time decoding with a preset (default gpt2)",
    )
    parser.add_argument(
        "--prompts", type=int, nargs="+", default=[1], help="sequences at once (default 1)"
    )
    parser.add_argument(
        "--dtype", choices=typing.get_args(Dtype), default="float32", help="of decoding"
    )
    arguments = parser.parse_args()
    accept_all_characters()
    if arguments.json:
        try:
            check_output(arguments.json, overwrite=True)
        except InputError as error:
            parser.error(str(error))
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}: it must be at least 1.")
    if arguments.against and importlib.util.find_spec("transformers") is None:
        parser.error("--against needs PyTorch and transformers: pip install -e '.[torch]'.")
    if arguments.decode:
        if {*arguments.against} - {"torch"}:
            parser.error("--decode is timed against torch only.")
        config = dataclasses.replace(preset(arguments.decode), dtype=arguments.dtype)
        decoding = []
        for rows in arguments.prompts:
            how = arguments.decode, rows, arguments.rounds, arguments.against
            decoding.append(measure_decoding(config, *how))
            print_decoding(decoding[-1])
        if arguments.json:
            write_figures(arguments.json, {"decoding": decoding})
        return

    peak = measured_matmul_flops()
    print(f"matrix-product peak {peak / 1e9:.0f} GFLOP/s (2048 × 2048 × 2048, float32)")
    print(
        f"{'configuration':<14}{'runner':<12}{'ms/step':>9}{'range':>16}{'tokens/s':>10}"
        f"{'GFLOP/s':>9}{'of peak':>9}{'ratio':>7}"
    )
    results = []
    for name in arguments.only or CONFIGURATIONS:
        results.append(measure(name, arguments.rounds, arguments.against, peak))
        print(*table_rows(results[-1]), sep="\n", flush=True)
    if arguments.json:
        write_figures(arguments.json, {"peak_gflops": peak / 1e9, "configurations": results})


if __name__ == "__main__":
    main()
