"""Norm placement: pre-norm, post-norm and other residual connections around a layer f.

| `norm_placement` | the residual stream after a layer f | source |
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
from jaxtyping import Array, Float

from gptjax.config.values import Placement
from gptjax.parallel.sharding import constrain


class Residual(NamedTuple):
    """The residual connection around one layer f: x becomes `add(x, f(read(x)))`."""

    placement: Placement
    norm: Callable[[jax.Array], jax.Array]
    """Of the layer's input (pre-norm) or of the sum (post-norm); the identity without a norm."""
    norm_after: Callable[[jax.Array], jax.Array]
    """Of the layer's output; the identity without a norm."""

    def read(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's input: the residual stream x, normalised in pre-norm placements."""
        return constrain(self.norm(x) if self.placement.before else x, "BtD")

    def add(
        self, x: Float[Array, "B T D"], *outputs: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """The residual stream x plus the outputs of the layer, or of all parallel layers."""
        for output in outputs:
            x = x + (self.norm_after(output) if self.placement.after else output)
        return constrain(self.norm(x) if self.placement.of_sum else x, "BtD")
