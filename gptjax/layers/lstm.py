"""The LSTM (Hochreiter & Schmidhuber 1997), the baseline that the Transformer displaced.

With forget gates (Gers et al. 2000), and dropout between stacked layers as in Zaremba et al. 2014.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Key

from gptjax.config import TransformerConfig
from gptjax.layers.dropout import dropout
from gptjax.layers.linear import Linear

GATES = 4
"""Input, forget, candidate (cell) and output gate, in PyTorch's order."""


class LSTMState(NamedTuple):
    """The recurrent state of one layer."""

    hidden: Float[Array, "B D"]
    cell: Float32[Array, "B D"]


class LSTM(nnx.Module):
    """One LSTM layer."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.input = Linear((width,), (GATES, width), axes="D-F", bias=config.bias, rngs=rngs)
        self.recurrent = Linear((width,), (GATES, width), axes="D-F", bias=False, rngs=rngs)
        if self.input.bias is not None:
            # The forget gate's bias starts at 1 (Jozefowicz et al. 2015).
            self.input.bias[...] = self.input.bias[...].at[1].set(1.0)
        self.dropout = config.dropout

    @jax.named_scope("lstm")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: LSTMState,
        *,
        padding_mask: Bool[Array, "B T"] | None = None,
        reset: Bool[Array, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], LSTMState]:
        """The hidden state at each token, and the final state.

        Args:
          x: the inputs.
          state: the initial state.
          padding_mask: False at padding, which leaves the state unchanged.
          reset: True where the state is set to zero before the token is read; None resets nowhere.
          key: dropout key; None: no dropout.
        """
        # One product for all inputs; only the recurrence is sequential.
        projected = jnp.moveaxis(self.input(x), 1, 0)
        mask = jnp.ones(x.shape[:2], bool) if padding_mask is None else padding_mask

        def step(state: LSTMState, inputs):
            gates, is_token, reset = inputs
            if reset is not None:
                state = jax.tree.map(lambda leaf: jnp.where(reset[:, None], 0, leaf), state)
            gates = gates.astype(jnp.float32) + self.recurrent(state.hidden).astype(jnp.float32)
            input_gate, forget, candidate, output = jnp.moveaxis(gates, 1, 0)
            cell = jax.nn.sigmoid(forget) * state.cell
            cell += jax.nn.sigmoid(input_gate) * jnp.tanh(candidate)
            hidden = (jax.nn.sigmoid(output) * jnp.tanh(cell)).astype(x.dtype)
            new = LSTMState(hidden, cell)
            state = jax.tree.map(lambda a, b: jnp.where(is_token[:, None], a, b), new, state)
            return state, hidden

        state, outputs = jax.lax.scan(
            step, state, (projected, mask.T, None if reset is None else reset.T)
        )
        return dropout(jnp.moveaxis(outputs, 0, 1), self.dropout, key), state


def initial_state(config: TransformerConfig, batch_size: int) -> LSTMState:
    """The zero state of one layer."""
    shape = (batch_size, config.width)
    return LSTMState(jnp.zeros(shape, config.dtype), jnp.zeros(shape, jnp.float32))
