"""The shapes in the annotations of layers/ and models/ are those of the arrays."""

import subprocess
import sys

import pytest

PROGRAM = """
import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
from flax import nnx

with jaxtyping.install_import_hook(["gptjax.layers", "gptjax.models"], "beartype.beartype"):
    import gptjax.models.plain
    from gptjax import TransformerConfig, build, split
    from gptjax.layers import attention, dropout

TINY = TransformerConfig(
    vocab_size=11, context_length=8, depth=2, width=16, heads=4, kv_heads=2, head_dim=6, mlp_dim=20,
    dropout=0.1,
)
TOKENS = jnp.arange(12).reshape(2, 6) % 11
MASK = TOKENS > 0
PACKED = {"segment_ids": jnp.ones((2, 6), int), "positions": jnp.arange(6)[None].repeat(2, 0)}
PADDED = {"padding_mask": MASK}
SOURCE = {"source": TOKENS[:, :5], "source_mask": MASK[:, :5]}
CAPTURE = {"capture": ("scores", "attention", "head_output")}
VARIANTS = [
    (dict(position_embedding="rotary", activation="swiglu", norm="rmsnorm", qk_norm=True), PACKED),
    (dict(attention="local,compressed", window=3, compression=2, dtype="bfloat16"), CAPTURE),
    (dict(position_embedding="alibi", attention_normalizer="sigmoid", scan_layers=True), PADDED),
    (dict(position_embedding="relative", norm_placement="parallel", logit_softcap=5.0), CAPTURE),
    (dict(num_experts=3, capacity_factor=1.0, norm_placement="sandwich"), PADDED),
    (dict(family="encoder", encoder_heads="pretraining", token_types=2, head_bias=True), PACKED),
    (dict(family="encoder_decoder", position_embedding="sinusoidal"), SOURCE),
    (dict(family="recurrent", position_embedding="none"), PACKED | PADDED),
]
for changes, inputs in VARIANTS:
    config = dataclasses.replace(TINY, **changes)
    model = build(config, rngs=nnx.Rngs(0))
    graphdef, params = split(model)

    def loss(params, key):
        return nnx.merge(graphdef, params)(TOKENS, key=key, **inputs).var()

    jax.eval_shape(jax.grad(loss), params, jax.random.key(0))
    if config.family == "encoder":
        jax.eval_shape(lambda: model.next_sentence_logits(model.hidden(TOKENS).hidden))
        continue
    first = inputs["source"] if "source" in inputs else len(TOKENS)
    for index in (2, jnp.array([2, 1])):  # One slot for all rows, and one per row.
        given = dict(cache=model.empty_cache(first), cache_index=index)
        jax.eval_shape(lambda: model(TOKENS[:, :1], **given))

gpt2 = dataclasses.replace(TINY, kv_heads=0, head_dim=0, activation="gelu_tanh")
params = split(build(gpt2, rngs=nnx.Rngs(0)))[1]
jax.eval_shape(gptjax.models.plain.gpt2, params, TOKENS)
try:  # The checker is on.
    dropout.dropout(TOKENS, 0.5, None)
except jaxtyping.TypeCheckError:
    print("checked")
"""


@pytest.mark.slow
def test_annotated_shapes_hold_in_training_and_decoding_of_every_family():
    pytest.importorskip("beartype")
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout == "checked\n", done.stderr[-3000:]
