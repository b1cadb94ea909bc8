import importlib
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from conftest import EXPERIMENTS, ROOT

from gptjax.cli import run_experiment
from gptjax.config import ExperimentConfig, InputError, MeshConfig, TrainConfig
from gptjax.parallel.sharding import AXES, build_mesh, parameter_sharding
from gptjax.runs.run import devices

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
from gptjax.parallel.sharding import configure_cpu
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
from gptjax.parallel.sharding import configure_cpu
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


@pytest.mark.parametrize(
    ("sizes", "rows", "sentence"),
    [
        ({"fsdp": 3}, 24, r"The mesh is data 2 x fsdp 3, 6 devices: there are 8\."),
        ({"data": 4}, 8, r"The mesh is data 4, 4 devices: there are 8\."),
        ({"tensor": 16}, 8, r"The mesh is tensor 16, 16 devices: there are 8\."),
        (
            {"data": 2, "fsdp": 2, "expert": 2},
            12,
            r"12 rows: it must be .* data x fsdp x expert = 8\.",
        ),
        ({"slices": 2}, 8, r"MeshConfig\.slices is 2: the 8 devices are of 1\."),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, rows, sentence):
    with pytest.raises(InputError, match=sentence):
        build_mesh(MeshConfig(**sizes), rows)


@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        ("data", -1, {}),
        ("tensor", 0, {}),
        ("data", 3, {"slices": 2}),
        ("pmap", True, {"fsdp": 2}),
    ],
)
def test_sizes_that_mean_nothing_are_refused(field, value, others):
    with pytest.raises(InputError, match=rf"MeshConfig\.{field} is {value}: it must be "):
        MeshConfig(**{field: value}, **others)


def test_what_data_is_left_follows_from_the_other_axes():
    assert build_mesh(MeshConfig(fsdp=2, tensor=2), rows=8).shape["data"] == 2


@pytest.mark.parametrize(
    ("axes", "shape", "sentence"),
    [
        ("DF", (6, 5), r"layer\.kernel has F = 5, which tensor = 2 does not divide: 6 would\."),
        ("LD", (3, 6), r"layer\.kernel has L = 3, which pipeline = 2 does not divide: 4 would\."),
        ("NF", (4, 4), r"The mesh axis tensor would shard two axes of layer\.kernel \(NF\)\."),
    ],
)
def test_a_parameter_that_cannot_be_parted_is_named(axes, shape, sentence):
    mesh = build_mesh(MeshConfig(pipeline=2, fsdp=2, tensor=2), rows=8)
    with pytest.raises(InputError, match=sentence):
        parameter_sharding("layer.kernel", axes, shape, mesh)


@dataclass(frozen=True)
class Chip:
    """A device of a machine of several slices."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "H100"
    process_index: int = 0


CHIPS = [Chip(number, number % 2) for number in range(16)]


def test_only_data_crosses_slices():
    mesh = build_mesh(MeshConfig(data=4, fsdp=2, tensor=2, slices=2), 8, CHIPS)
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    by_data = np.moveaxis(slices, AXES.index("data"), 0).reshape(4, -1)
    np.testing.assert_array_equal(by_data, np.repeat([0, 0, 1, 1], 4).reshape(4, 4))


def test_slices_that_the_devices_do_not_have_are_refused():
    with pytest.raises(InputError, match=r"MeshConfig\.slices is 4: the 16 devices are of 2\."):
        build_mesh(MeshConfig(data=4, fsdp=4, slices=4), 16, CHIPS)
    with pytest.raises(InputError, match=r"data 1: it must be a multiple of the 2 slices\."):
        build_mesh(MeshConfig(fsdp=16, slices=2), 16, CHIPS)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--mesh.fsdp=3", "The mesh is data 2 x fsdp 3, 6 devices: there are 8."),
        (
            "--mesh.pipeline=8",
            "attention.key.bias has L = 4, which pipeline = 8 does not divide: 8",
        ),
    ],
)
def test_an_experiment_says_what_does_not_fit_in_a_sentence_and_writes_nothing(
    flag, sentence, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    quickstart = importlib.import_module("quickstart")
    monkeypatch.setattr(sys, "argv", ["quickstart.py", flag, f"--out={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as ended:
        run_experiment(quickstart.quickstart, {"quickstart": quickstart.DEFAULTS}, "runs", "")
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert sentence in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sizes", "rows", "lines"),
    [
        ({"data": 1}, 1, []),
        ({"tensor": 4}, 8, ["Mesh: data 2 x tensor 4, 8 x cpu."]),
        (
            {"pipeline": 4, "fsdp": 2},
            32,
            [
                "Mesh: pipeline 4 x fsdp 2, 8 x cpu.",
                "Pipeline: 4 stages, 8 microbatches, a bubble of 27%.",
            ],
        ),
    ],
)
def test_an_experiment_says_over_which_devices_it_is_spread(sizes, rows, lines, monkeypatch):
    train = TrainConfig(batch_size=rows, grad_accumulation=2 if rows > 8 else 1)
    config = ExperimentConfig(mesh=MeshConfig(**sizes), train=train)
    count = 8 if lines else 1
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:count])
    assert devices(config)[1] == lines


@pytest.mark.slow
def test_who_holds_what_of_every_preset_is_as_written_down():
    golden = ROOT / "tests" / "golden"
    layouts = runpy.run_path(str(golden / "make_layouts.py"))["layouts"]
    assert list(layouts()) == (golden / "layouts.txt").read_text().splitlines()
