"""The memory of large training steps, compiled for TPUs that are not there, as a table.

    python experiments/preflight_table.py

needs the extra `preflight`, some minutes a row and no TPU. `--rows 1` makes the first row alone.
MaxText's figures are of its own compilation of the same shapes (MaxText 0.2.5, `train_compile`, jax
0.11.1): float32 parameters, Adam, full remat.
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
    flags: str
    peer: str
    """GiB a device that MaxText's step of the same shape peaks at."""


LARGE = "--model.attention full --model.window 0 --model.vocab-size 50304 --seq 2048"
LLAMA = (
    "--model.depth 32 --model.width 4096 --model.heads 32 --model.kv-heads 32 --model.hidden 11008 "
    "--model.vocab-size 32000 --model.no-tied --seq 2048"
)
ROWS = (
    Row(
        "GPT-2 124M",
        "gpt2 --topology v5e:4x4 --mesh data=1,fsdp=16 --batch-per-device 8 --seq 1024 "
        "--model.dropout 0",
        "1.91",
    ),
    Row(
        "GPT-2 124M",
        "gpt2 --topology v5e:4x4 --mesh data=1,fsdp=16 --batch-per-device 32 --seq 1024 "
        "--model.dropout 0",
        "7.01",
    ),
    Row(
        "Llama 2 7B",
        f"llama-style --topology v5e:16x16 --mesh data=1,fsdp=256 --batch-per-device 4 {LLAMA}",
        "4.1",
    ),
    Row(
        "GPT-3 22B",
        "gpt3-13b --topology v5e:16x16 --mesh data=1,fsdp=256 --batch-per-device 4 "
        f"--model.depth 48 --model.width 6144 --model.heads 64 --model.head-size 96 {LARGE}",
        "5.8",
    ),
    Row(
        "GPT-3 175B",
        "gpt3-175b --topology v5p:8x8x8 --mesh data=1,fsdp=64,tensor=8 --batch-per-device 4 "
        f"{LARGE}",
        "30.9",
    ),
)


def main(rows: int = len(ROWS)) -> None:
    """Print the table as Markdown, a row as soon as it is compiled.

    Args:
      rows: How many of them, from the first.
    """
    print(
        "| model | topology, batch a device, tokens | GiB | MaxText | CPU s | gathered | summed |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for row in ROWS[:rows]:
        print(line(row), flush=True)


def line(row: Row) -> str:
    """One row, compiled in a process of its own, whose CPU time is that of the compiler alone."""
    command = [sys.executable, "-m", "gptjax", "preflight", *shlex.split(row.flags), "--json"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if not ended.stdout:
        raise SystemExit(ended.returncode)
    told = json.loads(ended.stdout)
    shares = [f"{theory['found'] / theory['bytes']:.0%}" for theory in told["expected"][:2]]
    where = f"{told['topology']}, {told['batch_per_device']:g}, {told['sequence']:,}"
    memory = f"{told['peak_bytes'] / GIB:.2f}"
    seconds = f"{told['compile_cpu_seconds']:.0f}"
    return f"| {' | '.join([row.name, where, memory, row.peer, seconds, *shares])} |"


if __name__ == "__main__":
    tyro.cli(main)
