import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from gptjax.certify.properties import product_flops
from gptjax.config import TransformerConfig
from gptjax.costs.model import model_cost
from gptjax.models.build import build, split
from gptjax.models.presets import PRESETS, preset
from gptjax.training.leaves import leaf_names

SMALL = TransformerConfig(vocab_size=37, context_length=6, depth=3, width=8, heads=2)
GRID = {
    "plain": SMALL,
    "no bias": dataclasses.replace(SMALL, bias=False),
    "untied": dataclasses.replace(SMALL, tie_embeddings=False),
    "rotary": dataclasses.replace(SMALL, position_embedding="rotary"),
    "no positions": dataclasses.replace(SMALL, position_embedding="none"),
    "rmsnorm": dataclasses.replace(SMALL, norm="rmsnorm"),
    "rmsnorm, no bias": dataclasses.replace(SMALL, norm="rmsnorm", bias=False),
    "mlp_dim": dataclasses.replace(SMALL, mlp_dim=20),
    "scanned": dataclasses.replace(SMALL, scan_layers=True),
    "remat": dataclasses.replace(SMALL, remat="full"),
    "all": dataclasses.replace(
        SMALL,
        bias=False,
        tie_embeddings=False,
        position_embedding="none",
        norm="rmsnorm",
        mlp_dim=12,
    ),
    "sinusoidal": dataclasses.replace(SMALL, position_embedding="sinusoidal"),
    "alibi": dataclasses.replace(SMALL, position_embedding="alibi", embedding_norm=True),
    "relative": dataclasses.replace(SMALL, position_embedding="relative"),
    "post": dataclasses.replace(SMALL, norm_placement="post", final_norm=False),
    "sandwich": dataclasses.replace(SMALL, norm_placement="sandwich"),
    "parallel": dataclasses.replace(
        SMALL, norm_placement="parallel", head_bias=True, tie_embeddings=False
    ),
    "one norm": dataclasses.replace(SMALL, norm_placement="parallel_shared", query_bias=False),
    "grouped": dataclasses.replace(SMALL, kv_heads=1, head_dim=6, output_bias=False),
    "alternating": dataclasses.replace(SMALL, depth=4, attention="full,local", window=2),
    "compressed": dataclasses.replace(SMALL, depth=4, attention="local,compressed", window=2),
    "normed queries": dataclasses.replace(SMALL, qk_norm=True, attention_softcap=5.0),
    "gated": dataclasses.replace(SMALL, activation="swiglu"),
    "num_experts": dataclasses.replace(SMALL, num_experts=4, activation="swiglu"),
    "plain experts": dataclasses.replace(SMALL, num_experts=3, experts_per_token=1),
    "encoder": dataclasses.replace(SMALL, family="encoder", token_types=2),
    "bert": dataclasses.replace(
        SMALL, family="encoder", token_types=2, encoder_heads="pretraining", head_bias=True
    ),
    "pooler": dataclasses.replace(SMALL, family="encoder", encoder_heads="pooler"),
    "masked LM": dataclasses.replace(SMALL, family="encoder", encoder_heads="masked_lm"),
    "encoder-decoder": dataclasses.replace(SMALL, family="encoder_decoder", encoder_depth=2),
    "relative encoder-decoder": dataclasses.replace(
        SMALL, family="encoder_decoder", norm_placement="sandwich", position_embedding="relative"
    ),
    "lstm": dataclasses.replace(
        SMALL, family="recurrent", position_embedding="none", final_norm=False
    ),
}
EVERY_CONFIG = pytest.mark.parametrize("config", GRID.values(), ids=GRID.keys())


def _leaves(config: TransformerConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The model's parameters by name, as shapes: nothing is computed."""
    _, params = split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
    return dict(zip(leaf_names(params), jax.tree.leaves(params), strict=True))


def _part(name: str, config: TransformerConfig) -> str:
    """The model cost's name for the leaf called `name`."""
    if name == "bias":
        return "head bias"
    *modules, kind = name.split(".")
    module = modules[-1]
    heads = {"pooler": "pooler", "next_sentence": "next-sentence head"}
    heads |= dict.fromkeys(("masked_lm", "masked_lm_norm"), "masked-LM head")
    if module in heads:
        return heads[module]
    if module.endswith(("norm", "norm_after")):
        return "norms"
    if kind == "bias":
        return "biases"
    if "cross_attention" in modules:
        return f"cross {module}"
    if config.num_experts and module in ("up", "gate", "down"):
        return f"expert {module}"
    if modules[0] == "layers":
        return f"{module} gates"
    if module.startswith("compress_"):
        return "compression"
    return {"head": "unembedding", "relative": "relative positions"}.get(module, module)


def _inputs(config: TransformerConfig, tokens: jax.Array) -> dict[str, jax.Array]:
    """What the family is given beside the tokens: a source as long as they are."""
    return {"source": tokens} if config.family == "encoder_decoder" else {}


def _matrices(name: str, leaf: jax.ShapeDtypeStruct) -> int:
    """How many layers' (and experts') matrices or vectors a leaf holds."""
    layered = ".blocks." in name or name.startswith("layers.")
    per_layer = leaf.shape[1] if leaf.ndim == 4 and ".mlp." in name else 1
    return leaf.shape[0] * per_layer if layered else 1


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt1", 116_534_784),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        # The counts of Hugging Face's models from the released configurations.
        ("bert-base", 110_106_428),
        ("gpt-j-6b", 6_050_882_784),
        ("gpt-neox-20b", 20_554_567_680),
        ("pythia-160m", 162_322_944),
        ("smollm-135m", 134_515_008),
    ],
)
def test_a_preset_has_the_published_number_of_parameters(name, parameters):
    assert model_cost(preset(name)).parameters == parameters


def test_bert_base_with_its_pooler_alone_has_the_published_number():
    pooled = dataclasses.replace(preset("bert-base"), encoder_heads="pooler", head_bias=False)
    assert model_cost(pooled).parameters == 109_482_240


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt3-125m", 0.125),
        ("gpt3-350m", 0.350),
        ("gpt3-760m", 0.760),
        ("gpt3-1.3b", 1.3),
        ("gpt3-2.7b", 2.7),
        ("gpt3-6.7b", 6.7),
        ("gpt3-13b", 13.0),
        ("gpt3-175b", 174.6),
    ],
)
def test_gpt3_has_the_papers_sizes(name, billions):
    # Table 2.1 rounds to two or three digits.
    assert model_cost(preset(name)).parameters / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_the_parameters_that_are_built(name):
    built = sum(math.prod(leaf.shape) for leaf in _leaves(preset(name)).values())
    assert model_cost(preset(name)).parameters == built


def test_active_parameters_of_a_mixture_are_those_of_the_chosen_experts():
    config = GRID["num_experts"]
    one = dataclasses.replace(config, num_experts=0)
    router = config.depth * config.width * config.num_experts
    biases = config.depth * (2 * config.actual_mlp_dim + config.width)
    expert = config.depth * 3 * config.width * config.actual_mlp_dim
    counted = model_cost(config)
    assert counted.active_parameters == model_cost(one).parameters - biases + router + expert
    assert model_cost(one).active_parameters == model_cost(one).parameters


@EVERY_CONFIG
def test_parameters_by_part_are_the_leaves_of_the_model(config):
    counted: dict[str, int] = {}
    for name, leaf in _leaves(config).items():
        part = _part(name, config)
        counted[part] = counted.get(part, 0) + math.prod(leaf.shape)
    assert {part.name: part.parameters for part in model_cost(config).parts} == counted
    assert model_cost(config).parameters == sum(counted.values())


@EVERY_CONFIG
def test_matrices_by_part_are_the_leaves_of_the_model(config):
    counted: dict[str, int] = {}
    for name, leaf in _leaves(config).items():
        part = _part(name, config)
        counted[part] = counted.get(part, 0) + _matrices(name, leaf)
    assert {part.name: part.matrices for part in model_cost(config).parts} == counted


def test_products_are_counted_within_batches_scans_and_custom_derivatives():
    @jax.custom_vjp
    def multiply(x, y):
        return jnp.einsum("bij,bjk->bik", x, y)

    multiply.defvjp(lambda x, y: (multiply(x, y), None), lambda _, gradient: (gradient, gradient))

    def repeated(x):
        step = jax.jit(jax.checkpoint(multiply))
        return jax.lax.scan(lambda carry, _: (step(carry, carry), None), x, length=5)[0]

    x = jnp.zeros((7, 3, 3))
    assert product_flops(jax.make_jaxpr(repeated)(x).jaxpr) == 5 * 7 * 2 * 3 * 3 * 3
    row_by_row = jax.make_jaxpr(lambda x: jnp.einsum("bd,bd->b", x, x))(jnp.zeros((4, 3)))
    assert product_flops(row_by_row.jaxpr) == 0


@EVERY_CONFIG
def test_forward_flops_are_those_of_every_product_at_full_context(config):
    graphdef, params = split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((5, config.context_length), jnp.int32)

    def forward(params, tokens):
        return nnx.merge(graphdef, params)(tokens, **_inputs(config, tokens))

    products = product_flops(jax.make_jaxpr(forward)(params, tokens).jaxpr)
    assert products == tokens.size * model_cost(config).forward_flops


@EVERY_CONFIG
def test_training_flops_are_those_of_every_product_and_leave_recomputation_out(config):
    unrecomputed = dataclasses.replace(config, remat="none")
    graphdef, params = split(nnx.eval_shape(lambda: build(unrecomputed, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((5, config.context_length), jnp.int32)

    def summed(params, tokens):
        return nnx.merge(graphdef, params)(tokens, **_inputs(config, tokens)).sum()

    gradient = jax.make_jaxpr(jax.grad(summed))
    products = product_flops(gradient(params, tokens).jaxpr)
    assert products == tokens.size * model_cost(config).training_flops


@EVERY_CONFIG
def test_the_attention_term_is_what_grows_with_the_context(config):
    once, twice, thrice = (
        model_cost(dataclasses.replace(config, context_length=times * config.context_length))
        for times in (1, 2, 3)
    )
    growth = twice.attention_flops - once.attention_flops
    assert thrice.attention_flops - twice.attention_flops == growth
    assert (growth > 0) == (config.family != "recurrent")
    assert twice.matrix_flops == once.matrix_flops
    assert once.forward_flops == once.matrix_flops + once.attention_flops


@EVERY_CONFIG
def test_bytes_are_those_of_the_training_state(config):
    _, params = split(nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0))))
    adamw = jax.tree.leaves(jax.eval_shape(optax.adamw(1e-3).init, params))
    moments = [leaf for leaf in adamw if leaf.ndim]  # The other is the count of steps.
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    assert model_cost(config).state_bytes == {
        "parameters": size,
        "gradients": size,
        "optimizer (AdamW)": sum(leaf.size * leaf.dtype.itemsize for leaf in moments),
    }
