"""Table of the memory of large training steps, compiled for absent TPUs.

    python experiments/benchmarks/preflight_table.py

needs the extra `preflight`, some minutes per row and no TPU. `--rows 1 3` makes only the first and
the third row. MaxText's figures are of its own compilation of the same shapes (MaxText 0.2.5,
`train_compile`, jax 0.11.1): float32 parameters, Adam, full remat. `gathered` and `summed` are the
bytes of weights and gradients along `fsdp`, relative to theory.
"""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass

import tyro

GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A program of the table."""

    name: str
    shape: str
    """Flags of model and mesh."""
    choices: str
    """Flags that save memory, besides full remat."""
    peer: str
    """Peak of MaxText's step of the same shape (GiB per device), and CPU seconds of compilation."""


GPT2 = "gpt2 --topology v5e:4x4 --mesh data=1,fsdp=16 --seq 1024 --model.dropout 0"
LLAMA = (
    "llama-style --topology v5e:16x16 --mesh data=1,fsdp=256 --batch-per-device 4 --seq 2048 "
    "--model.depth 32 --model.width 4096 --model.heads 32 --model.kv-heads 32 "
    "--model.mlp-dim 11008 --model.vocab-size 32000 --model.no-tie-embeddings"
)
GPT3_22B = (
    "gpt3-13b --topology v5e:16x16 --mesh data=1,fsdp=64,tensor=4 --batch-per-device 4 "
    "--model.depth 48 --model.width 6144 --model.heads 24 --model.head-dim 256 "
    "--model.mlp-dim 24576 --model.vocab-size 50304 --model.attention full --model.window 0"
)
GPT3_175B = (
    "gpt3-175b --topology v5p:8x8x8 --mesh data=1,fsdp=64,tensor=8 --batch-per-device 4 --seq 2048 "
    "--model.vocab-size 50304"
)
DENSE = " --model.attention full --model.window 0"
ROWS = (
    Row("GPT-2 124M", f"{GPT2} --batch-per-device 8", "--train.loss-chunk 1024", "1.91; 61-71 s"),
    Row("GPT-2 124M", f"{GPT2} --batch-per-device 32", "--train.loss-chunk 1024", "7.01"),
    Row("Llama 2 7B", LLAMA, "--train.loss-chunk 512", "4.1; 94 s"),
    Row("Llama 2 7B", LLAMA, "--train.loss-chunk 512 --train.grad-accumulation 2", ""),
    Row("GPT-3 22B", f"{GPT3_22B} --seq 1024", "--train.loss-chunk 512", "5.8; 98 s"),
    Row(
        "GPT-3 22B",
        f"{GPT3_22B} --seq 2048",
        "--train.loss-chunk 512 --train.grad-accumulation 4",
        "",
    ),
    Row(
        "GPT-3 175B, dense",
        GPT3_175B + DENSE,
        "--train.loss-chunk 512 --model.remat-layers 2",
        "30.9; 90 s",
    ),
    Row(
        "GPT-3 175B, dense",
        GPT3_175B + DENSE,
        "--train.loss-chunk 512 --model.remat-layers 2 --train.grad-accumulation 2",
        "",
    ),
    Row(
        "GPT-3 175B, dense and local",
        GPT3_175B,
        "--train.loss-chunk 512 --model.remat-layers 2",
        "",
    ),
)


def main(rows: tuple[int, ...] = tuple(range(1, len(ROWS) + 1))) -> None:
    """Print the table as Markdown, each row as soon as it is compiled.

    Args:
      rows: Which of them, from 1.
    """
    print("| | model | on, mesh | batch per device, tokens | saves memory | GiB | CPU s ", end="")
    print("| MaxText | gathered | summed |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for number in rows:
        print(f"| {number} {line(ROWS[number - 1])}", flush=True)


def line(row: Row) -> str:
    """Returns one row, compiled in a subprocess, whose CPU time is the compiler's."""
    flags = [*shlex.split(row.shape), *shlex.split(row.choices)]
    command = [sys.executable, "-m", "gptjax", "preflight", *flags, "--json"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if not ended.stdout:
        raise SystemExit(ended.returncode)
    report = json.loads(ended.stdout)
    axes = ", ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1)
    cells = [
        row.name,
        f"{report['topology']}, {axes}",
        f"{report['batch_per_device']:g}, {report['sequence']:,}",
        f"`{row.choices}`",
        f"{report['peak_bytes'] / GIB:.2f}",
        f"{report['compile_cpu_seconds']:.0f}",
        row.peer,
        *(f"{theory['found'] / theory['bytes']:.0%}" for theory in report["expected"][:2]),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    tyro.cli(main)
