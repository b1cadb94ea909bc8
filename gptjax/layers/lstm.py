"""The LSTM that the Transformer displaced: the baseline.

Hochreiter & Schmidhuber 1997 with forget gates (Gers et al. 2000), stacked with dropout between the
layers as in Zaremba et al. 2014.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import TransformerConfig
from gptjax.layers.dropout import dropout
from gptjax.layers.linear import Linear

GATES = 4
"""Input, forget, candidate and output, in this order, which is PyTorch's."""


class LSTMState(NamedTuple):
    """What one layer remembers; of any length of text the same size."""

    hidden: jax.Array
    """[B, D]."""
    cell: jax.Array
    """[B, D], float32."""


class LSTM(nnx.Module):
    """One layer over a sequence."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.input = Linear((width,), (GATES, width), axes="D-F", bias=config.bias, rngs=rngs)
        self.recurrent = Linear((width,), (GATES, width), axes="D-F", bias=False, rngs=rngs)
        if self.input.bias is not None:
            # An open forget gate at the start (Jozefowicz et al. 2015).
            self.input.bias[...] = self.input.bias[...].at[1].set(1.0)
        self.dropout = config.dropout

    def __call__(
        self,
        x: jax.Array,
        state: LSTMState,
        *,
        padding_mask: jax.Array | None = None,
        begins: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, LSTMState]:
        """[B, T, D] and the state before → [B, T, D] and the state after.

        Args:
          x: [B, T, D].
          state: from the tokens before.
          padding_mask: [B, T], False at padding, which leaves the state as it is.
          begins: [B, T], True where the state is forgotten before the token is read; None nowhere.
          key: dropout key; None drops nothing.
        """
        # All inputs in one product; only the recurrence itself goes token by token.
        projected = jnp.moveaxis(self.input(x), 1, 0)
        kept = jnp.ones(x.shape[:2], bool) if padding_mask is None else padding_mask

        def step(state: LSTMState, inputs):
            gates, keep, begin = inputs
            if begin is not None:
                state = jax.tree.map(lambda leaf: jnp.where(begin[:, None], 0, leaf), state)
            gates = gates.astype(jnp.float32) + self.recurrent(state.hidden).astype(jnp.float32)
            enter, forget, candidate, leave = jnp.moveaxis(gates, 1, 0)
            cell = jax.nn.sigmoid(forget) * state.cell
            cell += jax.nn.sigmoid(enter) * jnp.tanh(candidate)
            hidden = (jax.nn.sigmoid(leave) * jnp.tanh(cell)).astype(x.dtype)
            new = LSTMState(hidden, cell)
            state = jax.tree.map(lambda a, b: jnp.where(keep[:, None], a, b), new, state)
            return state, hidden

        state, outputs = jax.lax.scan(
            step, state, (projected, kept.T, None if begins is None else begins.T)
        )
        return dropout(jnp.moveaxis(outputs, 0, 1), self.dropout, key), state


def empty_state(config: TransformerConfig, batch_size: int) -> LSTMState:
    """Before the first token."""
    shape = (batch_size, config.width)
    return LSTMState(jnp.zeros(shape, config.dtype), jnp.zeros(shape, jnp.float32))
