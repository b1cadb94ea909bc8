"""The assemblies: embeddings, stacks of blocks, a head.

Models are Flax NNX modules that are used functionally:

    model = build(config, rngs=nnx.Rngs(0))
    graphdef, params = split(model)
    logits = nnx.merge(graphdef, params)(tokens)

`params` is a nested dict of arrays; the blocks' leaves are stacked along a leading axis L.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gptjax.config import InputError, TransformerConfig
from gptjax.layers.dropout import split_key
from gptjax.layers.hooks import ENCODER, Capture, Taps, by_part, kept_of
from gptjax.layers.linear import Linear
from gptjax.layers.lstm import LSTM, empty_state
from gptjax.layers.mlp import gelu
from gptjax.layers.norms import LayerNorm, build_norm
from gptjax.layers.stack import (
    BlockStack,
    Edits,
    StackOutput,
    run_layers,
    stacked,
    stacked_caches,
    unstacked,
)
from gptjax.models.language_model import LanguageModel

Params = dict[str, Any]


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A model as its static structure and its parameters, a nested dict of arrays."""
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def parameter_axes(config: TransformerConfig) -> Params:
    """The letters of every parameter's axes: "LDNH" is the kernel of all layers' queries."""

    def letters(variable: nnx.Variable) -> str:
        axes = variable.get_metadata("axes")
        return "L" * (len(variable.shape) - len(axes)) + axes

    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param), extract_fn=letters)


class Decoder(LanguageModel):
    """A decoder-only Transformer: GPT (Radford et al. 2018, 2019)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.decoder = BlockStack(config, depth=config.depth, causal=True, rngs=rngs)

    @property
    def final_norm(self) -> Any:
        """The norm behind the last block, where there is one."""
        return self.decoder.norm

    def hidden(
        self,
        tokens: jax.Array,
        *,
        valid: jax.Array | None = None,
        documents: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Any = None,
        start: jax.Array | int = 0,
        key: jax.Array | None = None,
        capture: Capture = (),
        edits: Edits = None,
        layers: Sequence[Any] | None = None,
    ) -> StackOutput:
        """Everything before the head.

        Args:
          tokens: [B, T].
          valid: [B, T], False at padding, which no token looks at; not with a cache, where places
            after a query are hidden anyway.
          documents: [B, T], which of its row's documents each token is of, where rows are packed;
            a token looks only at its own, padding (0) at padding. Not with a cache.
          positions: [B, T], the place of each token in its document; None counts from `start`.
          cache: from `empty_cache`, for decoding; None attends within `tokens` alone.
          start: the place of the first token in its sequence, a number or [B].
          key: dropout key; None drops nothing.
          capture: places of `gptjax.layers.hooks` to return; those not named are never kept. Or for
            each name what to keep of it: {"attention": lambda weights: weights[:, :1]}.
          edits: interventions by place, from `gptjax.probe`.
          layers: see `BlockStack`.

        Raises:
          InputError: more tokens than `context`, an unknown place, or documents with
            a cache or for compressed attention.
        """
        self.check(tokens, capture, edits)
        embedding_key, stack_key = split_key(key, 2)
        return self.decoder(
            self.embed(tokens, start=start, positions=positions, key=embedding_key),
            valid=valid if cache is None else None,
            documents=documents,
            positions=positions,
            cache=cache,
            start=start,
            key=stack_key,
            capture=capture,
            edits=edits,
            layers=layers,
        )

    def decoding_layers(self) -> list[Any]:
        """The parameters of each block that decoding runs through, not stacked."""
        return self.decoder.layers()

    def empty_cache(self, batch_size: int) -> Any:
        """A cache for `batch_size` sequences of up to `context` tokens."""
        return self.decoder.empty_cache(batch_size)


class Encoder(LanguageModel):
    """A bidirectional encoder: BERT (Devlin et al. 2018)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width = (config.width,)
        self.encoder = BlockStack(config, depth=config.depth, causal=False, rngs=rngs)
        if config.encoder_heads in ("pooler", "pretraining"):
            self.pooler = Linear(width, width, axes="D-", bias=True, rngs=rngs)
        if config.encoder_heads in ("masked_lm", "pretraining"):
            self.masked_lm = Linear(width, width, axes="D-", bias=True, rngs=rngs)
            self.masked_lm_norm = LayerNorm(config.width, epsilon=config.norm_epsilon, bias=True)
        if config.encoder_heads == "pretraining":
            self.next_sentence = Linear(width, (2,), axes="D-", bias=True, rngs=rngs)

    @property
    def final_norm(self) -> Any:
        """The norm behind the last block, where there is one."""
        return self.encoder.norm

    def hidden(
        self,
        tokens: jax.Array,
        *,
        valid: jax.Array | None = None,
        segments: jax.Array | None = None,
        documents: jax.Array | None = None,
        positions: jax.Array | None = None,
        key: jax.Array | None = None,
        capture: Capture = (),
        edits: Edits = None,
    ) -> StackOutput:
        """Everything before the heads.

        Args:
          tokens: [B, T].
          valid: [B, T], False at padding, which no token looks at.
          segments: [B, T], which segment each token is of; None is the first.
          documents: as `Decoder.hidden`.
          positions: [B, T], the place of each token in its document; None counts from 0.
          key: dropout key; None drops nothing.
          capture, edits: as `Decoder.hidden`.

        Raises:
          InputError: more tokens than `context`, an unknown place, or documents for
            compressed attention.
        """
        self.check(tokens, capture, edits)
        embedding_key, stack_key = split_key(key, 2)
        return self.encoder(
            self.embed(tokens, positions=positions, segments=segments, key=embedding_key),
            valid=valid,
            documents=documents,
            positions=positions,
            key=stack_key,
            capture=capture,
            edits=edits,
        )

    def readout(self, hidden: jax.Array) -> jax.Array:
        """[..., D] → [..., D]: what BERT does before its masked-LM head (its released code)."""
        if self.config.encoder_heads not in ("masked_lm", "pretraining"):
            return super().readout(hidden)
        return super().readout(self.masked_lm_norm(gelu(self.masked_lm(hidden))))

    def pooled(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] → [B, D]: tanh of a linear layer of the first token."""
        return jnp.tanh(self.pooler(hidden[:, 0]))

    def next_sentence_logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] → [B, 2], float32: the second segment follows the first, or does not."""
        return self.next_sentence(self.pooled(hidden)).astype(jnp.float32)


class EncoderDecoder(LanguageModel):
    """The Transformer of Vaswani et al. 2017; one embedding for both sides and the head."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        depth = config.encoder_depth or config.depth
        self.encoder = BlockStack(config, depth=depth, causal=False, rngs=rngs)
        self.decoder = BlockStack(config, depth=config.depth, causal=True, cross=True, rngs=rngs)

    @property
    def final_norm(self) -> Any:
        """The norm behind the decoder's last block, where there is one."""
        return self.decoder.norm

    def encode(
        self,
        source: jax.Array,
        *,
        source_valid: jax.Array | None = None,
        key: jax.Array | None = None,
        capture: Capture = (),
        edits: Edits = None,
    ) -> StackOutput:
        """Source tokens [B, S], `source_valid` False at padding → the encoder's output.

        Here the places of `capture` and `edits` have no `encoder_` before their names.
        """
        self.check(source, capture, edits)
        embedding_key, stack_key = split_key(key, 2)
        x = self.embed(source, key=embedding_key)
        return self.encoder(x, valid=source_valid, key=stack_key, capture=capture, edits=edits)

    def hidden(
        self,
        tokens: jax.Array,
        *,
        source: jax.Array | None = None,
        source_valid: jax.Array | None = None,
        valid: jax.Array | None = None,
        documents: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Any = None,
        start: jax.Array | int = 0,
        key: jax.Array | None = None,
        capture: Capture = (),
        edits: Edits = None,
        layers: Sequence[Any] | None = None,
    ) -> StackOutput:
        """Everything before the head.

        Args:
          tokens: [B, T], of the target.
          source: [B, S]; not needed with a cache, which holds what is read of it.
          source_valid: [B, S], False at padding.
          documents, positions: taken for the other families' sake, and refused.
          valid, cache, start, key, layers: as `Decoder.hidden`.
          capture, edits: as `Decoder.hidden`; the encoder's places begin with `encoder_`, and are
            there without a cache.

        Raises:
          InputError: more tokens than `context`, an unknown place, or packed rows.
        """
        if documents is not None or positions is not None:
            raise InputError(
                "An encoder-decoder takes one document a row: its batches have no `documents` and "
                "no `positions`."
            )
        self.check(tokens, capture, edits)
        encoder_key, embedding_key, stack_key = split_key(key, 3)
        encoder_capture, capture = by_part(kept_of(capture))
        encoder_edits, edits = by_part(dict(edits or {}))
        memory, encoder_captured = None, {}
        if cache is None:
            assert source is not None
            encoded = self.encode(
                source,
                source_valid=source_valid,
                key=encoder_key,
                capture=encoder_capture,
                edits=encoder_edits,
            )
            memory, encoder_captured = encoded.hidden, encoded.captured
        output = self.decoder(
            self.embed(tokens, start=start, key=embedding_key),
            valid=valid if cache is None else None,
            memory=memory,
            memory_valid=source_valid,
            cache=cache,
            start=start,
            key=stack_key,
            capture=capture,
            edits=edits,
            layers=layers,
        )
        encoder_captured = {ENCODER + name: x for name, x in encoder_captured.items()}
        return output._replace(captured=output.captured | encoder_captured)

    def decoding_layers(self) -> list[Any]:
        """The parameters of each block that decoding runs through, not stacked."""
        return self.decoder.layers()

    def empty_cache(self, source: jax.Array, source_valid: jax.Array | None = None) -> Any:
        """A cache for one target of up to `context` tokens for each row of `source` [B, S]."""
        memory = self.encode(source, source_valid=source_valid).hidden
        return self.decoder.empty_cache(len(source), memory)


class Recurrent(LanguageModel):
    """A stack of LSTMs between the same embedding and head (Zaremba et al. 2014)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.layers = stacked(functools.partial(_build_lstm, config), config.depth, rngs)
        self.norm = build_norm(config) if config.final_norm else None

    @property
    def final_norm(self) -> Any:
        """The norm behind the last layer, where there is one."""
        return self.norm

    def hidden(
        self,
        tokens: jax.Array,
        *,
        valid: jax.Array | None = None,
        documents: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Any = None,
        start: jax.Array | int = 0,
        key: jax.Array | None = None,
        capture: Capture = (),
        edits: Edits = None,
        layers: Sequence[Any] | None = None,
    ) -> StackOutput:
        """Everything before the head.

        Args:
          tokens: [B, T].
          valid: [B, T], False at padding, which leaves the state as it is.
          documents: [B, T], which of its row's documents each token is of, where rows are packed;
            the state is forgotten where another begins.
          positions: as `start`.
          cache: the state after the tokens before; None begins anew.
          start: taken for the other decoders' sake; a recurrent state knows no places.
          key: dropout key; None drops nothing.
          capture, edits: as `Decoder.hidden`.
          layers: see `BlockStack`.

        Raises:
          InputError: more tokens than `context`, or an unknown place.
        """
        config = self.config
        self.check(tokens, capture, edits)
        embedding_key, layers_key = split_key(key, 2)
        x = self.embed(tokens, key=embedding_key)
        graphdef, params = nnx.split(self.layers, nnx.Param)
        begins = None
        if documents is not None:
            begins = jnp.diff(documents, axis=1, prepend=documents[:, :1]) != 0

        def run(_: int, params: Any, x: jax.Array, rows: Any, state: Any, key: Any, edits: Edits):
            valid, begins = rows
            taps = Taps(capture, edits)
            x = taps("residual", x)
            after, state = nnx.merge(graphdef, params)(
                x, state, valid=valid, begins=begins, key=key
            )
            return after, state, taps.captured

        states = self.empty_cache(len(tokens)) if cache is None else cache
        x, states, captured = run_layers(
            run,
            [params],
            x,
            (valid, begins),
            config=config,
            depth=config.depth,
            cache=states,
            key=layers_key,
            edits=edits,
            layers=layers,
        )
        hidden = x if self.norm is None else self.norm(x)
        return StackOutput(hidden, None if cache is None else states, captured, None)

    def decoding_layers(self) -> list[Any]:
        """The parameters of each LSTM."""
        return unstacked([nnx.state(self.layers, nnx.Param)], self.config.depth)

    def empty_cache(self, batch_size: int) -> Any:
        """The state of `batch_size` sequences before their first token."""
        states = [empty_state(self.config, batch_size) for _ in range(self.config.depth)]
        return stacked_caches(self.config, states)


def _build_lstm(config: TransformerConfig, rngs: nnx.Rngs) -> LSTM:
    return LSTM(config, rngs=rngs)


FAMILIES: dict[str, type[LanguageModel]] = {
    "decoder": Decoder,
    "encoder": Encoder,
    "encoder_decoder": EncoderDecoder,
    "recurrent": Recurrent,
}


def build(config: TransformerConfig, *, rngs: nnx.Rngs) -> Any:
    """A model of the family that `config` names, newly initialised.

    Raises:
      InputError: a config without a vocabulary size.
    """
    return FAMILIES[config.family](config, rngs=rngs)
