import importlib.metadata
import os

import jax
import pytest
from jax.experimental import topologies

from gptjax.config import InputError
from gptjax.costs.chips import chip_of, known_chips
from gptjax.models.presets import PRESETS
from gptjax.preflight import topology
from gptjax.preflight.settings import default_config, with_sizes
from gptjax.preflight.topology import Topology, check_packages, gpu_target, open_topology


@pytest.mark.parametrize("chip", known_chips().values(), ids=lambda chip: chip.name)
def test_every_chip_is_described_with_a_source(chip):
    assert chip.source
    assert chip_of(chip.kinds[0]) is chip
    assert min(chip.flops, chip.bandwidth, chip.interconnect, chip.network) > 1e9
    assert chip.topologies if chip.platform == "tpu" else chip.gpu
    assert all(shape.count("x") + 1 == chip.axes for shape in chip.topologies)


def test_the_longest_fitting_name_of_a_device_counts():
    found = {kind: chip_of(kind) for kind in ("TPU v5 lite", "TPU v5", "NVIDIA H200", "cpu")}
    names = {kind: chip and chip.name for kind, chip in found.items()}
    assert names == {"TPU v5 lite": "v5e", "TPU v5": "v5p", "NVIDIA H200": "h200", "cpu": None}


@pytest.mark.parametrize(
    ("name", "slices", "sentence"),
    [
        ("v5litepod-16", 1, "Unknown topology 'v5litepod-16': accepted are a100:COUNT, "),
        ("v6:2x2", 1, "Unknown topology 'v6:2x2': did you mean v6e?"),
        ("v5e", 1, "Unknown topology 'v5e': accepted are v5e:1x1, v5e:2x2, "),
        ("v5e:4x4x4", 1, "Unknown topology 'v5e:4x4x4': accepted are v5e:1x1, "),
        ("h100:12", 1, "accepted are h100:1 to h100:8, and multiples of 8."),
        ("h100:x", 1, "accepted are h100:1 to h100:8, and multiples of 8."),
        ("h100:8", 2, "--slices is 2: it must be 1 for GPUs"),
        ("v5e:4x4", 0, "--slices is 0: it must be at least 1."),
    ],
)
def test_an_unknown_topology_is_answered_with_those_that_are_known(name, slices, sentence):
    with pytest.raises(InputError) as error:
        open_topology(name, slices)
    assert sentence in str(error.value)


@pytest.fixture
def installed(monkeypatch):
    """Says that these packages are installed, and what JAX asks for."""

    def say(**versions):
        versions = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(package):
            if package not in versions:
                raise importlib.metadata.PackageNotFoundError(package)
            return versions[package]

        required = ['jaxlib<=0.10.2,>=0.10.2; extra == "tpu"', 'libtpu==0.0.42.*; extra == "tpu"']
        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "requires", lambda _: required)

    return say


def test_a_package_that_is_missing_or_of_another_version_comes_with_the_command(installed):
    chips = known_chips()

    def refusal(name):
        with pytest.raises(InputError) as error:
            check_packages(chips[name])
        return str(error.value)

    installed(jax="0.10.2")
    assert refusal("v5e") == (
        'Compiling for v5e needs libtpu, which is not installed: pip install "jax[tpu]==0.10.2".'
    )
    assert refusal("h100").endswith('pip install "jax[cuda12-local]==0.10.2".')
    installed(jax="0.10.2", libtpu="0.0.50", jax_cuda12_plugin="0.10.1", jax_cuda12_pjrt="0.10.2")
    assert refusal("v5e") == (
        'libtpu is 0.0.50, but jax 0.10.2 needs 0.0.42: pip install "jax[tpu]==0.10.2".'
    )
    assert refusal("h100") == (
        "jax-cuda12-plugin is 0.10.1, but jax 0.10.2 needs 0.10.2: "
        'pip install "jax[cuda12-local]==0.10.2".'
    )
    installed(jax="0.10.2", libtpu="0.0.42.1", jax_cuda12_plugin="0.10.2", jax_cuda12_pjrt="0.10.2")
    check_packages(chips["v5e"])
    check_packages(chips["h100"])


def test_a_locked_libtpu_is_one_sentence(monkeypatch):
    def locked(**_):
        raise jax.errors.JaxRuntimeError(
            "ABORTED: Internal error when accessing libtpu multi-process lockfile."
        )

    monkeypatch.setattr(topologies, "get_topology_desc", locked)
    monkeypatch.setattr(topology, "check_packages", lambda _: None)
    with pytest.raises(InputError, match="Another process holds libtpu"):
        open_topology("v5e:4x4")


def test_what_a_gpu_lends_a_program_is_a_setting(monkeypatch):
    chip = known_chips()["h100"]
    monkeypatch.delenv(topology.MEMORY_FRACTION, raising=False)
    opened = Topology("h100:16", chip, 1, tuple(range(16)))
    assert opened.available == int(0.75 * chip.memory)
    monkeypatch.setenv(topology.MEMORY_FRACTION, ".9")
    assert opened.available == int(0.9 * chip.memory)
    v5e = Topology("v5e:2x2", known_chips()["v5e"], 1, tuple(range(4)))
    assert v5e.available == v5e.chip.available


def test_a_gpu_is_described_from_the_file_of_chips():
    text = gpu_target(known_chips()["a100"])
    assert "cuda_compute_capability { major: 8 minor: 0 }" in text
    assert "core_count: 108" in text
    assert f"memory_bandwidth: {2039 * 10**9}" in text


def test_the_users_environment_stands(monkeypatch):
    for name in topology.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "0")
    try:
        topology.prepare_environment()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
    assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "0"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_config_at_scale(name):
    model = default_config(name).model
    assert (model.dtype, model.scan_layers, model.remat) == ("bfloat16", True, "full")


def test_short_flags_set_mesh_batch_and_length():
    config = default_config("gpt2")
    sized = with_sizes(
        config, 16, mesh="data=2,fsdp=8", slices=2, batch_per_device=0.5, sequence=256
    )
    assert (sized.mesh.data, sized.mesh.fsdp, sized.mesh.slices) == (2, 8, 2)
    assert (sized.train.batch_size, sized.model.context_length) == (8, 256)
    assert with_sizes(config, 16) == config


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        ("fdsp=4", "--mesh has an unknown axis 'fdsp': did you mean fsdp?"),
        ("fsdp", "--mesh is 'fsdp': it must be axes and numbers, as data=1,fsdp=16."),
        ("fsdp=0", "MeshConfig.fsdp is 0: it must be at least 1."),
    ],
)
def test_a_mesh_that_cannot_be_read_is_one_sentence(mesh, sentence):
    with pytest.raises(InputError) as error:
        with_sizes(default_config("gpt2"), 16, mesh=mesh)
    assert str(error.value) == sentence


def test_a_batch_that_is_not_whole_is_refused():
    with pytest.raises(InputError, match="not a whole number of sequences"):
        with_sizes(default_config("gpt2"), 16, batch_per_device=0.3)
