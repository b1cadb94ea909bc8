"""The whole of preflight on virtual CPU devices, which stand for chips that are not there."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from gptjax.config import DataConfig, InputError, MeshConfig
from gptjax.costs.chips import known_chips
from gptjax.costs.hlo import read_program
from gptjax.costs.model import model_cost
from gptjax.costs.traffic import memory_traffic
from gptjax.models.build import build, parameter_axes, split
from gptjax.parallel.sharding import build_mesh
from gptjax.preflight.collectives import Collective
from gptjax.preflight.program import batch_shapes, bytes_held, lower_decoding, lower_training
from gptjax.preflight.report import as_json, preflight, table
from gptjax.preflight.roofline import roofline
from gptjax.preflight.search import meshes, nearest_changes, ranking, search
from gptjax.preflight.settings import default_config
from gptjax.preflight.topology import Topology
from gptjax.training.losses import training_loss
from gptjax.training.optimizers import build_optimizer
from gptjax.training.step import lower_train_step, state_shapes


@pytest.fixture(scope="module", autouse=True)
def no_cache():
    """XLA writes no plan of a program that is found in JAX's cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()


def chips(count: int, available: int = 2**30) -> Topology:
    chip = dataclasses.replace(known_chips()["v5e"], available=available)
    return Topology("v5e:2x2", chip, 1, tuple(jax.devices()[:count]))


def tiny(name: str = "quickstart", **mesh):
    config = default_config(name)
    model = dataclasses.replace(config.model, depth=2, width=32, heads=4, context_length=16)
    train = dataclasses.replace(config.train, batch_size=8)
    return dataclasses.replace(config, model=model, train=train, mesh=MeshConfig(**mesh))


@pytest.fixture(scope="module")
def report():
    return preflight("quickstart", tiny(data=1, fsdp=4), chips(4))


def test_it_is_the_step_that_fit_runs():
    config = tiny(data=2, fsdp=2)
    devices = tuple(jax.devices()[:4])
    mesh = build_mesh(config.mesh, config.train.batch_size, devices)
    graphdef, _ = split(nnx.eval_shape(lambda: build(config.model, rngs=nnx.Rngs(0))))
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    shapes = state_shapes(
        lambda: split(build(config.model, rngs=nnx.Rngs(0)))[1],
        optimizer,
        mesh,
        parameter_axes(config.model),
    )
    state = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), shapes
    )
    batch = jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), batch_shapes(config))
    run = lower_train_step(training_loss(graphdef, config.train), optimizer, state, batch, mesh)
    assert lower_training(config, devices).lowered.as_text() == run.as_text()


def test_parameters_and_optimizer_are_exact_and_all_kinds_add_up(report):
    kinds = report.memory.kinds
    assert sum(kinds.values()) == report.memory.peak
    lowered = lower_training(report.config, report.topology.devices)
    assert kinds["parameters"] == bytes_held(lowered.params)
    assert kinds["optimizer"] == bytes_held(lowered.optimizer)
    parameters = model_cost(report.config.model).parameters
    # A quarter a device, and whole what is parted by no rule.
    assert parameters <= kinds["parameters"] <= 1.1 * parameters
    assert report.memory.largest
    assert any("layers/" in buffer.source for buffer in report.memory.largest)


def test_a_report_says_what_is_gathered_and_how_much_is_computed(report):
    gathered = [one for one in report.collectives if one.kind == "all-gather"]
    assert gathered
    assert all(one.axes == ("fsdp",) for one in gathered)
    assert {row.axis for row in report.expected} == {"fsdp"}
    model = report.config.model
    assert report.model_flops == 8 * 16 * model_cost(model).training_flops
    recomputed = model_cost(model).forward_flops - model_cost(model).unembedding_flops
    assert report.roofline.flops == (report.model_flops + 8 * 16 * recomputed) / 4
    shortest, longest = report.roofline.seconds
    assert 0 < shortest < longest
    assert 0 < report.mfu[0] < report.mfu[1] < 1
    assert report.compile_seconds > 0


def test_a_report_is_a_table_and_json(report):
    values = json.loads(json.dumps(as_json(report)))
    assert values["fits"] is True
    assert values["peak_bytes"] + values["spare_bytes"] == values["available_bytes"]
    assert values["memory"]["parameters"] == report.memory.kinds["parameters"]
    assert values["attention"] == "Attention: XLA."
    text = table(report)
    for part in (
        "fits:",
        "Attention: XLA.",
        "fsdp 4",
        "saved activations",
        "FLOPs per byte",
        "cloud.google.com",
        "CPU",
    ):
        assert part in text


@pytest.fixture
def compiled(report, monkeypatch):
    """Stands for compilation in a search: a peak that follows from the config; what was asked."""
    asked = []

    def pretend(name, config, topology, *, decode):
        if config.train.batch_size % 5 == 0:
            raise InputError("Five does not divide.")
        parts = config.mesh.fsdp * config.mesh.tensor**2 * config.train.grad_accumulation
        kept = {"none": 8, "dots": 6, "names": 6, "full": 4, "offload": 3}[config.model.remat]
        peak = kept * config.train.batch_size * 1000 // parts
        asked.append(config)
        memory = dataclasses.replace(report.memory, peak=peak)
        return dataclasses.replace(report, config=config, topology=topology, memory=memory)

    monkeypatch.setattr("gptjax.preflight.search.preflight", pretend)
    return asked


def test_what_does_not_fit_is_said_with_the_nearest_changes_that_do(report, compiled):
    memory = dataclasses.replace(report.memory, peak=8000)
    over = dataclasses.replace(report, topology=chips(4, 6500), memory=memory)
    assert not over.fits
    assert "DOES NOT FIT: 0.00 of 0.00" in table(over)
    told: list[str] = []
    changes = nearest_changes(over, told.append)
    assert [change.what for change in changes] == [
        "--model.remat offload",
        "--train.grad-accumulation 2",
        "--batch-per-device 1",
        "--mesh data=1,fsdp=2,tensor=2",
    ]
    assert all(change.report.fits for change in changes)
    assert told[0] == "trying --model.remat offload"
    assert ranking(changes).count("\n") == len(changes)


def test_a_program_that_the_compiler_refuses_does_not_fit(report):
    refused = dataclasses.replace(report, exhausted=True)
    assert refused.spare > 0
    assert not refused.fits


def test_a_search_compiles_so_many_and_ranks_what_fits_by_its_longest_step(report, compiled):
    def found(available, tries):
        topology, told = chips(4, available), []
        ranked = search(
            "quickstart", tiny(data=1), topology, decode=False, tries=tries, say=told.append
        )
        return ranked, told

    ranked, told = found(2**30, 3)
    rates = [one.report.tokens / one.report.roofline.seconds[1] for one in ranked]
    assert rates == sorted(rates, reverse=True)
    assert len(ranked) == len(compiled) == 3
    assert told[0].endswith("candidates, of which 3 are compiled")
    # 53 thousand parameters with their state do not fit, whatever the batch: none is compiled.
    assert found(1000, 3)[0] == []
    assert len(compiled) == 3


def test_meshes_divide_heads_and_devices():
    config = tiny()
    assert meshes(config, 4) == [(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)]


@pytest.mark.parametrize("name", ["quickstart", "moe", "lstm", "transformer-tiny", "t-dmca"])
def test_decoding_holds_a_cache_in_parts(name):
    config = dataclasses.replace(default_config(name), mesh=MeshConfig(data=2, fsdp=2))
    lowered = lower_decoding(config, tuple(jax.devices()[:4]))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(lowered.cache))
    assert bytes_held(lowered.cache) == whole // 4
    assert lowered.optimizer is None


def test_decoding_is_refused_where_it_is_not_possible():
    with pytest.raises(InputError, match="does not decode"):
        lower_decoding(default_config("bert-tiny"), tuple(jax.devices()[:1]))
    config = tiny()
    unrolled = dataclasses.replace(config.model, scan_layers=False)
    with pytest.raises(InputError, match="scan_layers is False"):
        lower_decoding(dataclasses.replace(config, model=unrolled), tuple(jax.devices()[:1]))


@pytest.mark.parametrize("mesh", [{"data": 3}, {"data": 1, "fsdp": 8}, {"data": 1, "tensor": 2}])
def test_a_mesh_that_does_not_match_the_devices_is_one_sentence(mesh):
    with pytest.raises(InputError, match="The mesh is"):
        preflight("quickstart", tiny(**mesh), chips(4))


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        (DataConfig(), set()),
        (DataConfig(packing="first_fit"), {"segment_ids", "positions"}),
        (DataConfig(objective="masked_lm"), {"segment_ids", "positions"}),
        (DataConfig(objective="next_sentence"), {"padding_mask", "token_types", "next_sentence"}),
        (DataConfig(objective="prefix"), {"source", "source_mask"}),
    ],
)
def test_a_batch_has_what_the_objective_gives(data, fields):
    batch = batch_shapes(dataclasses.replace(tiny(), data=data))
    plain = {"tokens", "targets", "loss_weights"}
    assert {name for name, array in batch._asdict().items() if array is not None} == plain | fields
    assert batch.tokens.shape == (8, 16)


TRAFFIC = """HloModule jit_step, is_scheduled=true

%sliced (p: f32[10,256], i: s32[]) -> f32[256] {
  %p = f32[10,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %row = f32[1,256]{1,0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,256}
}

%updated (q: f32[10,256], r: f32[1,256], j: s32[]) -> f32[10,256] {
  %q = f32[10,256]{1,0} parameter(0)
  %r = f32[1,256]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %changed = f32[10,256]{1,0} dynamic-update-slice(%q, %r, %j)
}

ENTRY %main (x: f32[10,256], n: s32[]) -> f32[10,256] {
  %x = f32[10,256]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %one = f32[1,256]{1,0} fusion(%x, %n), kind=kLoop, calls=%sliced
  %near = f32[1,256]{1,0:S(1)} negate(%one)
  %far = f32[1,256]{1,0} negate(%near)
  ROOT %all = f32[10,256]{1,0} fusion(%x, %far, %n), kind=kLoop, calls=%updated
}
"""


def test_memory_traffic_counts_what_slices_touch():
    row, number = 256 * 4, 4
    # `near` is in the processor's own memory: written there and read from there for nothing.
    one, near, far, all_rows = row + number + row, row, row, row + number + row
    assert sum(memory_traffic(read_program(TRAFFIC)).values()) == one + near + far + all_rows


def test_the_roofline_waits_for_the_slowest_or_for_all():
    chip = known_chips()["v5e"]
    one = Collective("collective-permute", int(200e9), 1, (0, 1), ("fsdp",))
    line = roofline(197e12 / 2, 819e9 / 4, [one], chip, lambda _: False)
    assert line.shortest == {"compute": 0.5, "memory": 0.25, "interconnect": 1.0}
    # Half of the links, at 60 percent.
    assert line.longest["interconnect"] == pytest.approx(2 / 0.6)
    assert line.seconds == (1.0, pytest.approx(sum(line.longest.values())))
    assert line.bound == "interconnect"
    crossing = roofline(1.0, 1.0, [one], chip, lambda _: True)
    assert crossing.network_bytes == 200e9
    assert crossing.shortest["interconnect"] == pytest.approx(200e9 / chip.network)
