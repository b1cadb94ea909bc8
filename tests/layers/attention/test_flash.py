"""The kernels of TPUs and GPUs, interpreted or stood in for, against the reference."""

import dataclasses
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import InputError, TransformerConfig, build, preset, split
from gptjax.config import MeshConfig
from gptjax.layers.attention import flash
from gptjax.layers.attention.flash import cudnn, splash
from gptjax.layers.attention.kernels import resolve_kernel
from gptjax.layers.attention.masks import MaskRule, attention_mask
from gptjax.layers.attention.reference import attention_weights, weighted_values
from gptjax.layers.dropout import Dropout
from gptjax.parallel.keys import random_key
from gptjax.parallel.sharding import build_mesh, spec

SCALE = 0.3
PLACES = 384  # Three blocks of 128: some empty, some cut by the mask, some whole.
DRAW = np.random.default_rng(0)
DOCUMENTS = np.sort(DRAW.integers(1, 4, (2, PLACES)), axis=1).astype(np.int32)
VALID = np.arange(PLACES) < np.array([[290], [PLACES]])
MASKS = {
    "causal": MaskRule(causal=True),
    "causal, window": MaskRule(causal=True, window=50),
    "causal, documents": MaskRule(causal=True, segment_ids=jnp.asarray(DOCUMENTS)),
    "causal, padding": MaskRule(causal=True, padding_mask=jnp.asarray(VALID)),
    "documents, padding": MaskRule(False, 0, jnp.asarray(VALID), jnp.asarray(DOCUMENTS)),
    "padding": MaskRule(causal=False, padding_mask=jnp.asarray(VALID)),
    "window": MaskRule(causal=False, window=200, padding_mask=jnp.asarray(VALID)),
}


def inputs(queries: int = PLACES, keys: int = PLACES, heads: int = 2, kv_heads: int = 1):
    """Query [2, T, N, 8], key and value [2, S, K, 8], gradient of the z."""
    shapes = [(queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)]
    drawn = [jnp.asarray(DRAW.standard_normal((2, *shape, 8), np.float32)) for shape in shapes]
    # What a padding query reads is not used.
    return *drawn[:3], drawn[3] * VALID[:, :queries, None, None]


def shortened(rule: MaskRule, places: int) -> MaskRule:
    return jax.tree.map(lambda leaf: leaf[:, :places], rule)


def reference(query, key, value, rule: MaskRule, cap: float = 0.0) -> jax.Array:
    distance = jnp.arange(query.shape[1])[None, :, None] - jnp.arange(key.shape[1])
    mask = attention_mask(distance, rule)
    return weighted_values(attention_weights(query, key, mask, scale=SCALE, softcap=cap), value)


def interpreted(query, key, value, rule: MaskRule, cap: float = 0.0) -> jax.Array:
    return splash(query, key, value, rule, SCALE, cap, interpret=True)


def stood_in_for(query, key, value, rule: MaskRule) -> jax.Array:
    return cudnn(query, key, value, rule, SCALE, implementation="xla")


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradients(attend, cap, rule, query, key, value, gradient):
    """The z where it is used, and the gradients of query, key and value."""
    cap = {"cap": cap} if cap else {}
    z, vjp = jax.vjp(
        lambda query, key, value: attend(query, key, value, rule, **cap), query, key, value
    )
    return z * (gradient != 0), *vjp(gradient)


def assert_equal(attend, rule: MaskRule, given, cap: float = 0.0) -> None:
    got = with_gradients(attend, cap, rule, *given)
    expected = with_gradients(reference, cap, rule, *given)
    for ours, theirs in zip(got, expected, strict=True):
        largest = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("mask", MASKS)
def test_splash_and_its_gradients_equal_the_reference(mask):
    assert_equal(interpreted, MASKS[mask], inputs())


def test_splash_soft_caps_scores():
    assert_equal(interpreted, MaskRule(causal=True), inputs(kv_heads=2), cap=2.0)


def test_splash_with_a_fused_backward_pass_of_several_blocks(monkeypatch):
    monkeypatch.setattr(flash, "BLOCK", 128)
    for mask in ("causal, documents", "padding"):
        assert_equal(interpreted, shortened(MASKS[mask], 256), inputs(256, 256))


def test_splash_attends_to_another_sequence():
    rule = MaskRule(causal=False, padding_mask=MASKS["padding"].padding_mask)
    assert_equal(interpreted, rule, inputs(queries=128))


@pytest.mark.parametrize("mask", [name for name in MASKS if name != "window"])
def test_what_cudnn_is_told_means_the_mask(mask):
    assert_equal(stood_in_for, MASKS[mask], inputs())


@pytest.mark.parametrize("attend", [interpreted, stood_in_for])
def test_each_device_of_a_mesh_takes_its_part(attend):
    """Rows, heads and, of splash, queries are parted, and the keys of a row brought together."""
    sequence = 2 if attend is interpreted else 1
    mesh = build_mesh(
        MeshConfig(data=2, tensor=2, sequence=sequence), 2, jax.devices()[: 4 * sequence]
    )
    query, key, value, gradient = inputs(256, 256, heads=4, kv_heads=2)
    rule = shortened(MASKS["causal, documents"], 256)
    expected = with_gradients(reference, 0.0, rule, query, key, value, gradient)
    with jax.set_mesh(mesh):
        parts = spec("BTNH", query.shape)
        query, gradient = (jax.device_put(x, NamedSharding(mesh, parts)) for x in (query, gradient))
        got = with_gradients(attend, 0.0, rule, query, key, value, gradient)
        jax.block_until_ready(got)
    assert got[1].sharding.is_equivalent_to(NamedSharding(mesh, parts), 4)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(jnp.abs(theirs).max()))


def test_a_device_that_was_given_its_rows_takes_them_all():
    """As `gptjax.training.step` gives them where a batch alone is split."""
    mesh = build_mesh(MeshConfig(data=2), 2, jax.devices()[:2])
    query, key, value, _ = inputs(128, 128)
    rule = MaskRule(causal=True)

    def attend(query, key, value):
        assert flash.takes("splash", query, key, rule)
        return interpreted(query, key, value, rule)

    of_rows = jax.shard_map(
        attend, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    expected = reference(query, key, value, rule)
    np.testing.assert_allclose(jax.jit(of_rows)(query, key, value), expected, atol=1e-5)


def test_queries_that_see_no_key_yield_numbers():
    rule = MaskRule(causal=True, padding_mask=jnp.zeros((2, 128), bool))
    query, key, value, _ = inputs(128, 128)
    for part in with_gradients(interpreted, 0.0, rule, query, key, value, jnp.ones_like(query)):
        assert jnp.isfinite(part).all()


SMALL = TransformerConfig(
    vocab_size=11, context_length=256, depth=2, width=16, heads=2, kv_heads=1, attention_softcap=2.0
)


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"attention": "full,local", "window": 40}, {"segment_ids": DOCUMENTS[:, :256]}),
        ({"family": "encoder"}, {"padding_mask": VALID[:, 34:290]}),
        (
            {"family": "encoder_decoder", "depth": 1},
            {"source": DOCUMENTS[:, :128], "source_mask": VALID[:, 162:290]},
        ),
    ],
    ids=["decoder", "encoder", "encoder_decoder"],
)
def test_models_give_the_kernel_the_masks_of_all_their_attention(changes, given, monkeypatch):
    calls = []

    def spied(*args: Any) -> jax.Array:
        calls.append(args)
        return splash(*args, interpret=True)

    monkeypatch.setattr(flash, "splash", spied)
    config = dataclasses.replace(SMALL, **changes)
    params = split(build(config, rngs=nnx.Rngs(0)))[1]
    tokens = DRAW.integers(11, size=(2, 256))

    def hidden(kernel: str) -> jax.Array:
        own = dataclasses.replace(config, attention_kernel=kernel)
        graphdef = split(nnx.eval_shape(lambda: build(own, rngs=nnx.Rngs(0))))[0]
        model = nnx.merge(graphdef, params)
        return jax.jit(lambda: model.hidden(tokens, **given).hidden)()

    computed = {"auto": hidden("auto")}
    assert not calls
    computed["splash"] = hidden("splash")
    assert len(calls) == {"encoder_decoder": 3}.get(config.family, config.depth)
    used = given.get("padding_mask", np.ones((2, 256), bool))[..., None]
    np.testing.assert_allclose(computed["splash"] * used, computed["auto"] * used, atol=1e-5)


@pytest.mark.slow
def test_what_kernels_do_not_take_is_computed_by_xla(monkeypatch):
    monkeypatch.setattr(flash, "splash", None)
    config = dataclasses.replace(SMALL, attention_kernel="splash", attention_softcap=0.0)
    model = build(config, rngs=nnx.Rngs(0))
    tokens = jnp.zeros((1, 128), jnp.int32)
    assert model.hidden(tokens[:, :100]).hidden.shape == (1, 100, 16)
    assert model.hidden(tokens, capture=("attention",)).captured["attention"].shape[-1] == 128
    cached = model.hidden(tokens, cache=model.empty_cache(1)).hidden
    plain = build(dataclasses.replace(config, attention_kernel="xla"), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(cached, plain.hidden(tokens).hidden, atol=1e-5)


def test_recomputation_by_names_keeps_what_attention_needs(capsys):
    query, key, value, _ = inputs(128, 128)
    saved = jax.checkpoint_policies.save_only_these_names("attention")

    def attended(query: jax.Array) -> jax.Array:
        return jnp.sin(interpreted(jnp.sin(query), key, value, MaskRule(causal=True))).sum()

    print_saved_residuals(jax.checkpoint(attended, policy=saved), query)
    kept = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "splash" in line]
    assert kept == ["f32[2,2,128,8]", "f32[2,2,128]"]  # The z, and the log of each sum.


GPT2 = dataclasses.replace(preset("gpt2"), dropout=0.0)


@pytest.mark.parametrize(
    ("platform", "changes", "kernel", "line"),
    [
        ("cpu", {}, "xla", "Attention: XLA."),
        ("tpu", {}, "splash", "Attention: the splash kernel on TPU."),
        ("tpu", {"attention_kernel": "xla"}, "xla", "Attention: XLA."),
        ("tpu", {"attention_softcap": 50.0}, "splash", "Attention: the splash kernel on TPU."),
        (
            "tpu",
            {"dtype": "float16"},
            "xla",
            "XLA, since TPUs compute in bfloat16, not in float16.",
        ),
        ("gpu", {"dtype": "bfloat16"}, "cudnn", "Attention: cuDNN on GPU."),
        (
            "tpu",
            {"dropout": 0.1},
            "xla",
            "dropout 0.1 applies to attention weights, which the splash kernel does not drop.",
        ),
        (
            "gpu",
            {"dtype": "bfloat16", "dropout": 0.1},
            "triton",
            "Attention: the Triton kernel on GPU.",
        ),
        (
            "gpu",
            {"dtype": "bfloat16", "dropout": 0.1, "head_dim": 24},
            "xla",
            "dropout 0.1 applies to attention weights, which cuDNN does not drop.",
        ),
        (
            "tpu",
            {"position_embedding": "alibi"},
            "xla",
            "XLA, since alibi positions add a bias to the scores.",
        ),
        (
            "tpu",
            {"context_length": 1000},
            "xla",
            "XLA, since context_length 1000 is not a multiple of 128.",
        ),
        ("tpu", {"attention": "compressed"}, "xla", "XLA, since its keys are groups of tokens."),
        ("gpu", {}, "xla", "XLA, since cuDNN takes bfloat16, not float32."),
        (
            "gpu",
            {"dtype": "bfloat16", "attention_softcap": 5.0},
            "xla",
            "cuDNN does not soft-cap scores.",
        ),
        (
            "gpu",
            {"dtype": "bfloat16", "head_dim": 20},
            "xla",
            "head dims 8, 16 ... 128, not 20.",
        ),
    ],
)
def test_the_kernel_follows_from_the_platform_and_the_config(platform, changes, kernel, line):
    config, lines = resolve_kernel(dataclasses.replace(GPT2, **changes), platform, "9.0")
    assert config.attention_kernel == kernel
    assert len(lines) == 1
    assert line in lines[0]


def test_a_shared_sequence_and_mixed_layers_change_the_choice():
    assert resolve_kernel(GPT2, "tpu", sequence=8)[0].attention_kernel == "splash"
    _, lines = resolve_kernel(GPT2, "tpu", sequence=16)
    assert lines == ["Attention: XLA, since context_length 1024 is not a multiple of 2048."]
    half = dataclasses.replace(GPT2, dtype="bfloat16")
    _, lines = resolve_kernel(half, "gpu", "9.0", sequence=2)
    assert lines == ["Attention: XLA, since cuDNN does not shard a sequence over devices."]
    windowed = dataclasses.replace(half, family="encoder", attention="local", window=8)
    assert resolve_kernel(windowed, "gpu", "9.0")[0].attention_kernel == "triton"
    with pytest.raises(InputError, match="attend to earlier keys only"):
        resolve_kernel(dataclasses.replace(windowed, attention_kernel="cudnn"), "gpu", "9.0")
    mixed = dataclasses.replace(GPT2, attention="full,compressed")
    config, lines = resolve_kernel(mixed, "tpu")
    assert config.attention_kernel == "splash"
    assert lines[1] == "Compressed attention: XLA, since its keys are groups of tokens."
    translator = dataclasses.replace(GPT2, family="encoder_decoder")
    assert "not a multiple of 128 tokens" in resolve_kernel(translator, "tpu")[1][1]
    recurrent = dataclasses.replace(GPT2, family="recurrent", position_embedding="none")
    assert resolve_kernel(recurrent, "tpu")[0].attention_kernel == "xla"


@pytest.mark.parametrize(
    ("platform", "changes", "message"),
    [
        (
            "cpu",
            {"attention_kernel": "splash"},
            "TransformerConfig.attention_kernel is 'splash': it must be auto or xla here, since "
            "the splash kernel runs on a TPU, not on a CPU.",
        ),
        (
            "tpu",
            {"attention_kernel": "splash", "position_embedding": "relative"},
            "TransformerConfig.attention_kernel is 'splash': it must be auto or xla here, since "
            "relative positions add a bias to the scores.",
        ),
        (
            "gpu",
            {"attention_kernel": "cudnn", "dtype": "bfloat16", "dropout": 0.1},
            "TransformerConfig.attention_kernel is 'cudnn': it must be auto or xla here, since "
            "dropout 0.1 applies to attention weights, which cuDNN does not drop.",
        ),
    ],
)
def test_a_kernel_that_cannot_be_is_refused(platform, changes, message):
    with pytest.raises(InputError) as refused:
        resolve_kernel(dataclasses.replace(GPT2, **changes), platform, "9.0")
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("capability", "line"),
    [
        ("7.5", "cuDNN needs compute capability 8.0, and this GPU's is 7.5."),
        ("gfx90a", "cuDNN needs compute capability 8.0, and this GPU's is gfx90a."),
        ("", "cuDNN needs compute capability 8.0, and this GPU's is not known."),
    ],
)
def test_gpus_without_flash_attention_take_xlas_and_say_so(capability, line):
    half = dataclasses.replace(GPT2, dtype="bfloat16")
    config, lines = resolve_kernel(half, "gpu", capability)
    assert config.attention_kernel == "xla"
    assert lines[0] == f"Attention: XLA, since {line}"
    emulated = ["bfloat16: emulated, since this GPU's compute capability is 7.5."]
    assert lines[1:] == (emulated if capability == "7.5" else [])
    assert resolve_kernel(GPT2, "gpu", capability)[1][1:] == []  # In float32 nothing is emulated.
    for enough in ("8.0", "8.9", "10.3"):
        assert resolve_kernel(half, "gpu", enough)[1] == ["Attention: cuDNN on GPU."]


def triton_for(**changes: Any) -> TransformerConfig:
    named = {"dtype": "bfloat16", "dropout": 0.1, "attention_kernel": "triton", **changes}
    return dataclasses.replace(GPT2, **named)


def test_without_pallas_for_triton_its_kernel_is_refused(monkeypatch):
    """JAX 0.11 calls it deprecated."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="auto or xla here, since this JAX has no Pallas for Tri"):
        resolve_kernel(triton_for(), "gpu", "9.0")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"dtype": "float32"}, "the Triton kernel takes bfloat16, not float32."),
        ({"head_dim": 80}, "the Triton kernel takes head dims 16, 32, 64, 128, not 80."),
    ],
)
def test_what_the_triton_kernel_does_not_take_is_refused(changes, why):
    with pytest.raises(InputError, match=why):
        resolve_kernel(triton_for(**changes), "gpu", "9.0")


def shaped(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


MASKED = [
    MaskRule(causal=True),
    MaskRule(causal=True, window=3),
    MaskRule(causal=False, padding_mask=jnp.ones((1, 1), bool)),
    MaskRule(causal=True, segment_ids=jnp.ones((1, 1), jnp.int32)),
]


@pytest.mark.parametrize("rule", MASKED, ids=["causal", "window", "padding", "documents"])
def test_cudnn_takes_no_length_that_jax_refuses(rule, monkeypatch):
    """JAX checks them while it traces, in training more than in evaluation."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)

    def attention(query: jax.Array, key: jax.Array) -> jax.Array:
        return flash.cudnn(query, key, key, rule, 1.0)

    for length in range(1, 131):
        for keys in {length, 130} if rule.segment_ids is None else {length}:
            query, key = shaped(1, length, 1, 64), shaped(1, keys, 1, 64)
            refused = False
            try:
                jax.eval_shape(lambda *given: jax.vjp(attention, *given)[0], query, key)
            except NotImplementedError:
                refused = True
            assert flash.takes("cudnn", query, key, rule) != refused
            assert flash.takes("triton", query, key, rule)  # It pads any length.


def test_what_the_other_kernels_do_not_drop_is_xlas():
    query, many = shaped(1, 128, 2, 64), shaped(2**15, 1, 2, 16)
    rule, dropout = MaskRule(causal=True), Dropout.drawn(random_key(0), (1, 2, 128, 128), 0.1)
    for kernel in ("splash", "cudnn", "triton"):
        assert flash.takes(kernel, query, query, rule)
        assert flash.takes(kernel, query, query, rule, dropout) == (kernel == "triton")
    assert not flash.takes("triton", many, many, rule)
