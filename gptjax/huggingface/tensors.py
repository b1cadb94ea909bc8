"""Tables that map tensors of Hugging Face checkpoints to our parameters, one per family.

A row names our leaf, their tensor and the order of its axes, and serves both directions. In
"PDNH -> NPH D" the left side has the axes of our leaf, the right side those of the tensor, where a
group of axes is merged into one: here a matrix [N·3·H, D]. A group "1" is an axis of length 1. Axes
are those of the whole codebase (D, N, K, H, F, V; T positions, G token types, O any other output),
and P are the leaves fused in one tensor, `{part}` in our path: query, key and value.

A row applies if the model has its leaves: the bias of a layer without biases, or the head of a
model with tied embeddings, has a row but no tensor.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

PARTS = ("query", "key", "value")
BUFFERS = re.compile(
    r"(\.|^)(attn|attention)\.(attention\.)?(masked_)?bias$"
    r"|rotary_emb\.inv_freq$|position_ids$|embed_positions\.weights?$"
)
"""Buffers in checkpoints that are no parameters: causal masks, and computed positions."""

TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    path: str
    """Our leaf; those of blocks have a leading axis of layers, which `layout` omits."""
    name: str
    """Their tensor; `{layer}` is the block's index."""
    layout: str
    """Our axes -> theirs."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Our leaves, several if the tensor is fused."""
        if "{part}" not in self.path:
            return (self.path,)
        return tuple(self.path.replace("{part}", part) for part in PARTS)

    def shape(self, leaf_shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the tensor's shape for leaves of this shape."""
        sizes = self._sizes(leaf_shape)
        groups = self.layout.split(" -> ")[1].split()
        return tuple(math.prod(sizes[axis] for axis in group) for group in groups)

    def leaves(self, tensor: np.ndarray, leaf_shape: Sequence[int]) -> list[np.ndarray]:
        """Converts their tensor to our leaves, each of this shape."""
        ours, theirs = self._axes()
        sizes = self._sizes(leaf_shape)
        array = tensor.reshape([sizes[axis] for axis in theirs])
        array = array.transpose([theirs.index(axis) for axis in ours])
        return list(array) if ours.startswith("P") else [array]

    def tensor(self, leaves: Sequence[np.ndarray]) -> np.ndarray:
        """Converts our leaves to their tensor."""
        ours, theirs = self._axes()
        array = np.stack(leaves) if ours.startswith("P") else leaves[0]
        array = array.transpose([ours.index(axis) for axis in theirs])
        return np.ascontiguousarray(array.reshape(self.shape(leaves[0].shape)))

    def _axes(self) -> tuple[str, str]:
        ours, theirs = self.layout.split(" -> ")
        return ours, re.sub(r"[ 1]", "", theirs)

    def _sizes(self, leaf_shape: Sequence[int]) -> dict[str, int]:
        axes = self._axes()[0].removeprefix("P")
        return {"1": 1, "P": len(PARTS), **dict(zip(axes, leaf_shape, strict=True))}


@dataclass(frozen=True)
class Tables:
    """The tensors of a family."""

    rows: tuple[Row, ...]
    prefix: str
    """Prefix of the base model's names; a checkpoint of the base model alone omits it."""
    heads: tuple[str, ...] = ()
    """Beginnings of the names that never have the prefix."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensors that some checkpoints store twice: the second name → the first."""


QUERY, KEY, OUTPUT = "DNH -> NH D", "DKH -> KH D", "NHD -> D NH"
UP, DOWN, SQUARE = "DF -> F D", "FD -> D F", "DO -> O D"
TABLE = "VD -> V D"


def _linear(path: str, name: str, layout: str, *, conv1d: bool = False) -> tuple[Row, Row]:
    """A linear layer: PyTorch's weight is [out, in], that of GPT-2's Conv1D [in, out]."""
    ours, theirs = layout.split(" -> ")
    out = theirs.split()[-1 if conv1d else 0]
    bias = "".join(axis for axis in ours if axis in out)
    return (
        Row(f"{path}.kernel", f"{name}.weight", layout),
        Row(f"{path}.bias", f"{name}.bias", f"{bias} -> {out}"),
    )


def _norm(path: str, name: str) -> tuple[Row, Row]:
    return (
        Row(f"{path}.scale", f"{name}.weight", "D -> D"),
        Row(f"{path}.bias", f"{name}.bias", "D -> D"),
    )


def _gpt(tokens: str, positions: str) -> tuple[Row, ...]:
    """GPT-1 and GPT-2 differ only in the names of the embeddings."""
    block, layer = "decoder.blocks", "transformer.h.{layer}"
    return (
        Row("embedding.table", f"transformer.{tokens}.weight", TABLE),
        Row("positions.table", f"transformer.{positions}.weight", "TD -> T D"),
        *_norm(f"{block}.attention_norm", f"{layer}.ln_1"),
        *_linear(
            f"{block}.attention.{{part}}", f"{layer}.attn.c_attn", "PDNH -> D PNH", conv1d=True
        ),
        *_linear(f"{block}.attention.output", f"{layer}.attn.c_proj", "NHD -> NH D", conv1d=True),
        *_norm(f"{block}.mlp_norm", f"{layer}.ln_2"),
        *_linear(f"{block}.mlp.up", f"{layer}.mlp.c_fc", "DF -> D F", conv1d=True),
        *_linear(f"{block}.mlp.down", f"{layer}.mlp.c_proj", "FD -> F D", conv1d=True),
        *_norm("decoder.norm", "transformer.ln_f"),
        Row("head.table", "lm_head.weight", TABLE),
    )


def _attention(path: str, name: str, output: str) -> tuple[Row, ...]:
    """Separate query, key and value, as in most families."""
    return (
        *_linear(f"{path}.query", f"{name}.q_proj", QUERY),
        *_linear(f"{path}.key", f"{name}.k_proj", KEY),
        *_linear(f"{path}.value", f"{name}.v_proj", KEY),
        *_linear(f"{path}.output", f"{name}.{output}", OUTPUT),
    )


_GPT_NEO = (
    Row("embedding.table", "transformer.wte.weight", TABLE),
    Row("positions.table", "transformer.wpe.weight", "TD -> T D"),
    *_norm("decoder.blocks.attention_norm", "transformer.h.{layer}.ln_1"),
    *_attention("decoder.blocks.attention", "transformer.h.{layer}.attn.attention", "out_proj"),
    *_norm("decoder.blocks.mlp_norm", "transformer.h.{layer}.ln_2"),
    *_linear("decoder.blocks.mlp.up", "transformer.h.{layer}.mlp.c_fc", UP),
    *_linear("decoder.blocks.mlp.down", "transformer.h.{layer}.mlp.c_proj", DOWN),
    *_norm("decoder.norm", "transformer.ln_f"),
    Row("head.table", "lm_head.weight", TABLE),
)

_GPTJ = (
    Row("embedding.table", "transformer.wte.weight", TABLE),
    *_norm("decoder.blocks.attention_norm", "transformer.h.{layer}.ln_1"),
    *_attention("decoder.blocks.attention", "transformer.h.{layer}.attn", "out_proj"),
    *_linear("decoder.blocks.mlp.up", "transformer.h.{layer}.mlp.fc_in", UP),
    *_linear("decoder.blocks.mlp.down", "transformer.h.{layer}.mlp.fc_out", DOWN),
    *_norm("decoder.norm", "transformer.ln_f"),
    Row("head.table", "lm_head.weight", TABLE),
    Row("bias", "lm_head.bias", "V -> V"),
)

_GPT_NEOX = (
    Row("embedding.table", "gpt_neox.embed_in.weight", TABLE),
    *_norm("decoder.blocks.attention_norm", "gpt_neox.layers.{layer}.input_layernorm"),
    *_linear(
        "decoder.blocks.attention.{part}",
        "gpt_neox.layers.{layer}.attention.query_key_value",
        "PDNH -> NPH D",
    ),
    *_linear("decoder.blocks.attention.output", "gpt_neox.layers.{layer}.attention.dense", OUTPUT),
    *_norm("decoder.blocks.mlp_norm", "gpt_neox.layers.{layer}.post_attention_layernorm"),
    *_linear("decoder.blocks.mlp.up", "gpt_neox.layers.{layer}.mlp.dense_h_to_4h", UP),
    *_linear("decoder.blocks.mlp.down", "gpt_neox.layers.{layer}.mlp.dense_4h_to_h", DOWN),
    *_norm("decoder.norm", "gpt_neox.final_layer_norm"),
    Row("head.table", "embed_out.weight", TABLE),
)

_LLAMA = (
    Row("embedding.table", "model.embed_tokens.weight", TABLE),
    *_norm("decoder.blocks.attention_norm", "model.layers.{layer}.input_layernorm"),
    *_attention("decoder.blocks.attention", "model.layers.{layer}.self_attn", "o_proj"),
    *_norm("decoder.blocks.mlp_norm", "model.layers.{layer}.post_attention_layernorm"),
    *_linear("decoder.blocks.mlp.gate", "model.layers.{layer}.mlp.gate_proj", UP),
    *_linear("decoder.blocks.mlp.up", "model.layers.{layer}.mlp.up_proj", UP),
    *_linear("decoder.blocks.mlp.down", "model.layers.{layer}.mlp.down_proj", DOWN),
    *_norm("decoder.norm", "model.norm"),
    Row("head.table", "lm_head.weight", TABLE),
)

_BERT = (
    Row("embedding.table", "bert.embeddings.word_embeddings.weight", TABLE),
    Row("positions.table", "bert.embeddings.position_embeddings.weight", "TD -> T D"),
    Row("token_types.table", TOKEN_TYPES, "GD -> G D"),
    *_norm("embedding_norm", "bert.embeddings.LayerNorm"),
    *_linear(
        "encoder.blocks.attention.query", "bert.encoder.layer.{layer}.attention.self.query", QUERY
    ),
    *_linear("encoder.blocks.attention.key", "bert.encoder.layer.{layer}.attention.self.key", KEY),
    *_linear(
        "encoder.blocks.attention.value", "bert.encoder.layer.{layer}.attention.self.value", KEY
    ),
    *_linear(
        "encoder.blocks.attention.output",
        "bert.encoder.layer.{layer}.attention.output.dense",
        OUTPUT,
    ),
    *_norm(
        "encoder.blocks.attention_norm", "bert.encoder.layer.{layer}.attention.output.LayerNorm"
    ),
    *_linear("encoder.blocks.mlp.up", "bert.encoder.layer.{layer}.intermediate.dense", UP),
    *_linear("encoder.blocks.mlp.down", "bert.encoder.layer.{layer}.output.dense", DOWN),
    *_norm("encoder.blocks.mlp_norm", "bert.encoder.layer.{layer}.output.LayerNorm"),
    *_linear("pooler", "bert.pooler.dense", SQUARE),
    *_linear("masked_lm", "cls.predictions.transform.dense", SQUARE),
    *_norm("masked_lm_norm", "cls.predictions.transform.LayerNorm"),
    *_linear("next_sentence", "cls.seq_relationship", SQUARE),
    Row("bias", "cls.predictions.bias", "V -> V"),
)


def _marian_stack(side: str) -> tuple[Row, ...]:
    block, layer = f"{side}.blocks", f"model.{side}.layers.{{layer}}"
    return (
        *_attention(f"{block}.attention", f"{layer}.self_attn", "out_proj"),
        *_norm(f"{block}.attention_norm", f"{layer}.self_attn_layer_norm"),
        *_attention(f"{block}.cross_attention", f"{layer}.encoder_attn", "out_proj"),
        *_norm(f"{block}.cross_attention_norm", f"{layer}.encoder_attn_layer_norm"),
        *_linear(f"{block}.mlp.up", f"{layer}.fc1", UP),
        *_linear(f"{block}.mlp.down", f"{layer}.fc2", DOWN),
        *_norm(f"{block}.mlp_norm", f"{layer}.final_layer_norm"),
    )


_MARIAN = (
    Row("embedding.table", "model.shared.weight", TABLE),
    *_marian_stack("encoder"),
    *_marian_stack("decoder"),
    Row("bias", "final_logits_bias", "V -> 1 V"),
)

_LLAMA_TABLES = Tables(
    _LLAMA, "model.", ("lm_head.",), {"lm_head.weight": "model.embed_tokens.weight"}
)

TABLES: dict[str, Tables] = {
    "gpt2": Tables(
        _gpt("wte", "wpe"),
        "transformer.",
        ("lm_head.",),
        {"lm_head.weight": "transformer.wte.weight"},
    ),
    "openai-gpt": Tables(
        _gpt("tokens_embed", "positions_embed"),
        "transformer.",
        ("lm_head.",),
        {"lm_head.weight": "transformer.tokens_embed.weight"},
    ),
    "gpt_neo": Tables(
        _GPT_NEO, "transformer.", ("lm_head.",), {"lm_head.weight": "transformer.wte.weight"}
    ),
    "gptj": Tables(
        _GPTJ, "transformer.", ("lm_head.",), {"lm_head.weight": "transformer.wte.weight"}
    ),
    "gpt_neox": Tables(
        _GPT_NEOX, "gpt_neox.", ("embed_out.",), {"embed_out.weight": "gpt_neox.embed_in.weight"}
    ),
    "llama": _LLAMA_TABLES,
    "mistral": _LLAMA_TABLES,
    "qwen2": _LLAMA_TABLES,
    "bert": Tables(
        _BERT,
        "bert.",
        ("cls.",),
        {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    ),
    "marian": Tables(
        _MARIAN,
        "model.",
        ("final_logits_bias", "lm_head."),
        {
            "lm_head.weight": "model.shared.weight",
            "model.encoder.embed_tokens.weight": "model.shared.weight",
            "model.decoder.embed_tokens.weight": "model.shared.weight",
        },
    ),
}


@dataclass(frozen=True)
class Entry:
    """A row for a model of known depth: the tensors of all layers stacked in one set of leaves."""

    row: Row
    paths: tuple[str, ...]
    """Our leaves."""
    names: tuple[str, ...]
    """Their tensors, one per layer of the stack; outside of blocks a single one."""
    stacked: bool
    """Whether the leaves have an axis of layers."""


def entries(
    tables: Tables, leaf_shapes: Mapping[str, Sequence[int]], kinds: int = 1
) -> list[Entry]:
    """Returns the entries of the table that a model has.

    Args:
      tables: of the family.
      leaf_shapes: of every leaf of the model, by path.
      kinds: length p of the attention pattern: block l is layer l // p of stack l % p.
    """
    found = []
    for row in tables.rows:
        stacked = "{layer}" in row.name
        for kind in range(kinds if stacked else 1):
            turns = stacked and kinds > 1
            paths = tuple(
                path.replace(".blocks.", f".blocks.{kind}.") if turns else path
                for path in row.paths
            )
            if paths[0] not in leaf_shapes:
                continue
            layers = range(leaf_shapes[paths[0]][0]) if stacked else [0]
            names = tuple(row.name.format(layer=layer * kinds + kind) for layer in layers)
            found.append(Entry(row, paths, names, stacked))
    return found
