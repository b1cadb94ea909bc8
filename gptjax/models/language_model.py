"""What every family of models shares: tokens' embeddings on the way in, the head on the way out."""

import math
from typing import Any, ClassVar, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from gptjax.config import InputError, TransformerConfig
from gptjax.layers.dropout import dropout
from gptjax.layers.embedding import Embedding
from gptjax.layers.hooks import check_hook_points
from gptjax.layers.inputs import Inputs
from gptjax.layers.norms import build_norm
from gptjax.layers.positions import sinusoidal
from gptjax.layers.stack import StackOutput
from gptjax.parallel.sharding import constrain

OF_SOME_FAMILIES = (
    "padding_mask",
    "segment_ids",
    "token_types",
    "positions",
    "source",
    "source_mask",
    "cache",
    "layers",
)
"""The fields of `Inputs` that not every family takes."""


class LanguageModel(nnx.Module):
    """What all families share: the embedding of tokens on the way in, the head on the way out.

    Raises:
      InputError: a config without a vocabulary size.
    """

    takes: ClassVar[tuple[str, ...]] = ()
    """Of `OF_SOME_FAMILIES`, the inputs that the family takes."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        if config.vocab_size == 0:
            raise InputError("TransformerConfig.vocab_size is 0: a model needs at least 1 token.")
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width, axes="VD", rngs=rngs)
        if config.position_embedding == "learned":
            self.positions = Embedding(config.context_length, config.width, axes="-D", rngs=rngs)
        if config.token_types:
            self.token_types = Embedding(config.token_types, config.width, axes="-D", rngs=rngs)
        self.embedding_norm = build_norm(config) if config.embedding_norm else None
        if not config.tie_embeddings:
            self.head = Embedding(config.vocab_size, config.width, axes="VD", rngs=rngs)
        bias = nnx.Param(jnp.zeros(config.vocab_size, jnp.float32), axes="V")
        self.bias = bias if config.head_bias else None

    def __call__(self, tokens: Any, **inputs: Any) -> jax.Array:
        """Tokens [B, T] → logits [B, T, V], float32.

        Of the token that follows each; of an encoder, of the token at each position. `inputs` are
        the fields of `Inputs`.
        """
        return self.unembed(self.readout(self.hidden(tokens, **inputs).hidden))

    def hidden(self, tokens: Any, **inputs: Any) -> StackOutput:
        """Everything before the head; `inputs` are the fields of `Inputs`.

        Raises:
          InputError: more tokens than the context, an unknown hook point, or an input that the
            family does not take.
        """
        given = Inputs(tokens, **inputs)
        self.check(given)
        return self.forward(given)

    def forward(self, inputs: Inputs) -> StackOutput:
        """`hidden` of inputs that were checked; each family's own."""
        raise NotImplementedError

    @property
    def final_norm(self) -> Any:
        """The norm that ends `hidden`, or None; each family has it elsewhere."""
        raise NotImplementedError

    def empty_cache(self, *args: Any, **inputs: Any) -> Any:
        """What decoding keeps between tokens; each family says of what.

        Raises:
          InputError: a family that does not decode.
        """
        raise InputError(f"A model of the family {self.config.family} does not decode.")

    def decoding_layers(self) -> list[Any]:
        """The parameters of each layer that decoding runs through, not stacked.

        Raises:
          InputError: a family that does not decode.
        """
        raise InputError(f"A model of the family {self.config.family} does not decode.")

    def embed(self, inputs: Inputs, key: jax.Array | None) -> jax.Array:
        """Tokens [B, T] → [B, T, D], with position and token type embeddings where there are."""
        config, tokens = self.config, inputs.tokens
        positions = inputs.positions
        if positions is None:
            positions = jnp.atleast_1d(inputs.cache_index)[:, None] + jnp.arange(tokens.shape[1])
        x = self.embedding(tokens, config.dtype)
        if config.embedding_scaled:
            x *= math.sqrt(config.width)
        match config.position_embedding:
            case "learned":
                x += self.positions(positions, config.dtype)
            case "sinusoidal":
                x += sinusoidal(positions, config.width, config.pairing).astype(config.dtype)
            case "rotary" | "alibi" | "relative" | "none":  # In attention, or nowhere.
                pass
            case unknown:
                assert_never(unknown)
        if config.token_types:
            types = jnp.zeros_like(tokens) if inputs.token_types is None else inputs.token_types
            x += self.token_types(types, config.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return constrain(dropout(x, config.dropout, key), "BtD")

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """[..., D] → logits [..., V], float32."""
        table = self.unembedding.astype(hidden.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
        if self.unembedding_bias is not None:
            logits += self.unembedding_bias
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits

    @property
    def unembedding(self) -> jax.Array:
        """The head's matrix [V, D]; the token embedding itself when tied (Press & Wolf 2017)."""
        return (self.embedding if self.config.tie_embeddings else self.head).table[...]

    @property
    def unembedding_bias(self) -> jax.Array | None:
        """The head's bias [V], where it has one."""
        return None if self.bias is None else self.bias[...]

    def readout(self, hidden: jax.Array) -> jax.Array:
        """[..., D] → what the head reads [..., D]; BERT's transforms it before it is scaled."""
        scale = self.config.logit_scale
        return hidden if scale == 1 else scale * hidden

    def check(self, inputs: Inputs) -> None:
        """Refuse what the model cannot take, before anything is compiled.

        Raises:
          InputError: tokens [B, T] of another shape, too many or unknown; unknown hook points; or
            an input that the family has no use for.
        """
        tokens, config = inputs.tokens, self.config
        if tokens.ndim != 2:
            raise InputError(f"tokens has the shape {tokens.shape}: it must be [B, T].")
        length = tokens.shape[1]
        if length > config.context_length:
            raise InputError(
                f"The sequence has {length} tokens; context allows {config.context_length}."
            )
        if not isinstance(tokens, Tracer):
            self._check_vocabulary(np.asarray(tokens))
        for name in OF_SOME_FAMILIES:
            if getattr(inputs, name) is not None and name not in self.takes:
                raise InputError(f"A model of the family {config.family} takes no {name}.")
        for names in (inputs.capture, inputs.interventions or ()):
            check_hook_points(config, names)

    def _check_vocabulary(self, tokens: np.ndarray) -> None:
        """A compiled program cannot refuse: there an unknown token's logits are NaN."""
        unknown = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)]
        if unknown.size:
            raise InputError(
                f"The sequence has token {unknown[0]}; the vocabulary has {self.config.vocab_size}."
            )
