"""GPU ablations: effects of changes to the training step, decoding and small models' steps.

    python experiments/benchmarks/gpu_changes.py
    python experiments/benchmarks/gpu_changes.py --parts training --only base together
    python experiments/benchmarks/gpu_changes.py --tiny

`training` times GPT-2 124M (32 rows of 1,024 random tokens, bfloat16, cuDNN attention, no biases,
no dropout, AdamW) as it is now and with changes: what a CPU runs (float32 logits, GELU's derivative
kept, a condition around the update, sums of rows at once, norms' statistics computed again), singly
and together, and what is not done. The first is timed again at the end, to show the noise. `plan`
is the peak memory of XLA's plan. `decoding` is `generate`, greedy, GPT-2 124M with random weights:
the first call, with compilation, and the best of three more. `small` is the step of a model like
the quickstart's, one and ten per call. For both another run is profiled: the number of kernels on
the GPU, and the sum of their times.
Changes are monkeypatched into `gptjax` while this script traces.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import gzip
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from steps_and_tokens import random_batch

from gptjax import (
    Decoder,
    OptimizerConfig,
    Sampling,
    TransformerConfig,
    generate,
    model_cost,
    preset,
)
from gptjax.cli import accept_all_characters
from gptjax.config import MeshConfig
from gptjax.data.batch import Batch
from gptjax.layers import linear, mlp, norms, stack
from gptjax.layers.attention import module
from gptjax.models.build import split
from gptjax.parallel import platforms
from gptjax.parallel.sharding import build_mesh
from gptjax.runs.result import environment
from gptjax.training import cross_entropy
from gptjax.training import step as training_step
from gptjax.training.losses import token_loss
from gptjax.training.mfu import peak_flops
from gptjax.training.optimizers import build_optimizer
from gptjax.training.step import State, lower_train_step, train_step

TINY = {"depth": 1, "width": 16, "heads": 2, "context_length": 16, "vocab_size": 64}
TINY |= {"attention_kernel": "xla"}
OPTIMIZER = OptimizerConfig(learning_rate=6e-4, schedule="constant", warmup_steps=0)
Swap = tuple[Any, str, Any]
"""A module, the name of an attribute, and its replacement."""


@contextlib.contextmanager
def swapped(swaps: Sequence[Swap]) -> Iterator[None]:
    """Temporarily replace these attributes, and forget what was traced with others."""
    jax.clear_caches()
    with contextlib.ExitStack() as old:
        for module, name, new in swaps:
            old.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, new)
        yield


def as_on_cpu(*arguments: Any, gpu: Callable, other: Callable) -> Any:
    """`by_platform`, as if the program were for a CPU."""
    return other(*arguments)


def fused(x: jax.Array, *layers: linear.Linear) -> tuple[jax.Array, ...]:
    """`project` as one fused product."""
    kernels = [layer.kernel.reshape(layer.inputs[0], -1) for layer in layers]
    product = x.reshape(-1, x.shape[-1]) @ jnp.concatenate(kernels, axis=1).astype(x.dtype)
    if biases := [layer.bias.reshape(-1) for layer in layers if layer.bias is not None]:
        product = linear.add_bias(product, jnp.concatenate(biases))
    ends = np.cumsum([kernel.shape[1] for kernel in kernels])
    parts = zip(jnp.split(product, ends[:-1], axis=1), layers, strict=True)
    return tuple(part.reshape(*x.shape[:-1], *layer.outputs) for part, layer in parts)


def cast_first(stacks: Sequence[Any], depth: int, unstacked: Callable = stack.unstacked) -> list:
    """`unstacked` with kernels cast to bfloat16, whose gradients are stacked in bfloat16 too."""
    return unstacked(cast(list(stacks), jnp.bfloat16, axes=3), depth)


def cast(tree: Any, dtype: Any, axes: int = 2) -> Any:
    """Returns the tree with leaves of at least `axes` axes in `dtype`."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim >= axes else leaf, tree)


F32_LOGITS: Swap = (cross_entropy, "by_platform", as_on_cpu)
GELU: Swap = (mlp, "by_platform", as_on_cpu)
CONDITION: Swap = (training_step, "by_platform", as_on_cpu)
SUMS: Swap = (platforms, "_sum_in_two_steps", platforms._sum_at_once)
STATISTICS: Swap = (norms, "as_saved", lambda *arrays: arrays)
BEFORE = (F32_LOGITS, GELU, CONDITION, SUMS, STATISTICS)
FUSED_QKV: Swap = (module, "project", fused)
CAST_FIRST: Swap = (stack, "unstacked", cast_first)
CHANGES: dict[str, tuple[tuple[Swap, ...], dict[str, Any], dict[str, Any]]] = {
    # name: (swaps, fields of the model, options of the loss)
    "now": ((), {}, {}),
    "as-on-cpu": (BEFORE, {}, {}),
    "f32-logits": ((F32_LOGITS,), {}, {}),
    "gelu-kept": ((GELU,), {}, {}),
    "condition": ((CONDITION,), {}, {}),
    "sums-at-once": ((SUMS,), {}, {}),
    "loss-chunk-8192": ((), {}, {"chunk": 8192}),
    "statistics-recomputed": ((STATISTICS,), {}, {}),
    "fused-qkv": ((FUSED_QKV,), {}, {}),
    "bf16-before-split": ((CAST_FIRST,), {}, {}),
    "scanned": ((), {"scan_layers": True}, {}),
    "biases": ((), {"bias": True}, {}),
    "biases-as-on-cpu": (BEFORE, {"bias": True}, {}),
    "biases-sums-at-once": ((SUMS,), {"bias": True}, {}),
    "biases-fused-qkv": ((FUSED_QKV,), {"bias": True}, {}),
    "dropout": ((), {"dropout": 0.1, "attention_kernel": "triton"}, {}),
    "dropout-xla": ((), {"dropout": 0.1, "attention_kernel": "xla"}, {}),
}
SMALL: dict[str, tuple[tuple[Swap, ...], dict[str, Any]]] = {
    "biases": ((), {}),
    "biases, as on CPU": (BEFORE, {}),
    "biases, sums at once": ((SUMS,), {}),
    "biases, statistics recomputed": ((STATISTICS,), {}),
    "biases, fused qkv": ((FUSED_QKV,), {}),
    "no biases": ((), {"bias": False}),
}


DECODED: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float32": {"dtype": "float32"},
    "bfloat16, no biases": {"bias": False},
    "scanned": {"scan_layers": True},
}


def gpt2(tiny: bool, **fields: Any) -> TransformerConfig:
    """Returns GPT-2 124M in bfloat16, unrolled, or a tiny model that runs anywhere."""
    fields = {"dropout": 0.0, "dtype": "bfloat16", "scan_layers": False, **fields}
    return dataclasses.replace(preset("gpt2"), **{**fields, **(TINY if tiny else {})})


def structure(config: TransformerConfig) -> nnx.GraphDef:
    """Returns the model's graphdef."""
    return split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]


def first_state(config: TransformerConfig, optimizer: Any) -> State:
    """Returns the initial training state."""
    params = split(Decoder(config, rngs=nnx.Rngs(0)))[1]
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def timed(step: Callable, state: State, batch: Batch, calls: int) -> tuple[float, float, State]:
    """Returns seconds per call, the last loss, and the state."""
    state, metrics = step(state, batch)
    for _ in range(2):
        state, metrics = step(state, batch)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(calls):
        state, metrics = step(state, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / calls, float(metrics.loss.ravel()[-1]), state


def kernels(run: Callable[[], Any], times: int) -> tuple[str, str, str]:
    """Returns kernels per run, their total milliseconds, and the two longest, over `times` runs."""
    count, spent = collections.Counter(), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        for path in Path(folder).rglob("*.trace.json.gz"):
            events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
            of = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
            for event in events:
                if event.get("ph") == "X" and "GPU" in of.get(event["pid"], ""):
                    count[event["name"]] += 1
                    spent[event["name"]] += event["dur"] / 1000
    longest = (
        f"{count[name] / times:.0f} × `{name[:40]}` {milliseconds / times:.2f}"
        for name, milliseconds in spent.most_common(2)
    )
    return f"{count.total() / times:.0f}", f"{spent.total() / times:.2f}", ", ".join(longest)


def row(*cells: Any) -> None:
    """Print a row of a table in Markdown."""
    print("|", *(f"{cell} |" for cell in cells), flush=True)


def head(*cells: str) -> None:
    """Print the head of a table."""
    row(*cells)
    print("|---" * len(cells) + "|")


def measure_training(names: Sequence[str], rows: int, steps: int, tiny: bool) -> None:
    """The table of training steps."""
    base = {"vocab_size": 50304, "bias": False, "attention_kernel": "cudnn"}
    optimizer, mesh = build_optimizer(OPTIMIZER, steps=1), build_mesh(MeshConfig(), 1)
    configs, programs = {}, {}
    with ThreadPoolExecutor(6) as pool:
        for name in names:
            swaps, fields, options = CHANGES[name]
            config = configs[name] = gpt2(tiny, **{**base, **fields})
            loss, batch = token_loss(structure(config), **options), random_batch(config, rows)
            with swapped(swaps):
                state = jax.eval_shape(functools.partial(first_state, config, optimizer))
                lowered = lower_train_step(loss, optimizer, state, batch, mesh)
            programs[name] = pool.submit(lowered.compile)
    peak = peak_flops()
    head("change", "ms", "tokens/s", "MFU", "plan, GiB", "loss")
    for name in [*names, names[0]]:
        config, step = configs[name], programs[name].result()
        batch = jax.device_put(random_batch(config, rows))
        seconds, loss, _ = timed(step, first_state(config, optimizer), batch, steps)
        speed = rows * config.context_length / seconds
        share = speed * model_cost(config).training_flops / peak.flops
        plan = step.memory_analysis().peak_memory_in_bytes / 2**30
        cells = f"{speed:,.0f}", f"{share:.1%}", f"{plan:.2f}", f"{loss:.3f}"
        row(name, f"{1e3 * seconds:.2f}", *cells)
    print(f"MFU of {peak.flops:.3g} FLOP/s ({peak.source}).\n")


def measure_decoding(tokens: int, tiny: bool) -> None:
    """The table of decoding."""
    head("decoding", "rows", "first call, s", "ms per token", "kernels", "ms of them", "longest")
    for name, fields in DECODED.items():
        model = Decoder(gpt2(tiny, **fields), rngs=nnx.Rngs(0))
        for rows in (1, 2, 32):

            def decode(model: Decoder = model, rows: int = rows) -> None:
                greedy = Sampling(temperature=0)
                steps = generate(model, [[1] * 8] * rows, max_new_tokens=tokens, sampling=greedy)
                collections.deque(steps, maxlen=0)

            seconds = []
            for _ in range(4):
                start = time.perf_counter()
                decode()
                seconds.append(time.perf_counter() - start)
            first, best = f"{seconds[0]:.1f}", f"{1e3 * min(seconds[1:]) / tokens:.2f}"
            row(name, rows, first, best, *kernels(decode, tokens))
    print()


def measure_small(steps: int, tiny: bool) -> None:
    """The table of a small model's steps."""
    quickstart = TransformerConfig(vocab_size=512, context_length=128, depth=4, width=128, heads=4)
    optimizer = build_optimizer(OPTIMIZER, steps=1)
    head("small model", "steps per call", "ms per step", "kernels", "ms of them", "longest")
    programs = []
    with ThreadPoolExecutor(6) as pool:
        for name, (swaps, fields) in SMALL.items():
            config = dataclasses.replace(quickstart, **fields, **(TINY if tiny else {}))
            loss, batch = token_loss(structure(config)), random_batch(config, 16)
            one = functools.partial(train_step, loss=loss, optimizer=optimizer)
            for group in (1, 10) if name == "biases" else (1,):
                many = functools.partial(jax.lax.scan, one) if group > 1 else one
                batches = Batch.stack([batch] * group) if group > 1 else batch
                state = jax.eval_shape(functools.partial(first_state, config, optimizer))
                with swapped(swaps):
                    lowered = jax.jit(many, donate_argnums=0).lower(state, batches)
                programs.append((name, config, group, batches, pool.submit(lowered.compile)))
    for name, config, group, batches, compiled in programs:
        program, batches = compiled.result(), jax.device_put(batches)
        seconds, _, state = timed(program, first_state(config, optimizer), batches, steps // group)
        cells = kernels(functools.partial(program, state, batches), group)
        row(name, group, f"{1e3 * seconds / group:.2f}", *cells)
    print()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("training", "decoding", "small")
    parser.add_argument("--parts", choices=parts, nargs="+", help="what to time (default all)")
    parser.add_argument("--only", choices=CHANGES, nargs="+", help="these changes (default all)")
    parser.add_argument("--tiny", action="store_true", help="shapes that run anywhere, to try it")
    asked = parser.parse_args()
    accept_all_characters()
    if jax.default_backend() != "gpu" and not asked.tiny:
        parser.error("There is no GPU; --tiny runs small shapes without one.")
    rows, steps, tokens, small_steps = (2, 2, 8, 20) if asked.tiny else (32, 15, 128, 100)
    print(environment())
    for part in asked.parts or parts:
        if part == "training":
            measure_training(asked.only or list(CHANGES), rows, steps, asked.tiny)
        elif part == "decoding":
            measure_decoding(tokens, asked.tiny)
        else:
            measure_small(small_steps, asked.tiny)


if __name__ == "__main__":
    main()
