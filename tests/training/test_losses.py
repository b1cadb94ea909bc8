import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from gptjax import InputError, OptimizerConfig, TransformerConfig, build, split
from gptjax.data.batch import Batch
from gptjax.training import cross_entropy as module
from gptjax.training.cross_entropy import cross_entropy
from gptjax.training.losses import token_loss
from gptjax.training.optimizers import build_optimizer
from gptjax.training.step import compile_train_step, init_state

TOKENS, WIDTH, VOCABULARY = 10, 6, 23
KEYS = jax.random.split(jax.random.key(0), 4)
HIDDEN = jax.random.normal(KEYS[0], (TOKENS, WIDTH))
TABLE = jax.random.normal(KEYS[1], (VOCABULARY, WIDTH))
TARGETS = jax.random.randint(KEYS[2], (TOKENS,), 0, VOCABULARY)
WEIGHTS = jnp.array([1.0, 0.0, 2.0, 1.0, 1.0, 0.5, 0.0, 1.0, 1.0, 1.0])


def textbook(hidden, table, label_smoothing, z_loss, bias=0.0, logit_softcap=0.0):
    """The definition, left to autodiff."""
    logits = hidden @ table.T + bias
    if logit_softcap:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    log_probability = jax.nn.log_softmax(logits)
    wanted = (1 - label_smoothing) * jax.nn.one_hot(TARGETS, VOCABULARY)
    wanted += label_smoothing / VOCABULARY
    log_z = jax.nn.logsumexp(logits, axis=-1)
    losses = -(wanted * log_probability).sum(axis=-1) + z_loss * log_z**2
    return (WEIGHTS * losses).sum()


@pytest.mark.parametrize("chunk", [0, 1, 4, 10, 99])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.2, 0.01)])
def test_cross_entropy_and_its_gradient_are_the_textbooks(chunk, label_smoothing, z_loss):
    def ours(hidden, table):
        return cross_entropy(
            hidden, table, TARGETS, WEIGHTS,
            chunk=chunk, label_smoothing=label_smoothing, z_loss=z_loss,
        ).loss  # fmt: skip

    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(HIDDEN, TABLE)
    expected, wanted = jax.value_and_grad(textbook, argnums=(0, 1))(
        HIDDEN, TABLE, label_smoothing, z_loss
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours(HIDDEN, TABLE), expected, rtol=1e-5)


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("logit_softcap", [0.0, 1.5])
def test_a_bias_and_a_cap_are_the_textbooks_too(chunk, logit_softcap):
    bias = jax.random.normal(jax.random.key(5), (VOCABULARY,))

    def ours(hidden, table, bias):
        return cross_entropy(
            hidden, table, TARGETS, WEIGHTS,
            bias=bias, logit_softcap=logit_softcap, chunk=chunk, label_smoothing=0.1, z_loss=0.01,
        ).loss  # fmt: skip

    def plain(hidden, table, bias):
        return textbook(hidden, table, 0.1, 0.01, bias, logit_softcap)

    arguments = (HIDDEN, TABLE, bias)
    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*arguments)
    expected, wanted = jax.value_and_grad(plain, argnums=(0, 1, 2))(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-5)


BFLOAT16 = 2.0**-8  # Spacing of its numbers, relative: rounding is half of it.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "z_loss": 0.01},
        {"logit_softcap": 5.0, "bias": True},
        {"chunk": 24},
    ],
)
def test_logits_of_bfloat16_have_the_loss_of_float32_within_their_rounding(options, monkeypatch):
    """What GPUs compute; log Z of 4,096 logits, in bfloat16, would be further off."""
    hidden = jax.random.normal(KEYS[0], (64, 16), jnp.bfloat16) / 8
    table = jax.random.normal(KEYS[1], (4096, 16)).astype(jnp.bfloat16).astype(jnp.float32)
    targets = jax.random.randint(KEYS[2], (64,), 0, 4096)
    weights = jnp.linspace(0, 2, 64)
    bias = jnp.linspace(-1, 1, 4096) if options.get("bias") else None
    chosen = module._Options(**{
        "chunk": 0, "vocab_size": 4096, "logit_softcap": 0.0, "label_smoothing": 0.0,
        "z_loss": 0.0, **{name: value for name, value in options.items() if name != "bias"},
    })  # fmt: skip

    def losses(hidden):
        tokens = module._Tokens(hidden, targets, weights)
        return module._cross_entropy_forward(tokens, table, bias, chosen)

    expected, wanted = losses(hidden.astype(jnp.float32))
    monkeypatch.setattr(module, "by_platform", lambda *given, gpu, other: gpu(*given))
    found, gradients = losses(hidden)
    largest = float(jnp.abs(hidden.astype(jnp.float32) @ table.T).max())
    # A logit moves by half a spacing at most; in log Z the moves of 4,096 logits cancel, so that
    # the sum moves by those of the targets: four standard deviations of as many uniform numbers.
    moved = largest * BFLOAT16 / 2
    atol = 4 * moved / 3**0.5 * float(jnp.linalg.norm(weights))
    np.testing.assert_allclose(found[0], expected[0], atol=atol, rtol=0)
    np.testing.assert_allclose(found[1], expected[1], atol=atol, rtol=0)
    # Probabilities move by e^(2 moved); each gradient is a sum of them, rounded once or twice.
    for gradient, want in zip(*map(jax.tree.leaves, (gradients, wanted)), strict=True):
        difference = np.linalg.norm(np.asarray(gradient, np.float32) - want)
        assert difference <= (np.expm1(2 * moved) + 2 * BFLOAT16) * np.linalg.norm(want)


def test_sums_are_weighted_and_the_plain_cross_entropy_is_reported():
    sums = cross_entropy(HIDDEN, TABLE, TARGETS, WEIGHTS, label_smoothing=0.3, z_loss=0.1)
    assert sums.weight == WEIGHTS.sum()
    np.testing.assert_allclose(sums.cross_entropy, textbook(HIDDEN, TABLE, 0.0, 0.0), rtol=1e-5)


def test_large_logits_do_not_overflow():
    sums = cross_entropy(1000 * HIDDEN, TABLE, TARGETS, WEIGHTS)
    assert np.isfinite(sums.loss)


@pytest.mark.parametrize(("chunk", "largest"), [(0, 400), (50, 50)])
def test_chunks_bound_the_logits_that_exist(chunk, largest):
    hidden, table = jnp.ones((400, 4)), jnp.ones((1000, 4))

    def loss(hidden, table):
        return cross_entropy(
            hidden, table, jnp.zeros(400, jnp.int32), jnp.ones(400), chunk=chunk
        ).loss

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, table).as_text()
    assert f"tensor<{largest}x1000xf32>" in program
    assert ("tensor<400x1000xf32>" in program) == (chunk == 0)
    assert "tensor<8x50x1000xf32>" not in program


BERT = TransformerConfig(
    family="encoder", encoder_heads="pretraining", vocab_size=VOCABULARY, context_length=6, depth=1,
    width=8, heads=2, token_types=2,
)  # fmt: skip
ROWS = 8


def pairs() -> Batch:
    """Rows of two segments, with as many hidden tokens as their number; the last two have none."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(VOCABULARY, size=(2, ROWS, 6), dtype=np.int32)
    weights = (np.arange(6) < [[1], [2], [3], [4], [5], [6], [0], [0]]).astype(np.float32)
    labels = np.array([0, 1, 1, 0, 1, 0, 1, 1], np.int32)
    valid, token_types = np.arange(6) < 5, np.arange(6, dtype=np.int32) // 3
    return Batch(
        tokens[0], tokens[1], weights,
        padding_mask=np.tile(valid, (ROWS, 1)), token_types=np.tile(token_types, (ROWS, 1)),
        next_sentence=labels,
    )  # fmt: skip


def test_the_next_sentences_loss_is_added_as_a_mean_over_rows():
    graphdef, params = split(build(BERT, rngs=nnx.Rngs(0)))
    batch = pairs()
    for layer in ("pooler", "next_sentence"):
        params[layer]["kernel"] *= 30  # As initialised, both answers are almost equally likely.
    loss = jax.jit(token_loss(graphdef), static_argnums=2)
    sums = loss(params, batch, None)
    masked = loss(params, batch._replace(next_sentence=None), None)
    # By hand, from the head's weights: BERT's pooler is tanh of a layer of the first token.

    @jax.jit
    def hidden_of(params, batch):
        return nnx.merge(graphdef, params).hidden(batch.tokens, **batch.inputs()).hidden

    hidden = np.asarray(hidden_of(params, batch))
    pooler, head = params["pooler"], params["next_sentence"]
    pooled = np.tanh(hidden[:, 0] @ pooler["kernel"] + pooler["bias"])
    logits = pooled @ np.asarray(head["kernel"]) + head["bias"]
    assert batch.next_sentence is not None
    other = logits[np.arange(ROWS), 1 - batch.next_sentence]
    each = np.log1p(np.exp(other - logits[np.arange(ROWS), batch.next_sentence]))
    rows = np.arange(1, 7)
    expected = (each[:6] * rows).sum() / rows.sum()
    np.testing.assert_allclose((sums.loss - masked.loss) / sums.weight, expected, rtol=1e-4)
    assert sums.cross_entropy == masked.cross_entropy == masked.loss
    assert sums.weight == masked.weight == rows.sum()


@pytest.mark.slow
def test_the_next_sentences_loss_adds_up_over_parts_and_devices():
    graphdef, params = split(build(BERT, rngs=nnx.Rngs(0)))
    # The rows are in such an order that those without hidden tokens are a part of their own.
    optimizer = build_optimizer(OptimizerConfig(), steps=1000)
    found = []
    for grad_accumulation, devices in ((1, 1), (2, 2)):
        devices_used = jax.devices()[:devices]
        mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=devices_used)
        state = init_state(lambda: params, optimizer, mesh)
        step = compile_train_step(
            token_loss(graphdef),
            optimizer,
            state,
            pairs(),
            mesh,
            grad_accumulation=grad_accumulation,
        )
        found.append(jax.device_get(step(state, pairs())[1]))
    assert found[0].leaf_norms["next_sentence"]["kernel"] > 0
    jax.tree.map(
        lambda first, second: np.testing.assert_allclose(first, second, rtol=2e-4, atol=1e-6),
        *found,
    )


@pytest.mark.parametrize(
    ("changes", "heads"), [({"encoder_heads": "masked_lm"}, "masked_lm"), ({}, "none")]
)
def test_a_model_without_the_next_sentences_head_refuses_in_one_sentence(changes, heads):
    family = "encoder" if changes else "decoder"
    config = TransformerConfig(
        family=family, vocab_size=VOCABULARY, context_length=6, depth=1, width=8, heads=2, **changes
    )
    graphdef, params = split(build(config, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError) as error:
        jax.eval_shape(token_loss(graphdef), params, pairs()._replace(token_types=None), None)
    assert str(error.value) == (
        "The batch has next_sentence labels: TransformerConfig.encoder_heads must be "
        f"'pretraining', and is '{heads}'."
    )
