"""Whatever the mesh, the compiled step gives one device's loss and gradient."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import numpy as np
import optax
import pytest

from gptjax.certify.cases import ROUNDING, ROWS, Case, difference
from gptjax.config import MeshConfig, TransformerConfig
from gptjax.data.batch import Batch
from gptjax.models.build import parameter_axes
from gptjax.models.presets import preset
from gptjax.parallel.sharding import AXES, build_mesh
from gptjax.training.step import compile_train_step, init_state

DEVICES = 8
CHUNK = 11
"""Tokens whose logits exist at a time on a device: no divisor of any device's tokens."""


FAMILIES: dict[str, dict[str, Any]] = {
    "decoder": {
        "position_embedding": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "attention_softcap": 20.0,
    },
    "encoder": {
        "family": "encoder",
        "token_types": 2,
        "encoder_heads": "pretraining",
        "head_bias": True,
        "embedding_norm": True,
        "norm_placement": "post",
        "final_norm": False,
    },
    "encoder_decoder": {
        "family": "encoder_decoder",
        "position_embedding": "relative",
        "activation": "relu",
        "tie_embeddings": False,
    },
}


@functools.cache
def case_of(family: str, parts: int) -> Case:
    """A tiny model of which every axis can be parted into so many, the decoder with experts."""
    config = TransformerConfig(
        vocab_size=64,
        context_length=16,
        depth=parts,
        width=16,
        heads=2 * parts,
        kv_heads=parts,
        head_dim=4,
        mlp_dim=16,
        num_experts=2 * parts if family == "decoder" else 0,
        scan_layers=True,
        remat="full",
        **FAMILIES[family],
    )
    case = Case(config, config)
    if family == "encoder":
        labels = np.arange(ROWS, dtype=np.int32) % 2
        case.batch = case.batch._replace(next_sentence=labels)
    return case


def step_under(
    case: Case,
    sizes: dict[str, Any],
    grad_accumulation: int = 1,
    batch: Batch | None = None,
    **changes: Any,
) -> Any:
    """The compiled step under the mesh of these sizes, with `changes` of the model; its state.

    `batch` may be a stack of batches.
    """
    mesh = build_mesh(MeshConfig(**sizes), ROWS // grad_accumulation)
    keep_gradient = optax.trace(decay=0.0)
    state = init_state(lambda: case.params, keep_gradient, mesh, parameter_axes(case.config))
    loss = case.loss(chunk=CHUNK, **changes)
    step = compile_train_step(
        loss,
        keep_gradient,
        state,
        case.batch if batch is None else batch,
        mesh,
        grad_accumulation=grad_accumulation,
        stacked=batch is not None,
    )
    return step, state


def error_of(case: Case, sizes: dict[str, Any], **how: Any) -> float:
    """Of the loss and the gradient of that step."""
    step, state = step_under(case, sizes, **how)
    after, metrics = jax.block_until_ready(step(state, case.batch))
    return difference((metrics.loss, after.optimizer.trace), case.plain)


PAIRED = [
    ("pipeline", "data", "fsdp"),
    ("pipeline", "data", "sequence"),
    ("pipeline", "expert", "tensor"),
    ("data", "expert", "tensor"),
    ("fsdp", "expert", "sequence"),
    ("fsdp", "sequence", "tensor"),
]
THREE = ("pipeline", "fsdp", "tensor")


def test_every_two_axes_meet_in_the_meshes_below():
    met = {pair for axes in PAIRED for pair in itertools.combinations(axes, 2)}
    assert met == set(itertools.combinations(AXES, 2))


@pytest.mark.slow
@pytest.mark.parametrize("axes", PAIRED, ids="-".join)
def test_a_decoder_with_experts_under_every_two_axes(axes):
    assert error_of(case_of("decoder", 2), dict.fromkeys(axes, 2)) <= ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("family", ["encoder", "encoder_decoder"])
@pytest.mark.parametrize(
    "axes", [("fsdp", "sequence", "tensor"), ("pipeline", "data", "tensor")], ids="-".join
)
def test_other_families_under_several_axes(family, axes):
    assert error_of(case_of(family, 2), dict.fromkeys(axes, 2)) <= ROUNDING


@pytest.mark.slow
def test_parts_of_a_batch_of_a_stack_under_several_axes():
    """The step makes the second of a stack's three batches."""
    case = case_of("decoder", 2)
    batches = jax.tree.map(lambda array: np.stack([0 * array, array, 0 * array]), case.batch)
    step, state = step_under(case, dict.fromkeys(THREE, 2), grad_accumulation=2, batch=batches)
    after, metrics = step(state, batches, np.array([1, 1], np.int32))
    assert difference((metrics.loss[0], after.optimizer.trace), case.plain) <= ROUNDING
    assert int(after.step) == 1


def test_a_block_whose_input_waits_with_the_host_under_several_axes():
    assert error_of(case_of("encoder", 2), dict.fromkeys(THREE, 2), remat="offload") <= ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alibi", "gemma-style", "lstm", "t-dmca"])
def test_other_variants_under_several_axes(name):
    tiny = {
        "vocab_size": 64,
        "context_length": 16,
        "depth": 2,
        "width": 16,
        "mlp_dim": 24,
        "heads": 4,
    }
    config = dataclasses.replace(preset(name), **tiny, scan_layers=True)
    case = Case(config, config)
    if name != "t-dmca":  # The others' rows may hold several documents.
        documents = np.repeat([[1] * 5 + [2] * 11], ROWS, axis=0)
        case.batch = case.batch._replace(segment_ids=documents)
    assert error_of(case, dict.fromkeys(("fsdp", "sequence", "tensor"), 2)) <= ROUNDING


@pytest.mark.slow
def test_dropout_in_a_pipeline_follows_the_step_alone():
    case = case_of("encoder", 2)
    step, state = step_under(case, dict.fromkeys(THREE, 2), dropout=0.5)

    def loss(number: int) -> float:
        of_step = jax.tree.map(lambda leaf: leaf.copy(), state)._replace(step=np.int32(number))
        return float(step(jax.device_put(of_step, shardings), case.batch)[1].loss)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert loss(0) == loss(0)
    assert loss(1) != loss(0)
    assert abs(loss(0) - float(case.plain[0])) > 1e-3


MESHES = [
    dict(zip(AXES, sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES))
    if math.prod(sizes) == DEVICES
]


@pytest.mark.large
@pytest.mark.parametrize(
    "mesh", MESHES, ids=lambda mesh: "-".join(f"{k}{n}" for k, n in mesh.items() if n > 1)
)
@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
def test_every_family_under_every_mesh_of_eight(family, mesh):
    assert error_of(case_of(family, DEVICES), mesh) <= ROUNDING
