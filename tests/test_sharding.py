import os
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

from gptjax.config import MeshConfig
from gptjax.sharding import build_mesh

SMALL, MEDIUM, LARGE = 1_000_000, 20_000_000, 100_000_000


def run_python(program: str, **environment: str) -> str:
    """What a fresh process prints, which has not touched JAX yet."""
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(("batch_size", "devices"), [(16, 8), (12, 6), (7, 7), (11, 1), (1, 1)])
def test_the_mesh_takes_as_many_devices_as_share_the_batch_evenly(batch_size, devices):
    mesh = build_mesh(MeshConfig(), batch_size)
    assert mesh.shape["data"] == mesh.size == devices


@pytest.mark.parametrize(
    ("parameters", "environment", "devices"),
    [
        (SMALL, {}, min(len(os.sched_getaffinity(0)), 8)),
        (LARGE, {}, 1),
        (LARGE, {"JAX_NUM_CPU_DEVICES": "3"}, 3),
    ],
)
def test_a_small_model_has_a_device_a_core_and_a_large_one_has_one(
    parameters, environment, devices
):
    program = f"""
import jax
from gptjax.sharding import configure_cpu
configure_cpu({parameters})
print(jax.device_count())
"""
    assert run_python(program, **environment) == str(devices)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
@pytest.mark.parametrize(("parameters", "keeps"), [(SMALL, False), (MEDIUM, True), (LARGE, True)])
def test_large_temporary_blocks_are_faulted_in_once_where_models_are_large(parameters, keeps):
    size = 256 * 2**20
    program = f"""
import resource
from gptjax.sharding import configure_cpu
configure_cpu({parameters})
faults = []
for _ in range(3):
    block = b"x" * {size}
    del block
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[2] - faults[1])
"""
    faults = int(run_python(program))
    assert (faults < 100) == keeps


def test_who_holds_what_of_every_preset_is_as_written_down():
    golden = ROOT / "tests" / "golden"
    layouts = runpy.run_path(str(golden / "make_layouts.py"))["layouts"]
    assert list(layouts()) == (golden / "layouts.txt").read_text().splitlines()
