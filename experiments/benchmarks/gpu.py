"""Training and decoding on one GPU, beside PyTorch and beside what was predicted.

    python experiments/benchmarks/gpu.py --against lean-torch compiled-torch --json figures.json
    python experiments/benchmarks/gpu.py --only gpt2 gpt2-dropout
    python experiments/benchmarks/gpu.py --tiny

Training steps of random tokens in bfloat16 with float32 parameters, AdamW, and gradients clipped at
norm 1: GPT-2 124M as nanoGPT trains it (no biases, no dropout, 32 rows of 1,024 tokens), the same
with dropout 0.1, GPT-2 350M, and a Llama of 1.1 billion parameters. Layers are unrolled. For each:
milliseconds per step, tokens/s, MFU (tokens/s × training FLOPs per token / the data sheet's dense
bfloat16 FLOP/s), seconds of compilation, and the peak of the device's memory. `--against` times the
leanest GPT-2 in PyTorch in turn with ours, eager and by `torch.compile`, each in its own process;
`ratio` is our time over theirs.

`predicted` are the peak and the bounds of a step's time by `gptjax preflight` for the same step,
and the error of the peak with its sign. Then GPT-2 124M decodes 1 and 32 prompts, as by
`steps_and_tokens.py --decode`, beside Hugging Face's `generate` where `--against` is given.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from gpu_changes import head, row
from steps_and_tokens import (
    jax_steps,
    measure_decoding,
    print_decoding,
    random_batch,
    write_figures,
)
from timed_rounds import timed_rounds
from torch_baselines import lean_steps

from gptjax import TransformerConfig, model_cost, preset
from gptjax.cli import accept_all_characters
from gptjax.config import InputError, MeshConfig
from gptjax.costs.chips import chip_of
from gptjax.layers.attention.kernels import resolve_kernel, target
from gptjax.parallel.sharding import build_mesh
from gptjax.runs.result import environment
from gptjax.system.outputs import check_output
from gptjax.training.mfu import peak_flops

GIB = 2**30
GPT2 = {"vocab_size": 50304, "bias": False, "dropout": 0.0}
LLAMA = {"vocab_size": 32000, "context_length": 2048, "depth": 22, "width": 2048, "heads": 32}
LLAMA |= {"kv_heads": 4, "mlp_dim": 5632, "tie_embeddings": False}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    # name: (preset, fields, rows per step)
    "gpt2": ("gpt2", GPT2, 32),
    "gpt2-dropout": ("gpt2", {**GPT2, "dropout": 0.1}, 32),
    "gpt2-medium": ("gpt2-medium", GPT2, 16),
    "llama-1b": ("llama-style", LLAMA, 8),
}
TINY = {"context_length": 16, "depth": 1, "width": 16, "heads": 2, "vocab_size": 64}
TINY |= {"kv_heads": 0, "mlp_dim": 0, "dtype": "float32"}
OPPONENTS = {
    "lean-torch": lean_steps,
    "compiled-torch": functools.partial(lean_steps, compiled=True),
}
HEAD = "model", "runner", "ms", "range", "tokens/s", "MFU", "compile s", "peak GiB", "ratio"


def model(name: str, tiny: bool) -> tuple[TransformerConfig, int]:
    """Returns the config of that name, with its kernel, and the rows of a step."""
    base, fields, rows = MODELS[name]
    fields = {"dtype": "bfloat16", "scan_layers": False, **fields}
    if tiny:
        return dataclasses.replace(preset(base), **fields | TINY), 2
    config = dataclasses.replace(preset(base), **fields)
    return resolve_kernel(config, *target(build_mesh(MeshConfig(), 1)))[0], rows


def measure(name: str, against: list[str], steps: int, rounds: int, tiny: bool) -> dict[str, Any]:
    """Returns the figures of one model's training step."""
    config, rows = model(name, tiny)
    batch = random_batch(config, rows)
    runners = {"gptjax": functools.partial(jax_steps, config, batch)}
    if name.startswith("gpt2") and not config.dropout:
        runners |= {other: functools.partial(OPPONENTS[other], config, batch) for other in against}
    parameters = model_cost(config).parameters
    first, times, peaks = timed_rounds(runners, parameters, steps, rounds)
    peak = peak_flops()
    figures: dict[str, Any] = {"model": name, "rows": rows, "parameters": parameters}
    for runner, seconds in times.items():
        median = statistics.median(seconds)
        tokens_per_second = rows * config.context_length / median
        figures[runner] = {
            "milliseconds": 1000 * median,
            "fastest": 1000 * min(seconds),
            "slowest": 1000 * max(seconds),
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * model_cost(config).training_flops / peak.flops,
            "compile_seconds": first[runner] - steps * median,
            "peak_bytes": peaks[runner],
            "gptjax_over_this": statistics.median(times["gptjax"]) / median,
        }
    figures["predicted"] = None if tiny else predicted(name)
    return figures


def predicted(name: str) -> dict[str, Any]:
    """Returns what preflight predicts for that step on a GPU of this kind, or why it does not."""
    kind = jax.local_devices()[0].device_kind
    chip = chip_of(kind)
    if chip is None:
        return {"error": f"{kind} is not in gptjax/costs/chips.toml"}
    base, fields, rows = MODELS[name]
    changed = {**fields, "scan_layers": False, "remat": "none"}
    changed.pop("context_length", None)
    words = [flag(field.replace("_", "-"), value) for field, value in changed.items()]
    length = str(model(name, False)[0].context_length)
    shape = [
        "--topology",
        f"{chip.name.lower()}:1",
        "--batch-per-device",
        str(rows),
        "--seq",
        length,
    ]
    command = [sys.executable, "-m", "gptjax", "preflight", base, *shape, *words]
    ended = subprocess.run(
        [*command, "--train.loss-chunk=0", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    if ended.returncode:
        return {"error": (ended.stderr.strip().splitlines() or ["?"])[-1]}
    report = json.loads(ended.stdout)
    return {
        "peak_bytes": report["peak_bytes"],
        "step_seconds": report["step_seconds"],
        "attention": report["attention"],
    }


def flag(field: str, value: Any) -> str:
    """Returns the command-line flag that sets a field of the model."""
    if isinstance(value, bool):
        return f"--model.{field}" if value else f"--model.no-{field}"
    return f"--model.{field}={value}"


def print_step(figures: dict[str, Any]) -> None:
    """Print the figures of `measure`: a row per runner, and one of what was predicted."""
    for runner, found in figures.items():
        if not isinstance(found, dict) or "milliseconds" not in found:
            continue
        row(
            figures["model"],
            runner,
            f"{found['milliseconds']:.2f}",
            f"{found['fastest']:.2f}–{found['slowest']:.2f}",
            f"{found['tokens_per_second']:,.0f}",
            f"{found['mfu']:.1%}",
            f"{found['compile_seconds']:.0f}",
            f"{found['peak_bytes'] / GIB:.2f}",
            f"{found['gptjax_over_this']:.2f}",
        )
    forecast = figures["predicted"]
    if forecast is None:
        return
    if "error" in forecast:
        row(figures["model"], f"predicted: {forecast['error']}", *[""] * (len(HEAD) - 2))
        return
    shortest, longest = forecast["step_seconds"]
    measured, peak = figures["gptjax"]["peak_bytes"], forecast["peak_bytes"]
    error = f"{peak / GIB:.2f} ({peak / measured - 1:+.1%})"
    bounds = f"{1000 * shortest:.1f}–{1000 * longest:.1f}"
    row(figures["model"], "predicted", "", bounds, "", "", "", error, "")


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--against", choices=OPPONENTS, nargs="+", default=[], help="time these in turn with gptjax"
    )
    parser.add_argument("--only", choices=MODELS, nargs="+", help="these models (default all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each (default 3)")
    parser.add_argument("--no-decoding", action="store_true", help="time training alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    parser.add_argument("--tiny", action="store_true", help="shapes that run anywhere, to try it")
    asked = parser.parse_args()
    accept_all_characters()
    # This process only asks what the device is; its children share the memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if jax.default_backend() != "gpu" and not asked.tiny:
        parser.error("There is no GPU; --tiny runs small shapes without one.")
    if asked.rounds < 1:
        parser.error(f"--rounds is {asked.rounds}: it must be at least 1.")
    if asked.json:
        try:
            check_output(asked.json, overwrite=True)
        except InputError as error:
            parser.error(str(error))
    print(environment())
    head(*HEAD)
    training, decoding = [], []
    for name in asked.only or MODELS:
        training.append(
            measure(name, asked.against, 2 if asked.tiny else 15, asked.rounds, asked.tiny)
        )
        print_step(training[-1])
    peak = peak_flops()
    print(f"MFU of {peak.flops:.3g} FLOP/s ({peak.source}).\n")
    for rows in () if asked.no_decoding else (1, 32):
        base = "quickstart" if asked.tiny else "gpt2"
        config = dataclasses.replace(preset(base), dtype="float32" if asked.tiny else "bfloat16")
        against = ["torch"] if asked.against else []
        decoding.append(measure_decoding(config, base, rows, asked.rounds, against))
        print_decoding(decoding[-1])
    if asked.json:
        write_figures(asked.json, {"training": training, "decoding": decoding})


if __name__ == "__main__":
    main()
