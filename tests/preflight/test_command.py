"""`python -m gptjax preflight`, in processes of its own as users run it."""

import importlib.util
import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.preflight.settings import default_config
from gptjax.preflight.topology import ENVIRONMENT

ROOT = Path(__file__).parents[2]
QUICK = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
SMALL = (
    "quickstart --seq 128 --batch-per-device 2 --model.depth 2 --model.width 128 --model.heads 2 "
    "--json"
)
TPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[preflight]'"
)
GPU = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="needs the CUDA plugin: pip install -e '.[preflight]'",
)


def test_the_command_of_the_readme_is_the_first_row_of_its_table():
    readme = (ROOT / "gptjax" / "preflight" / "README.md").read_text()
    command = next(line for line in readme.splitlines() if " preflight gpt2 " in line)
    table = runpy.run_path(str(ROOT / "experiments" / "benchmarks" / "preflight_table.py"))
    row = table["ROWS"][0]
    flags = shlex.split(command.partition(" preflight ")[2])
    assert {*flags, "--train.loss-chunk", "1024"} == {
        *shlex.split(row.shape), *shlex.split(row.choices)
    }  # fmt: skip
    assert default_config("gpt2").train.loss_chunk == 1024  # So that the command need not say it.


def start(words: str, **environment: str) -> subprocess.Popen[str]:
    """The command in a new process, without the tests' own settings of XLA."""
    inherited = {name: value for name, value in os.environ.items() if name not in QUICK}
    for name in ENVIRONMENT:
        inherited.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-m", "gptjax", "preflight", *words.split()],
        cwd=ROOT,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def values(process: subprocess.Popen[str]) -> dict:
    """What it printed as JSON."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.mark.slow
@TPU
def test_two_processes_compile_a_tiny_step_for_a_tpu_at_once():
    flags = f"{SMALL} --topology v5e:2x2 --mesh data=1,fsdp=4"
    first, second = start(flags), start(f"{flags} --decode")
    training, decoding = values(first), values(second)
    assert training["fits"] is True
    assert training["mesh"]["fsdp"] == 4
    assert 0 < training["peak_bytes"] < training["available_bytes"] == int(15.75 * 2**30)
    assert sum(training["memory"].values()) >= training["peak_bytes"]
    gathers, sums = training["expected"]
    assert 0.9 < gathers["found"] / gathers["bytes"] < 1.2
    assert sums["found"] > 0
    assert decoding["memory"]["cache"] > 0 == decoding["memory"]["optimizer"]


@pytest.mark.slow
@GPU
def test_a_tiny_step_is_compiled_for_a_gpu():
    report = values(start(f"{SMALL} --topology h100:2"))
    assert report["fits"] is True
    assert report["memory"]["parameters"] > 0
    assert any(".py:" in buffer["source"] for buffer in report["largest"])
    assert {one["kind"] for one in report["collectives"]} == {"all-reduce"}


@TPU
@pytest.mark.slow
def test_a_process_that_locks_libtpu_is_told_of_in_one_sentence():
    holds = (
        "from gptjax.preflight.topology import *; import os;"
        "os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '0'; prepare_environment();"
        "open_topology('v5e:2x2'); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holds],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        waiting = start(f"{SMALL} --topology v5e:2x2", ALLOW_MULTIPLE_LIBTPU_LOAD="0")
        _, err = waiting.communicate(timeout=120)
        holder.stdin.close()
        holder.wait(timeout=60)
    assert waiting.returncode == 2
    assert "Another process holds libtpu: unset ALLOW_MULTIPLE_LIBTPU_LOAD, or wait for it." in err
    assert "Traceback" not in err


@TPU
@pytest.mark.large
def test_a_step_in_parts_is_compiled_where_its_sums_are_all_reduces():
    """XLA failed on the token table's gradient, converted after its sum and then added up."""
    flags = (
        "llama-style --topology v5e:4x4 --mesh data=1,fsdp=16 --batch-per-device 4 --seq 128 "
        "--model.depth 2 --model.width 256 --model.heads 2 --model.kv-heads 2 --model.mlp-dim 512 "
        "--model.vocab-size 32000 --model.no-tie-embeddings --train.loss-chunk 128 "
        "--train.grad-accumulation 2"
    )
    report = values(start(f"{flags} --json"))
    _, sums = report["expected"]
    assert 0.9 < sums["found"] / sums["bytes"] < 1.1


@TPU
@pytest.mark.large
def test_a_program_too_large_is_refused_with_its_largest_buffers():
    flags = (
        "gpt2 --topology v5e:2x2 --mesh data=1,fsdp=4 --seq 1024 --model.dropout 0 --model.depth 1"
    )
    process = start(f"{flags} --batch-per-device 512 --json")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1, err
    report = json.loads(out)
    assert report["fits"] is False
    assert report["refused_by_the_compiler"] is True
    assert report["peak_bytes"] > report["available_bytes"]
    assert report["largest"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("zzz --topology v5e:4x4", "Unknown preset 'zzz'"),
        ("gpt2 --topology v5e:5x5", "Unknown topology 'v5e:5x5': accepted are v5e:1x1, "),
        ("gpt2", "topology"),
        ("gpt2 --topology v5e:4x4 --model.remat all", "remat"),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence(command, words, sentence):
    code, out, err = command("preflight", *words.split())
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
