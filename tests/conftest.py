"""What every test shares: eight virtual CPU devices, set before anything touches JAX."""

import gc
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# A program that two tests share, or two runs of the tests, is compiled once; to write down what is
# compiled in a moment would take longer.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# What a program computes is asked here, not how fast, and compiling is most of the time: XLA's
# own passes stay, and its code generator is a quicker one. Notebooks run as users run them.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# A program's code in one part, not in 32 compiled side by side: both cores have a worker, and
# 61 tests of the models and of interventions took 60 CPU seconds for 74.
os.environ["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"
# Of where in Python each operation comes from, the innermost frame, which preflight's report names:
# the stack of calls is written into every program, and looked at by nobody.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # Later ones know no such flag.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Tracing makes many objects and little garbage: looking for it as often as Python does takes 7% of
# the tests of steps and models (A B A B).
gc.set_threshold(50_000, 50, 50)


# The same examples at every run, so that the gate fails for a change alone.
settings.register_profile(
    "gate",
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("gate")


PROGRAMS = 400
"""Compiled programs that a worker keeps at most.

XLA's code for a CPU makes whatever the process does next slower: with 500 programs a new one's MLIR
context alone took 16 ms for 3, and 230 tests that compile 2,700 programs took 368 s of CPU time,
with this rule 201 s. Of 60 at most, too many are compiled again: 429 s.
"""


@pytest.fixture(scope="session")
def _compiled() -> list[float]:
    """The seconds of each program compiled since they were forgotten."""
    import jax.monitoring

    seconds: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    return seconds


@pytest.fixture(autouse=True)
def _few_programs(_compiled: list[float]) -> Iterator[None]:
    yield
    if len(_compiled) > PROGRAMS:
        import jax

        _compiled.clear()
        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of experiments/quickstart.py: characters, 4 steps.

    Read it only; a test that writes takes a copy.
    """
    from gptjax.config import (
        DataConfig,
        ExperimentConfig,
        OptimizerConfig,
        TrainConfig,
        TransformerConfig,
    )

    directory = tmp_path_factory.mktemp("tiny_run")
    text = directory / "text.txt"
    text.write_text("".join(f"{n} and {n * n} are a number and its square.\n" for n in range(60)))
    config = ExperimentConfig(
        model=TransformerConfig(depth=1, width=16, heads=2, context_length=32),
        data=DataConfig(source=(str(text),), tokenizer="characters"),
        optimizer=OptimizerConfig(warmup_steps=1, learning_rate=3e-3),
        train=TrainConfig(steps=4, batch_size=4, log_every=1, eval_every=2, checkpoint_every=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(EXPERIMENTS), *sys.path])
        quickstart = importlib.import_module("quickstart").quickstart
    quickstart(config, directory / "run", False)
    return directory / "run"


@pytest.fixture
def command(monkeypatch, capsys):
    """`python -m gptjax` with these words, in this process: exit code, output and errors."""
    from gptjax import cli

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gptjax", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    return run
