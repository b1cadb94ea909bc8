"""PyTorch's own Transformer and LSTM layers are values of the config, weight for weight."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax import TransformerConfig, split
from gptjax.layers.inputs import Inputs
from gptjax.layers.lstm import LSTM, LSTMState
from gptjax.layers.stack import BlockStack

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[torch]'")

WIDTH, HEADS, HIDDEN, DEPTH = 16, 2, 24, 2
SOURCE_LENGTHS, TARGET_LENGTHS = [5, 3, 1], [4, 1, 3]

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


def config(norm_first: bool, **fields: Any) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=1,
        context_length=8,
        depth=DEPTH,
        width=WIDTH,
        heads=HEADS,
        mlp_dim=HIDDEN,
        position_embedding="none",
        activation="relu",
        norm_placement="pre" if norm_first else "post",
        **fields,
    )


def inputs(lengths: list[int], seed: int) -> tuple[Any, Any]:
    """Random x [B, T, D], and True at its padding [B, T]."""
    torch.manual_seed(seed)
    padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    return torch.randn(*padding.shape, WIDTH), padding


def randomised(module: Any) -> Any:
    """Without dropout in eval mode or not; biases and norms, too, are no zeros and ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / WIDTH**0.5)
    return module


def array(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy()


def linear(layer: Any) -> dict[str, np.ndarray]:
    return {"kernel": array(layer.weight).T, "bias": array(layer.bias)}


def norm(layer: Any) -> dict[str, np.ndarray]:
    return {"scale": array(layer.weight), "bias": array(layer.bias)}


def attention(layer: Any) -> dict[str, Any]:
    """PyTorch's rows are query, key and value after one another, each head by head."""
    head = (HEADS, WIDTH // HEADS)
    kernels = array(layer.in_proj_weight).reshape(3, *head, WIDTH)
    biases = array(layer.in_proj_bias).reshape(3, *head)
    projections = {
        name: {"kernel": np.moveaxis(kernel, -1, 0), "bias": bias}
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
    }
    output = linear(layer.out_proj)
    output["kernel"] = output["kernel"].reshape(*head, WIDTH)
    return {**projections, "output": output}


def block(layer: Any) -> dict[str, Any]:
    norms = [norm(each) for name, each in layer.named_children() if name.startswith("norm")]
    params = {
        "attention": attention(layer.self_attn),
        "attention_norm": norms[0],
        "mlp": {"up": linear(layer.linear1), "down": linear(layer.linear2)},
        "mlp_norm": norms[-1],
    }
    if len(norms) == 3:
        params["cross_attention"] = attention(layer.multihead_attn)
        params["cross_attention_norm"] = norms[1]
    return params


def stack(layers: Any, final_norm: Any, **how: Any) -> BlockStack:
    """Our stack with the weights of PyTorch's `layers`."""
    family = "encoder_decoder" if how.get("cross") else "encoder"
    own = config(layers[0].norm_first, family=family, final_norm=final_norm is not None)
    graphdef, params = split(BlockStack(own, depth=len(layers), rngs=nnx.Rngs(0), **how))
    copied = {"blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *map(block, layers))}
    if final_norm is not None:
        copied["norm"] = norm(final_norm)
    assert jax.tree.map(jnp.shape, copied) == jax.tree.map(jnp.shape, params)
    return nnx.merge(graphdef, jax.tree.map(jnp.array, copied))


def run(ours: Any, x: Any, memory: Any = None, **masks: Any) -> Any:
    """Our stack over embeddings; of the tokens it needs their masks alone."""
    return ours(x.numpy(), Inputs(x[..., 0].numpy(), **masks), key=None, memory=memory)


def assert_equal_where_valid(ours: jax.Array, theirs: Any, padding: Any) -> None:
    valid = ~padding.numpy()
    np.testing.assert_allclose(np.asarray(ours)[valid], array(theirs)[valid], atol=1e-5, rtol=1e-5)


def encoder_layer(norm_first: bool) -> Any:
    return torch.nn.TransformerEncoderLayer(
        WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=norm_first
    )


@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_layer(norm_first):
    theirs = randomised(encoder_layer(norm_first))
    x, padding = inputs(SOURCE_LENGTHS, 1)
    ours = stack([theirs], None, causal=False)
    assert_equal_where_valid(run(ours, x).hidden, theirs(x), torch.zeros_like(padding))
    hidden = run(ours, x, padding_mask=~padding.numpy()).hidden
    assert_equal_where_valid(hidden, theirs(x, src_key_padding_mask=padding), padding)


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder(norm_first, final_norm):
    last = torch.nn.LayerNorm(WIDTH) if final_norm else None
    theirs = randomised(torch.nn.TransformerEncoder(encoder_layer(norm_first), DEPTH, last))
    x, padding = inputs(SOURCE_LENGTHS, 2)
    ours = stack(theirs.layers, theirs.norm, causal=False)
    hidden = run(ours, x, padding_mask=~padding.numpy()).hidden
    assert_equal_where_valid(hidden, theirs(x, src_key_padding_mask=padding), padding)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_transformer(norm_first):
    theirs = randomised(
        torch.nn.Transformer(
            WIDTH, HEADS, DEPTH, DEPTH, HIDDEN, 0.0, batch_first=True, norm_first=norm_first
        )
    )
    source, source_padding = inputs(SOURCE_LENGTHS, 3)
    target, target_padding = inputs(TARGET_LENGTHS, 4)
    later = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
    expected = theirs(
        source,
        target,
        tgt_mask=later,
        src_key_padding_mask=source_padding,
        tgt_key_padding_mask=target_padding,
        memory_key_padding_mask=source_padding,
    )
    encoder = stack(theirs.encoder.layers, theirs.encoder.norm, causal=False)
    decoder = stack(theirs.decoder.layers, theirs.decoder.norm, causal=True, cross=True)
    source_mask = ~source_padding.numpy()
    memory = run(encoder, source, padding_mask=source_mask).hidden
    masks = {"padding_mask": ~target_padding.numpy(), "source_mask": source_mask}
    hidden = run(decoder, target, memory=memory, **masks).hidden
    assert_equal_where_valid(hidden, expected, target_padding)


def lstm(theirs: Any) -> LSTM:
    """Ours with the weights of PyTorch's, whose two biases add up."""
    recurrent = TransformerConfig(
        family="recurrent",
        vocab_size=1,
        width=WIDTH,
        heads=1,
        position_embedding="none",
        final_norm=False,
    )
    graphdef, params = split(LSTM(recurrent, rngs=nnx.Rngs(0)))
    gates = (WIDTH, 4, WIDTH)
    copied = {
        "input": {
            "kernel": array(theirs.weight_ih_l0).T.reshape(gates),
            "bias": array(theirs.bias_ih_l0 + theirs.bias_hh_l0).reshape(gates[1:]),
        },
        "recurrent": {"kernel": array(theirs.weight_hh_l0).T.reshape(gates)},
    }
    assert jax.tree.map(jnp.shape, copied) == jax.tree.map(jnp.shape, params)
    return nnx.merge(graphdef, jax.tree.map(jnp.array, copied))


def test_the_lstm():
    theirs = randomised(torch.nn.LSTM(WIDTH, WIDTH, batch_first=True))
    x, _ = inputs(SOURCE_LENGTHS, 5)
    hidden, cell = torch.randn(2, 1, len(x), WIDTH)
    expected, last = theirs(x, (hidden, cell))
    before = LSTMState(jnp.array(hidden[0].numpy()), jnp.array(cell[0].numpy()))
    output, state = lstm(theirs)(jnp.array(x.numpy()), before)
    np.testing.assert_allclose(output, array(expected), atol=1e-5)
    np.testing.assert_allclose(state.hidden, array(last[0][0]), atol=1e-5)
    np.testing.assert_allclose(state.cell, array(last[1][0]), atol=1e-5)


def test_the_lstm_with_sequences_of_different_lengths():
    theirs = randomised(torch.nn.LSTM(WIDTH, WIDTH, batch_first=True))
    x, padding = inputs(SOURCE_LENGTHS, 6)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, SOURCE_LENGTHS, batch_first=True)
    expected, last = theirs(packed)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(expected, batch_first=True)
    zeros = jnp.zeros((len(x), WIDTH))
    output, state = lstm(theirs)(
        jnp.array(x.numpy()), LSTMState(zeros, zeros), padding_mask=jnp.array(~padding.numpy())
    )
    assert_equal_where_valid(output, expected, padding)
    np.testing.assert_allclose(state.hidden, array(last[0][0]), atol=1e-5)
    np.testing.assert_allclose(state.cell, array(last[1][0]), atol=1e-5)
