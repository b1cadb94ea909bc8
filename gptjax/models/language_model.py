"""The base class of all model families: token embeddings and the language-model head."""

import abc
import math
from typing import Any, ClassVar, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, Int, Key, PyTree

from gptjax.config import InputError, TransformerConfig
from gptjax.layers.dropout import dropout
from gptjax.layers.embedding import Embedding
from gptjax.layers.hooks import check_hook_points
from gptjax.layers.inputs import Cache, Inputs
from gptjax.layers.matrices import Int8Matrix
from gptjax.layers.norms import Norm, build_norm
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
"""The fields of `Inputs` that only some families take."""


class LanguageModel(nnx.Module):
    """A language model: embeddings, the layers of its family (`forward`), and a head.

    Raises:
      InputError: a config without a vocabulary size.
    """

    takes: ClassVar[tuple[str, ...]] = ()
    """The inputs of `OF_SOME_FAMILIES` that the family takes."""

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

    def __call__(
        self, tokens: Int[Array | np.ndarray, "B T"], **inputs: Any
    ) -> Float32[Array, "B T V"]:
        """The logits of the next token at each position; of an encoder, of the token at it.

        `inputs` are the fields of `Inputs`.
        """
        return self.unembed(self.readout(self.hidden(tokens, **inputs).hidden))

    def hidden(self, tokens: Int[Array | np.ndarray, "B T"], **inputs: Any) -> StackOutput:
        """The hidden states before the head; `inputs` are the fields of `Inputs`.

        Raises:
          InputError: more tokens than context_length, an unknown hook point, or an input that the
            family does not take.
        """
        given = Inputs(tokens, **inputs)
        self.check(given)
        return self.forward(given)

    @abc.abstractmethod
    def forward(self, inputs: Inputs) -> StackOutput:
        """`hidden` of checked inputs."""

    @property
    @abc.abstractmethod
    def final_norm(self) -> Norm | None:
        """The norm after the last layer, if there is one."""

    def empty_cache(self, *args: Any, **inputs: Any) -> Cache:
        """The cache of decoding before the first token; its arguments depend on the family.

        Raises:
          InputError: a family that does not decode.
        """
        raise InputError(f"A model of the family {self.config.family} does not decode.")

    def decoding_layers(self) -> list[PyTree]:
        """The parameters of each layer used in decoding, not stacked.

        Raises:
          InputError: a family that does not decode.
        """
        raise InputError(f"A model of the family {self.config.family} does not decode.")

    @jax.named_scope("embedding")
    def embed(self, inputs: Inputs, key: Key[Array, ""] | None) -> Float[Array, "B T D"]:
        """The sum of token, position and token type embeddings, normalised and with dropout."""
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
            case "rotary" | "alibi" | "relative" | "none":  # In attention, or none at all.
                pass
            case unknown:
                assert_never(unknown)
        if config.token_types:
            types = jnp.zeros_like(tokens) if inputs.token_types is None else inputs.token_types
            x += self.token_types(types, config.dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return constrain(dropout(x, config.dropout, key), "BtD")

    @jax.named_scope("head")
    def unembed(self, hidden: Float[Array, "*shape D"]) -> Float32[Array, "*shape V"]:
        """The logits, soft-capped if `logit_softcap` is set."""
        table = self.unembedding
        if isinstance(table, Int8Matrix):
            rows = table.products(hidden.reshape(-1, hidden.shape[-1]))
            logits = rows.reshape(*hidden.shape[:-1], -1)
        else:
            logits = jnp.einsum(
                "...d,vd->...v",
                hidden,
                table.astype(hidden.dtype),
                preferred_element_type=jnp.float32,
            )
        if self.unembedding_bias is not None:
            logits += self.unembedding_bias
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits

    @property
    def unembedding(self) -> Float[Array, "V D"] | Int8Matrix:
        """The head's matrix; the token embedding itself if tied (Press & Wolf 2017)."""
        return (self.embedding if self.config.tie_embeddings else self.head).table.get_value()

    @property
    def unembedding_bias(self) -> Float[Array, " V"] | None:
        """The head's bias, if it has one."""
        return None if self.bias is None else self.bias[...]

    def readout(self, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        """The head's input: the hidden states times `logit_scale`; BERT transforms them first."""
        scale = self.config.logit_scale
        return hidden if scale == 1 else scale * hidden

    def check(self, inputs: Inputs) -> None:
        """Validate the inputs before anything is compiled.

        Raises:
          InputError: tokens that are not [B, T], are too many or are outside the vocabulary;
            unknown hook points; or an input that the family does not take.
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
        """Refuse tokens outside the vocabulary; in a compiled program their logits are NaN."""
        unknown = tokens[(tokens < 0) | (tokens >= self.config.vocab_size)]
        if unknown.size:
            raise InputError(
                f"The sequence has token {unknown[0]}; the vocabulary has {self.config.vocab_size}."
            )
