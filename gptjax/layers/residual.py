"""Where norms stand around a layer f, and how the residual stream takes what it adds.

| `norm_placement` | the stream after a layer f | source |
|---|---|---|
| pre | x + f(norm(x)) | GPT-2 (Radford et al. 2019, section 2.3) |
| post | norm(x + f(x)) | Vaswani et al. 2017, section 3.1; BERT, GPT-1 |
| sandwich | x + norm(f(norm(x))) | CogView (Ding et al. 2021); Gemma 2 |
| parallel | x + attention(norm(x)) + mlp(norm'(x)) | GPT-NeoX (Black et al. 2022) |
| parallel_shared | x + attention(norm(x)) + mlp(norm(x)) | GPT-J (Wang 2021) |
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from gptjax.config.values import Placement
from gptjax.parallel.sharding import constrain


class Residual(NamedTuple):
    """The stream around one layer f: x becomes `add(x, f(read(x)))`."""

    placement: Placement
    norm: Callable[[jax.Array], jax.Array]
    """Before the layer, or of the sum; the identity where there is none."""
    norm_after: Callable[[jax.Array], jax.Array]
    """Of what the layer adds; the identity where there is none."""

    def read(self, x: jax.Array) -> jax.Array:
        """What the layer reads of the stream x [B, T, D]."""
        return constrain(self.norm(x) if self.placement.before else x, "BtD")

    def add(self, x: jax.Array, *outputs: jax.Array) -> jax.Array:
        """The stream x [B, T, D] with the outputs of the layer, or of all parallel ones, added."""
        for output in outputs:
            x = x + (self.norm_after(output) if self.placement.after else output)
        return constrain(self.norm(x) if self.placement.of_sum else x, "BtD")
