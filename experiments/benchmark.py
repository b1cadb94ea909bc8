"""How fast a training step runs here, and how that compares with PyTorch.

    python experiments/benchmark.py
    python experiments/benchmark.py --against torch --json figures.json

For each configuration: milliseconds a step, tokens/s, achieved GFLOP/s (exact model FLOPs of
`gptjax.ledger` over time) and their share of the machine's matrix-product peak, measured in the
same run. `--against torch` (pip install -e '.[torch]') times a Hugging Face GPT-2 of the same shape
with PyTorch's fused AdamW in turn with ours, A B A B, and prints our median over its median; the
machine's speed drifts, so the ratio is the figure to quote. `--against lean-torch` does the same
with the leanest GPT-2 that eager PyTorch allows. Random tokens, float32, gradients clipped at
norm 1, AdamW, no dropout: what nanoGPT's benchmark does.
"""

import argparse
import gc
import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from gptjax import Decoder, OptimizerConfig, TransformerConfig, ledger, split
from gptjax.data.pipeline import Batch
from gptjax.runs import environment, write_json
from gptjax.sharding import configure_cpu, data_mesh
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
        late = None
        for _ in range(steps):
            state, metrics = step(state, batch)
            if late is not None:
                float(late.loss)
            late = metrics
        jax.block_until_ready(state)

    return run


def huggingface_steps(config: TransformerConfig, batch: Batch) -> RunSteps:
    """The same for a Hugging Face GPT-2 on PyTorch, eager, as its users run it."""
    # By name, since torch and transformers are there only with the extra `torch`.
    transformers = importlib.import_module("transformers")
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context,
            n_embd=config.width,
            n_layer=config.depth,
            n_head=config.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    return torch_steps(lambda tokens: model(tokens).logits, list(model.parameters()), batch)


def lean_steps(config: TransformerConfig, batch: Batch) -> RunSteps:
    """The same for as lean a GPT-2 as eager PyTorch allows, what nanoGPT trains.

    No biases, one product for query, key and value, PyTorch's own attention kernel.
    """
    torch = importlib.import_module("torch")
    functional, width = torch.nn.functional, config.width

    def matrix(*shape: int):
        return (0.02 * torch.randn(shape)).requires_grad_()

    def norm(x, scale):
        return functional.layer_norm(x, (width,), scale)

    blocks = [
        {
            "attention_norm": torch.ones(width, requires_grad=True),
            "query_key_value": matrix(3 * width, width),
            "output": matrix(width, width),
            "feedforward_norm": torch.ones(width, requires_grad=True),
            "up": matrix(4 * width, width),
            "down": matrix(width, 4 * width),
        }
        for _ in range(config.depth)
    ]
    embedding, positions = matrix(config.vocab_size, width), matrix(config.context, width)
    last_norm = torch.ones(width, requires_grad=True)

    def logits(tokens):
        x = functional.embedding(tokens, embedding) + positions
        for block in blocks:
            projected = functional.linear(
                norm(x, block["attention_norm"]), block["query_key_value"]
            )
            query, key, value = (
                part.unflatten(2, (config.heads, -1)).transpose(1, 2)
                for part in projected.split(width, dim=2)
            )
            mixture = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + functional.linear(mixture.transpose(1, 2).flatten(2), block["output"])
            up = functional.linear(norm(x, block["feedforward_norm"]), block["up"])
            x = x + functional.linear(functional.gelu(up), block["down"])
        return functional.linear(norm(x, last_norm), embedding)

    leaves = [leaf for block in blocks for leaf in block.values()]
    return torch_steps(logits, [embedding, positions, last_norm, *leaves], batch)


def torch_steps(logits: Callable, parameters: list, batch: Batch) -> RunSteps:
    """A function that runs a number of training steps of a PyTorch model."""
    torch = importlib.import_module("torch")
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
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
            loss = torch.nn.functional.cross_entropy(logits(tokens).flatten(0, 1), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            loss.item()

    return run


def random_batch(config: TransformerConfig, batch_size: int) -> Batch:
    """Tokens of no meaning, the same at every call."""
    shape = (batch_size, config.context + 1)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=shape, dtype=np.int32)
    ones = np.ones((batch_size, config.context), np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones)


RUNNERS = {"gptjax": jax_steps, "torch": huggingface_steps, "lean-torch": lean_steps}


def serve(kind: str, name: str, connection: Connection) -> None:
    """Run steps of one runner in this process, a round at each request, answering with seconds."""
    config, batch_size, steps = CONFIGURATIONS[name]
    if kind == "gptjax":
        configure_cpu(ledger(config).parameters)
    batch = random_batch(config, batch_size)
    run = RUNNERS[kind](config, batch)
    run(steps)
    gc.disable()
    connection.send("ready")
    while connection.recv():
        start = time.perf_counter()
        run(steps)
        connection.send((time.perf_counter() - start) / steps)


def timed_rounds(name: str, kinds: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each runner in each round, the runners in turn.

    Each lives in a process of its own, so that neither disturbs the other's threads and memory.
    """
    spawn = multiprocessing.get_context("spawn")
    connections = {}
    for kind in kinds:
        connections[kind], other = spawn.Pipe()
        spawn.Process(target=serve, args=(kind, name, other), daemon=True).start()
        assert connections[kind].recv() == "ready"
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, connection in connections.items():
            connection.send(True)
            seconds[kind].append(connection.recv())
    for connection in connections.values():
        connection.send(False)
    return seconds


def measure(name: str, rounds: int, against: list[str], peak: float) -> dict:
    """The figures of one configuration."""
    config, batch_size, _ = CONFIGURATIONS[name]
    times = timed_rounds(name, ["gptjax", *against], rounds)
    figures: dict = {"configuration": name}
    for runner, seconds in times.items():
        median = statistics.median(seconds)
        tokens_per_second = batch_size * config.context / median
        flops = tokens_per_second * ledger(config).training_flops
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
    """A line of the table for each runner."""
    for runner in RUNNERS:
        if row := figures.get(runner):
            span = f"{row['fastest']:.1f}–{row['slowest']:.1f}"
            ratio = f"{row['gptjax_over_this']:.2f}" if "gptjax_over_this" in row else ""
            yield (
                f"{figures['configuration']:<14}{runner:<12}{row['milliseconds']:>9.1f}{span:>16}"
                f"{row['tokens_per_second']:>10,.0f}{row['gflops']:>9.1f}"
                f"{row['share_of_peak']:>9.1%}{ratio:>7}"
            )


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
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}: it must be at least 1.")
    if arguments.against and importlib.util.find_spec("transformers") is None:
        parser.error("--against needs PyTorch and transformers: pip install -e '.[torch]'.")

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
        write_json(
            arguments.json,
            {"peak_gflops": peak / 1e9, "configurations": results, **environment()},
        )


if __name__ == "__main__":
    main()
