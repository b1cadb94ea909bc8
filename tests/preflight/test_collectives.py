from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.costs.hlo import read_program
from gptjax.preflight.collectives import (
    Collective,
    Shapes,
    Weight,
    collectives,
    device_group,
    expected,
)

MESH = {"data": 2, "fsdp": 4}


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("channel_id=1, replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
        ("replica_groups=[2,4]<=[8], dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}", (0, 1, 2, 3)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6}}", (0, 1, 2, 3)),
        ("replica_groups={}, to_apply=%sum", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_groups_of_devices_in_every_way_that_xla_says_them(attributes, group):
    assert device_group(attributes, 8) == group


TEXT = Path(__file__).with_name("collectives.hlo").read_text()


def test_collectives_are_counted_with_their_loops_and_once_a_channel():
    found = {(one.kind, one.axes): one for one in collectives(read_program(TEXT), MESH)}
    summary = {key: (one.bytes, one.count) for key, one in found.items()}
    whole = 16 * 8 * 2
    assert summary == {
        ("all-gather", ("fsdp",)): (whole, 1),
        # In the loop: the two halves of a gather are one, and the fusion is a reduce-scatter.
        ("reduce-scatter", ("fsdp",)): (whole, 1),
        ("collective-permute", ("data",)): (whole // 4, 1),
        ("all-reduce", ("data", "fsdp")): (4, 1),
    }
    counts = sorted((one.kind, one.count) for one in collectives(read_program(TEXT), MESH))
    assert counts == [
        ("all-gather", 1),
        ("all-gather", 3),
        ("all-reduce", 1),
        ("collective-permute", 1),
        ("reduce-scatter", 1),
        ("reduce-scatter", 3),
    ]


BETWEEN_SLICES = """\
HloModule two_slices

ENTRY %main (given: f32[512,8]) -> f32[128,8] {
  %given = f32[512,8]{1,0} parameter(0)
  %after-all = token[] after-all()
  %scattered = f32[128,8]{1,0} reduce-scatter(%given), channel_id=4, replica_groups={{0,1,2,3}}
  %send = (f32[128,8]{1,0}, u32[], token[]) send(%scattered, %after-all), channel_id=4, \
is_host_transfer=true, frontend_attributes={_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{SLICES}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[128,8]{1,0}, u32[], token[]) recv(%after-all), channel_id=3, \
is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=4, is_host_transfer=true
  %recv-done = (f32[128,8]{1,0}, token[]) recv-done(%recv), channel_id=3, is_host_transfer=true
  ROOT %summed = f32[128,8]{1,0} get-tuple-element(%recv-done), index=0
}
"""
"""As libtpu 0.0.42 writes a sum over two slices, without what no reader needs."""


@pytest.mark.parametrize(
    ("slices", "data", "group"), [("1,2", 2, (0, 4)), ("1:3", 6, (0, 8, 16)), ("1,2", 4, (0, 8))]
)
def test_a_sum_over_slices_is_read_from_what_a_device_sends_its_host(slices, data, group):
    program = read_program(BETWEEN_SLICES.replace("SLICES", slices))
    mesh = {"pipeline": 1, "data": data, "fsdp": 4}
    scattered, summed = collectives(program, mesh)
    assert (scattered.kind, scattered.bytes, scattered.axes) == ("reduce-scatter", 16384, ("fsdp",))
    assert (summed.kind, summed.bytes, summed.axes) == ("all-reduce", 4096, ("data",))
    assert summed.group == group


def test_a_ring_sends_all_but_its_own_part_and_an_all_reduce_twice_that():
    def sent(kind):
        return Collective(kind, 800, 2, (0, 1, 2, 3), ("fsdp",)).sent

    assert sent("all-gather") == sent("reduce-scatter") == 2 * 600
    assert sent("all-reduce") == 2 * 1200
    assert sent("collective-permute") == 2 * 800


def test_a_compiled_program_gathers_each_layers_weights_and_sums_their_gradient():
    """The real text of XLA, for virtual CPU devices."""
    layers, width, rows = 3, 32, 16
    mesh = jax.make_mesh((4,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:4])
    weights = NamedSharding(mesh, P(None, None, "fsdp"))
    given = NamedSharding(mesh, P("fsdp"))

    def loss(stack, x):
        @jax.checkpoint
        def layer(x, weight):
            whole = jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, P()))
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ whole), given), None

        return jax.lax.scan(layer, x, stack)[0].sum()

    text = (
        jax.jit(jax.grad(loss), in_shardings=(weights, given), out_shardings=weights)
        .lower(jnp.zeros((layers, width, width)), jnp.zeros((rows, width)))
        .compile()
        .as_text()
    )
    assert text is not None
    found = collectives(read_program(text), {"fsdp": 4})
    whole = layers * width * width * 4
    gathered = sum(one.count * one.bytes for one in found if one.kind == "all-gather")
    summed = sum(one.count * one.bytes for one in found if one.kind in ("all-reduce",))
    assert gathered == 2 * whole
    assert summed == whole


def shapes(**changes) -> Shapes:
    given = {
        "weights": [Weight(1000, ("fsdp",)), Weight(80, ())],
        "element": 2,
        "layers": 3,
        "tokens": 10,
        "width": 8,
        "parts": 1,
        "remat": True,
        "training": True,
    }
    return Shapes(**{**given, **changes})


def test_theory_of_fsdp_is_two_gathers_and_one_sum():
    found = [
        Collective("all-gather", 2000, 2, (0, 1, 2, 3), ("fsdp",)),
        Collective("all-reduce", 2000, 1, (0, 1, 2, 3), ("fsdp",)),
    ]
    gathers, sums = expected(shapes(), {"data": 1, "fsdp": 4}, found)
    assert gathers.what == "weights gathered, layers' twice, others once"
    assert gathers.bytes == gathers.found == 2 * 2000
    assert sums.bytes == sums.found == 2000
    assert "plain all-reduce" in sums.note
    assert gathers.note == ""
    (accumulated, _) = expected(shapes(parts=4), {"data": 1, "fsdp": 4}, found)
    assert accumulated.bytes == 4 * gathers.bytes
    (decoding,) = expected(shapes(training=False), {"data": 1, "fsdp": 4}, found)
    assert decoding.bytes == 2000


def test_theory_of_a_tied_table_is_one_gather_and_a_sum_for_each_use():
    weights = [Weight(1000, ("fsdp",)), Weight(500, ("fsdp",), gathers=1, sums=2)]
    gathers, sums = expected(shapes(weights=weights), {"data": 1, "fsdp": 4}, [])
    assert gathers.bytes == 2 * (2 * 1000 + 500)
    assert sums.bytes == 2 * (1000 + 2 * 500)
    assert sums.what.endswith("tied embeddings' once per use")
    # Where rows alone are parted, a device adds up its own gradients first.
    (alone,) = expected(shapes(weights=weights), {"data": 4, "fsdp": 1}, [])
    assert alone.bytes == 4 * 1500


def test_theory_of_data_and_tensor():
    found = [
        Collective("all-gather", 160, 18, (0, 1), ("tensor",)),
        Collective("reduce-scatter", 160, 18, (0, 1), ("tensor",)),
    ]
    mesh = {"data": 2, "fsdp": 1, "tensor": 2}
    data, tensor = expected(shapes(weights=[Weight(1000, ("tensor",))]), mesh, found)
    assert data.bytes == 500 * 2
    # 2 all-reduces per layer in the forward pass, its repetition and the backward pass.
    assert tensor.bytes == tensor.found == 6 * 3 * 10 * 8 * 2
