"""What preemptions cost: a run of two processes, killed at random moments, with goodput's table.

    python experiments/benchmarks/preemptions.py --kills 20

Both processes are killed by SIGKILL, as when their machines are taken away, and the same command is
started again at once; the last time it is stopped by SIGTERM, which saves. It is done twice, with
JAX's compilation cache, which runs have by default, and without.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from gptjax.runs.goodput import goodput, table

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"
FLAGS = (
    "--model.depth=4",
    "--model.width=128",
    "--model.heads=4",
    "--train.steps=1000000",
    "--train.checkpoint-minutes=0.05",
    "--train.log-every=50",
    "--train.eval-every=500",
)
CACHE = "JAX_COMPILATION_CACHE_DIR"


def live(out: Path, cache: str, seconds: float, number: signal.Signals) -> None:
    """One life of the run: it is started, and ended by a signal after so many seconds."""
    command = [sys.executable, "-m", "gptjax", "launch", str(QUICKSTART), *FLAGS, f"--out={out}"]
    with (out.parent / "log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, CACHE: cache},
        )
    time.sleep(seconds)
    if process.poll() is not None:
        print((out.parent / "log").read_text()[-2000:])
        raise SystemExit("It ended by itself.")
    if number == signal.SIGKILL:
        for each in psutil.Process(process.pid).children(recursive=True):
            each.kill()
    process.send_signal(number)
    process.wait()


def main() -> None:
    """The trial as a command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, nargs=2, default=(12, 40), help="of each life")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    for kept in (True, False):
        directory, draw = Path(tempfile.mkdtemp()), random.Random(wanted.seed)
        out, cache = directory / "run", str(directory / "programs") if kept else ""
        for _ in range(wanted.kills):
            live(out, cache, draw.uniform(*wanted.seconds), signal.SIGKILL)
        live(out, cache, max(wanted.seconds), signal.SIGTERM)
        found = goodput(out)
        print(f"{'With' if kept else 'Without'} the compilation cache, {wanted.kills} kills:")
        print(table(found), end="\n\n", flush=True)
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
